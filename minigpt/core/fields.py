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
        if not dataclasses.is_dataclass(base):
            continue
        try:
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError, SyntaxError):
            continue
        assert isinstance(definition, ast.ClassDef)
        for field, literal in pairwise(definition.body):
            match field, literal:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    docs[name] = " ".join(text.split())
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
    sections = _sections(cls)
    for field in dataclasses.fields(cls):
        if field.name in sections:
            docs |= setting_docs(sections[field.name], f"{prefix}{field.name}.")
        else:
            docs[prefix + field.name] = field_docs(cls).get(field.name, "")
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


def _sections(cls: type) -> dict[str, type]:
    """Return the fields of `cls` that hold a dataclass, perhaps or None, with its type."""
    sections: dict[str, type] = {}
    for name, hint in typing.get_type_hints(cls).items():
        for option in typing.get_args(hint) or [hint]:
            if isinstance(option, type) and dataclasses.is_dataclass(option):
                sections[name] = option
    return sections


class _Docstring:
    """A docstring that ends with the fields of its class, as the attribute `__doc__`."""

    def __init__(self, text: str | None) -> None:
        self.text = inspect.cleandoc(text or "")

    def __get__(self, instance: Any, owner: type) -> str:
        lines = [
            textwrap.fill(f"{name}: {text}", 90, initial_indent=" " * 4, subsequent_indent=" " * 8)
            for name, text in field_docs(owner).items()
        ]
        return "\n".join([self.text, "", "Attributes:", *lines]).strip()
