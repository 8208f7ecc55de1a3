"""Plain values in, a validated dataclass out; and the one error that is the user's to mend.

Every part of the project takes its settings as a small frozen dataclass that checks itself in
`__post_init__`. `build` makes one from a plain mapping (a composed Hydra config, the
hyper-parameters of a checkpoint) and turns whatever is wrong with the mapping into one line.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Something the user typed or supplied is wrong.

    The message is one line: what was wrong, what is allowed, what to type instead. Entry points
    print it without a traceback and leave with exit code 2.
    """


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Make the dataclass `cls` from `values`, checking names and types on the way.

    Args:
        cls: a dataclass; its `__post_init__` may raise ValueError for values out of range.
        values: one entry for each field to set; the others keep their defaults.
        where: what the section is called on the command line (`model`, `data`, ...); "" at the top.

    Raises:
        UserError: an unknown name, a missing one, a value of the wrong type, or one that `cls`
            refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = [field.name for field in fields]
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in names:
            raise UserError(unknown_name(f"{prefix}{key}", [f"{prefix}{name}" for name in names]))
    nothing = dataclasses.MISSING
    for field in fields:
        optional = field.default is not nothing or field.default_factory is not nothing
        if field.name not in values and not optional:
            raise UserError(f"{prefix}{field.name} is not set: type {prefix}{field.name}=<value>")
    converted = {k: _convert(v, hints[k], f"{prefix}{k}") for k, v in values.items()}
    try:
        return cls(**converted)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


def one_line(error: Exception | str) -> str:
    """A message as a terminal may show it: on one line, no control characters, not endless.

    Values that were typed, or read from a file, are part of messages.
    """
    text = " ".join(str(error).split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= 1000 else f"{text[:700]} ... {text[-290:]}"


def unknown_name(name: str, allowed: list[str], kind: str = "setting") -> str:
    """One line for a name that does not exist: the nearest ones that do, or all of them."""
    if "." in name:
        allowed = [other for other in allowed if "." in other] or allowed
    near = difflib.get_close_matches(name, allowed, n=3, cutoff=0.6)
    if near:
        return f"unknown {kind} '{name}': did you mean {' or '.join(near)}?"
    if len(allowed) > 20:
        return f"unknown {kind} '{name}': --help shows the common ones, --cfg job all of them"
    return f"unknown {kind} '{name}': choose from {', '.join(sorted(allowed))}"


def _convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as the type `hint`, or a UserError that names both.

    Whole floats pass for integers, so that `budget.tokens=1e7` means what it says.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = [a for a in args if a is not type(None)]  # only `X | None` is used here
        return _convert(value, inner, name)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{name}={value}: a group of settings; type {name}.<setting>=<value>")
        return build(hint, value, name)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{name}={value}: choose from {', '.join(map(str, args))}")
        return value
    if origin in (list, tuple):
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise UserError(f"{name}={value}: expected a list, such as {name}=[a,b]")
        return origin(_convert(item, args[0], name) for item in items)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and not isinstance(value, bool):
        if isinstance(value, int):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
        raise UserError(f"{name}={value}: expected a finite number")
    if hint is str and isinstance(value, str | int | float):
        return str(value)
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    raise UserError(f"{name}={value!r}: expected {wanted.get(hint, hint)}")
