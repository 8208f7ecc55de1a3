"""The sentence under each field of a config dataclass, a string literal that Python itself drops.

>>> field_docs(TrainConfig)["seed"]
'Seed of the initial weights, the data order and dropout, from 0 to 2^32 - 1.'
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from itertools import pairwise
from typing import Any, TypeVar

C = TypeVar("C", bound=type)


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Return the sentences under the fields of `cls` and of its bases.

    Args:
        cls: a dataclass.

    Returns:
        The sentence of each field that has one, on one line, by the name of the field. It is empty
        for a class without source code, such as one that was typed into an interpreter.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            definition: Any = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError, SyntaxError):  # `object`, for one
            continue
        for field, following in pairwise(definition.body):
            text = ast.get_docstring(ast.Module([following], []))
            if isinstance(field, ast.AnnAssign) and text:
                docs[ast.unparse(field.target)] = " ".join(text.split())
    return docs


def setting_docs(cls: type, prefix: str = "") -> dict[str, str]:
    """Return the sentence of each setting in `cls` and its sections; "" where there is none.

    Args:
        cls: a dataclass whose fields may be dataclasses, the sections.
        prefix: what the dotted names begin with, such as "model.".

    Returns:
        The sentences by dotted name, such as "optimizer.lr", in the order of the fields.
    """
    docs: dict[str, str] = {}
    for field in dataclasses.fields(cls):
        name, section = prefix + field.name, _sections(cls).get(field.name)
        own = {name: field_docs(cls).get(field.name, "")}
        docs |= setting_docs(section, f"{name}.") if section else own
    return docs


def documented(cls: C) -> C:
    """Have `help()` show the sentences of a dataclass and its sections; a class decorator.

    The source code is read when the docstring is asked for, so that importing it costs nothing.
    """
    if not isinstance(cls.__dict__.get("__doc__"), _Docstring):
        setattr(cls, "__doc__", _Docstring(cls.__doc__))  # noqa: B010
    for section in _sections(cls).values():
        documented(section)
    return cls


def _sections(cls: type) -> dict[str, Any]:
    """Return the type of each field of `cls` that holds a dataclass, or a dataclass or None."""
    hints = typing.get_type_hints(cls).items()
    options = [(name, option) for name, hint in hints for option in typing.get_args(hint) or [hint]]
    return {name: option for name, option in options if dataclasses.is_dataclass(option)}


class _Docstring:
    """A docstring that ends with the fields of its class, as the attribute `__doc__`."""

    def __init__(self, text: str | None) -> None:
        self.text = inspect.cleandoc(text or "")

    def __get__(self, instance: Any, owner: type) -> str:
        indent = textwrap.TextWrapper(90, initial_indent=" " * 4, subsequent_indent=" " * 8).fill
        lines = [indent(f"{name}: {text}") for name, text in field_docs(owner).items()]
        return "\n".join([self.text, "", "Attributes:", *lines]).strip()
