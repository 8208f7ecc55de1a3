"""Field docs: the string literals under the fields of a config dataclass.

Python itself discards these strings, so this module reads them from the source.

>>> field_docs(TrainConfig)["seed"]
'Seed of all random numbers in the run, such as initial weights and data order, from 0 to 2^32 - 1.'
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
    """Return the field docs, the strings under the fields, of `cls` and its base classes.

    Args:
        cls: a dataclass.

    Returns:
        The field docs by field name, each on one line. A class without source code, such as a class
        that was typed into an interpreter, has no field docs.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            definition: Any = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError, SyntaxError):  # such as `object`
            continue
        for field, following in pairwise(definition.body):
            text = ast.get_docstring(ast.Module([following], []))
            if isinstance(field, ast.AnnAssign) and text:
                docs[ast.unparse(field.target)] = " ".join(text.split())
    return docs


def setting_docs(cls: type, prefix: str = "") -> dict[str, str]:
    """Return the field doc of each setting in `cls` and its sections.

    A field doc is the string literal under a field. If it is missing, it is returned as "".

    Args:
        cls: a dataclass. A field that is itself a dataclass is a section.
        prefix: prefix of the dotted names, such as "model.".

    Returns:
        The field docs by dotted name, such as "optimizer.lr", in the order of the fields.
    """
    docs: dict[str, str] = {}
    for field in dataclasses.fields(cls):
        name, section = prefix + field.name, _sections(cls).get(field.name)
        own = {name: field_docs(cls).get(field.name, "")}
        docs |= setting_docs(section, f"{name}.") if section else own
    return docs


def setting_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Return the type of each setting in `cls` and its sections.

    Args:
        cls: a dataclass. A field that is itself a dataclass is a section.
        prefix: prefix of the dotted names, such as "model.".

    Returns:
        The types by dotted name, such as "optimizer.lr".
    """
    hints: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        section = _sections(cls).get(name)
        hints |= setting_types(section, f"{prefix}{name}.") if section else {prefix + name: hint}
    return hints


def documented(cls: C) -> C:
    """Class decorator: append the field docs of a dataclass to its `__doc__`.

    The field docs are the strings under the fields. Each dataclass that is the type of a field is
    extended in the same way. The source is parsed only when `__doc__` is read, so that imports stay
    fast.

    Args:
        cls: the dataclass.

    Returns:
        The same class.
    """
    if not isinstance(cls.__dict__.get("__doc__"), _Docstring):
        setattr(cls, "__doc__", _Docstring(cls.__doc__))  # noqa: B010
    for section in _sections(cls).values():
        documented(section)
    return cls


def _sections(cls: type) -> dict[str, Any]:
    """Return the dataclass of each section of `cls`, by field name.

    A section is a field of type `X` or `X | None`, where `X` is a dataclass.
    """
    hints = typing.get_type_hints(cls).items()
    options = [(name, option) for name, hint in hints for option in typing.get_args(hint) or [hint]]
    return {name: option for name, option in options if dataclasses.is_dataclass(option)}


class _Docstring:
    """Descriptor for `__doc__` that appends the field docs to the docstring of the class."""

    def __init__(self, text: str | None) -> None:
        self.text = inspect.cleandoc(text or "")

    def __get__(self, instance: Any, owner: type) -> str:
        indent = textwrap.TextWrapper(90, initial_indent=" " * 4, subsequent_indent=" " * 8).fill
        lines = [indent(f"{name}: {text}") for name, text in field_docs(owner).items()]
        return "\n".join([self.text, "", "Attributes:", *lines]).strip()
