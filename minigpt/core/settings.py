"""Build validated dataclasses from plain dicts; `UserError` marks mistakes the user can fix.

Every part of the project takes its settings as a small frozen dataclass that checks itself in
`__post_init__`. `build` makes one from a plain mapping (a composed Hydra config, the
hyper-parameters of a checkpoint) and turns whatever is wrong with the mapping into a `UserError`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

T = TypeVar("T")
MISSING = dataclasses.MISSING
RENAMED = {"model.attention": "trainer.kernels"}  # settings of earlier versions


class UserError(ValueError):
    """A mistake that the user can fix.

    `str` names the arguments of the library; the command line turns them into the settings or
    options that were typed, on one line, and exits with code 2.

    Args:
        message: what is wrong and what is allowed.
        argument: dotted name of the argument or field at fault, such as "data.batch_size".
        value: what it was; left out where the message says it.
        fix: what to set instead, by dotted name.
        command: the verb and settings of a next step, such as ("train", {"resume": "runs/a"}).
    """

    def __init__(
        self,
        message: str,
        argument: str | None = None,
        value: Any = MISSING,
        fix: Mapping[str, Any] | None = None,
        command: tuple[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.argument, self.value = message, argument, value
        self.fix, self.command = dict(fix or {}), command

    def __str__(self) -> str:
        parts = [self.message]
        if self.fix:
            parts.append("set " + " and ".join(f"{k}={v!r}" for k, v in self.fix.items()))
        if self.command is not None:
            parts.append(f"call {python_call(self.command[0], **self.command[1])}")
        return self.subject(repr) + "; ".join(parts)

    def subject(self, spell: Callable[[Any], str]) -> str:
        """Return "argument=value: " for the front of the line; "" without an argument."""
        if self.argument is None:
            return ""
        typed = "" if self.value is MISSING else f"={spell(self.value)}"
        return f"{self.argument}{typed}: "

    def within(self, section: str) -> UserError:
        """Return this error with its arguments named as fields of `section`."""
        prefix = f"{section}." if section else ""
        argument = None if self.argument is None else prefix + self.argument
        fix = {prefix + key: value for key, value in self.fix.items()}
        return UserError(self.message, argument, self.value, fix, self.command)


class ModelClassError(UserError):
    """A run was trained with a class of its own, `class_name`, which has to be given."""

    def __init__(self, message: str, class_name: str) -> None:
        super().__init__(message, "model")
        self.class_name = class_name


def python_call(verb: str, /, **settings: Any) -> str:
    """Return the library call of a verb: what to do next in a notebook."""
    if verb == "train":
        typed = [f"{key}={value}" for key, value in settings.items()]
        return f'minigpt.train(minigpt.load_config("train", {typed}))'
    return f"minigpt.{verb}({str(next(iter(settings.values())))!r})"


_spell: Callable[..., str] = python_call


def next_step(verb: str, /, **settings: Any) -> str:
    """Return what to do next, for the log: a library call, or a command once `speak` was called."""
    return _spell(verb, **settings)


def speak(spell: Callable[..., str]) -> None:
    """Have `next_step` spell steps by `spell(verb, **settings)`; for the command line alone."""
    global _spell
    _spell = spell


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Return the dataclass `cls` made from `values`, with names and types checked.

    Args:
        cls: a dataclass; its `__post_init__` may raise ValueError for values out of range.
        values: one entry for each field to set; the others keep their defaults.
        where: dotted name of the section (`model`, `data`, ...); "" at the top.

    Raises:
        UserError: an unknown name, a missing one, a value of the wrong type, or one that `cls`
            refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    names = [f"{prefix}{field.name}" for field in fields]
    for key in values:
        if f"{prefix}{key}" not in names:
            raise UserError(unknown_name(f"{prefix}{key}", names))
    for field in fields:
        required = field.default is MISSING and field.default_factory is MISSING
        if required and field.name not in values:
            raise UserError("is not set", f"{prefix}{field.name}")
    converted = {k: _convert(v, hints[k], f"{prefix}{k}") for k, v in values.items()}
    try:
        return cls(**converted)
    except UserError as error:
        raise error.within(where) from None
    except ValueError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


def check(config: Any, message: str, allows: Callable[[Any], bool], *names: str) -> None:
    """Raise UserError with `message` for the first field that is not None and not allowed."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not allows(value):
            raise UserError(message, name, value)


def plain_defaults(cls: type) -> dict[str, Any]:
    """Return the defaults of the dataclass `cls` as plain values, as they are before `cls` checks.

    A section becomes a dict, a tuple a list; None stays where a value depends on another one.
    """
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if dataclasses.is_dataclass(hint := hints[field.name]):
            values[field.name] = plain_defaults(hint)  # type: ignore[arg-type]
        elif default is not MISSING:
            values[field.name] = plain(default)
    return values


def plain(value: Any) -> Any:
    """Return `value` with dataclasses as dicts and tuples as lists, which YAML and JSON know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def flat(group: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings by the dotted names that they are typed with."""
    names: dict[str, Any] = {}
    for key, value in group.items():
        inner = isinstance(value, dict)
        names |= flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return names


def one_line(error: Exception | str) -> str:
    """A message as a terminal may show it: on one line, no control characters, not endless.

    Values that were typed, or read from a file, are part of messages.
    """
    text = " ".join(str(error).split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= 1000 else f"{text[:700]} ... {text[-290:]}"


def unknown_name(name: str, allowed: list[str], kind: str = "setting") -> str:
    """One line for a name that does not exist: the nearest ones that do, or all of them."""
    if name in RENAMED:
        return f"unknown {kind} '{name}': it is {RENAMED[name]} now"
    if "." in name:
        allowed = [other for other in allowed if "." in other] or allowed
    near = difflib.get_close_matches(name, allowed, n=3, cutoff=0.6)
    if near:
        return f"unknown {kind} '{name}': did you mean {' or '.join(near)}?"
    if len(allowed) > 20:
        return f"unknown {kind} '{name}': --help shows the common ones, --cfg job all of them"
    return f"unknown {kind} '{name}': choose from {', '.join(sorted(allowed))}"


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Return `value` as the type `hint`, or raise a UserError that names both.

    Whole floats pass for integers, so that `budget.tokens=1e7` means what it says.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = [a for a in args if a is not type(None)]  # only `X | None` is used here
        return _convert(value, inner, name)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise UserError(f"a group of settings; set {name}.<setting>", name, value)
        return build(hint, value, name)
    if origin is Literal:
        if value not in args:
            raise UserError(f"choose from {', '.join(map(str, args))}", name, value)
        return value
    if origin in (list, tuple):
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise UserError(f"expected a list, such as {name}=[a,b]", name, value)
        return origin(_convert(item, args[0], name) for item in items)
    if hint is bool and isinstance(value, bool):
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int and number and value % 1 == 0:
        return int(value)
    if hint is float and number:
        if math.isfinite(value):
            return float(value)
        raise UserError("expected a finite number", name, value)
    if hint is str and isinstance(value, str | int | float):
        return str(value)
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    raise UserError(f"expected {expected.get(hint, hint)}", name, value)
