"""Build validated dataclasses from plain dicts; `UserError` marks mistakes the user can fix.

Settings are frozen dataclasses that check their values in `__post_init__`. `build` creates one from
a plain mapping, such as a composed Hydra config or the hyper-parameters of a checkpoint, and raises
a `UserError` for anything that is wrong with the mapping.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from minigpt.core.typed import shell_command, shell_word, typed_settings, verb_words

T = TypeVar("T")


class _Missing(enum.Enum):
    """Type of MISSING; unlike `dataclasses.MISSING`, a pickled member is the same object again."""

    MISSING = enum.auto()


MISSING = _Missing.MISSING
RENAMED = {"model.attention": "trainer.kernels"}  # old and new names of settings


class UserError(ValueError):
    """Mistake that the user can fix.

    `str(error)` names arguments of the library. The command line names the corresponding settings
    or options instead, prints the error on one line, and exits with `exit_code`.

    Args:
        message: what is wrong and what is allowed.
        argument: dotted name of the wrong argument or field, such as "data.batch_size".
        value: value of `argument`. Omit it if `message` already contains the value.
        fix: values to set instead, by dotted name.
        command: command to suggest, as a pair (verb, settings). The settings are a dict, such as
            {"resume": "runs/a"}, or a list of settings as typed on the command line, such as
            ["resume=runs/a"].

    Attributes:
        exit_code: exit code of a program that stops with this error.
    """

    exit_code = 2

    def __init__(
        self,
        message: str,
        argument: str | None = None,
        value: Any = MISSING,
        fix: Mapping[str, Any] | None = None,
        command: tuple[str, Mapping[str, Any] | Sequence[str]] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.argument, self.value = message, argument, value
        self.fix, self.command = dict(fix or {}), command

    def __str__(self) -> str:
        parts = [self.message]
        if self.fix:
            parts.append("set " + " and ".join(f"{k}={v!r}" for k, v in self.fix.items()))
        if self.command is not None:
            parts.append(f"call {spell_step(python_call, *self.command)}")
        return self.subject(repr) + "; ".join(parts)

    def subject(self, spell: Callable[[Any], str]) -> str:
        """Return the start of the error message: the name and the value of the argument.

        Args:
            spell: function that formats the value.

        Returns:
            "argument=value: "; "argument: " if the error has no value, and "" if it has no
            argument.
        """
        if self.argument is None:
            return ""
        typed = "" if self.value is MISSING else f"={spell(self.value)}"
        return f"{self.argument}{typed}: "

    def within(self, section: str) -> UserError:
        """Return a copy of this error in which `section` is the prefix of all argument names.

        Args:
            section: dotted name of the section; "" changes nothing.

        Returns:
            The copy. The prefix is added to `argument` and to the names in `fix`.
        """
        prefix = f"{section}." if section else ""
        argument = None if self.argument is None else prefix + self.argument
        fix = {prefix + key: value for key, value in self.fix.items()}
        return UserError(self.message, argument, self.value, fix, self.command)


class DiskFullError(UserError):
    """Error raised if a file cannot be written because the disk is full or read-only.

    The exit code is 1 instead of 2, because the settings are not wrong.
    """

    exit_code = 1


class ModelClassError(UserError):
    """Error raised if the custom model class of a run was not given, or another class was given.

    Args:
        message: what is wrong.
        class_name: dotted path of the class that the run was trained with.
        argument: name of the argument for the class: "teacher" if the run is used as a teacher,
            else "model".
    """

    def __init__(self, message: str, class_name: str, argument: str = "model") -> None:
        super().__init__(message, argument)
        self.class_name = class_name

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what `pickle` needs: launchers of sweeps send errors between processes."""
        return type(self), (self.message, self.class_name, self.argument)


def python_call(verb: str, /, *words: str, **settings: Any) -> str:
    """Return the Python call for a command-line verb with settings, to suggest in a message.

    Args:
        verb: verb of the command line, such as train.
        *words: settings as typed on the command line; used only for train.
        **settings: settings by name. For train, the call contains all of them. For any other verb,
            the call contains only the value of the first setting. If there is a setting
            `class_path`, the call also contains the class that this setting names.

    Returns:
        The call, such as "minigpt.evaluate('runs/a')". A custom class is written without its
        module, because the call takes the class itself and not its dotted path. For a verb that
        the library has no function for, the result is the shell command.
    """
    if verb in ("playground", "study"):
        return shell_command("minigpt", *verb_words(verb, settings))
    if verb == "train":
        typed = [*words, *typed_settings(settings)]
        classes = [word for word in typed if word.partition("=")[0].endswith(".class_path")]
        typed = [word for word in typed if word not in classes]
        names = ((word.partition(".")[0], word.rpartition(".")[2]) for word in classes)
        more = "".join(f", {argument}={name}" for argument, name in names)
        return f'minigpt.train(minigpt.load_config("train", {typed}){more})'
    run = repr(str(next(iter(settings.values()))))
    if path := settings.get("class_path"):
        run = f"minigpt.Run.load({run}, {str(path).rpartition('.')[2]})"
    return f"minigpt.{verb}({run})"


_spell: Callable[..., str] = python_call


def next_step(verb: str, /, **settings: Any) -> str:
    """Return the call or command that a log message suggests to the user as the next step.

    The result is a Python call. In command-line programs, which call `speak`, it is a shell
    command.

    Args:
        verb: verb of the command line, such as train.
        **settings: settings by name.

    Returns:
        The call or the command, as text.
    """
    return _spell(verb, **settings)


def spell_step(
    spell: Callable[..., str], verb: str, settings: Mapping[str, Any] | Sequence[str]
) -> str:
    """Call `spell` with a verb and settings, and return its result.

    Args:
        spell: `python_call`, or a function with the same arguments.
        verb: verb of the command line, such as train.
        settings: a dict of settings by name, which is passed as keyword arguments; or a list of
            settings as typed on the command line, which is passed as positional arguments.
    """
    return spell(verb, **settings) if isinstance(settings, Mapping) else spell(verb, *settings)


def speak(spell: Callable[..., str]) -> None:
    """Make `next_step` call `spell` instead of `python_call`.

    Command-line programs call this function, so that next steps are shell commands.

    Args:
        spell: function with the same arguments as `python_call`. It returns a shell command.
    """
    global _spell
    _spell = spell


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Check the names and types of plain values, and build a dataclass instance from the values.

    Args:
        cls: the dataclass; its `__post_init__` may raise ValueError for values out of range, with a
            message that starts with the name and the value of the field.
        values: values of fields by name; fields without a value keep their defaults.
        where: dotted name of the section, for errors, such as "model"; "" at the top level.

    Returns:
        A valid instance of `cls`.

    Raises:
        UserError: a name is unknown or missing, or a value has the wrong type or is out of range.
    """
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    names = [f"{prefix}{field.name}" for field in fields]
    for key in values:
        if f"{prefix}{key}" not in names:
            raise UserError(unknown_name(f"{prefix}{key}", names), f"{prefix}{key}")
    for field in fields:
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise UserError("is required and has no default: set it", f"{prefix}{field.name}")
    converted = {k: _convert(v, hints[k], f"{prefix}{k}") for k, v in values.items()}
    try:
        return cls(**converted)
    except UserError as error:
        raise error.within(where) from None
    except ValueError as error:  # of a class that knows no UserError, such as GPTConfig
        message = str(error)
        if (name := message.partition(" ")[0]) in converted:
            message = message.removeprefix(f"{name} {converted[name]} ")
            raise UserError(message, f"{prefix}{name}", converted[name]) from None
        raise UserError(f"{where}: {message}" if where else message) from None


def check(config: Any, message: str, allows: Callable[[Any], bool], *names: str) -> None:
    """Raise UserError for the first field in `names` with a value that is not allowed.

    None is always allowed.

    Args:
        config: the object with the fields.
        message: which values are allowed.
        allows: function that returns whether a value is allowed.
        names: names of the fields.
    """
    for name in names:
        if (value := getattr(config, name)) is not None and not allows(value):
            raise UserError(message, name, value)


def make_tuples(config: Any, *names: str) -> None:
    """Replace a list or a single value in fields of a frozen dataclass with a tuple.

    Args:
        config: the dataclass instance, which is changed in place.
        *names: names of the fields.
    """
    for name in names:
        value = getattr(config, name)
        items = value if isinstance(value, list | tuple) else [value]
        object.__setattr__(config, name, tuple(items))


def plain_defaults(cls: type) -> dict[str, Any]:
    """Return the defaults of a dataclass as plain values.

    A section, which is a field with a dataclass as its type, becomes a dict. Tuples become lists. A
    field without a default is left out, unless it is a section. `__post_init__` is not called for
    `cls`, so a default of None remains None even if `__post_init__` would replace it.
    """
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if dataclasses.is_dataclass(hint := hints[field.name]):
            values[field.name] = plain_defaults(hint)  # type: ignore[arg-type]
        elif default is not dataclasses.MISSING:
            values[field.name] = plain(default)
    return values


def plain(value: Any) -> Any:
    """Return `value` with dataclasses as dicts and tuples as lists, for YAML and JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def flat(group: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as a flat dict with dotted names, such as "data.batch_size".

    Args:
        group: settings by name; nested groups are dicts.
        prefix: prefix of the names, such as "data.".

    Returns:
        The settings by dotted name.
    """
    names: dict[str, Any] = {}
    for key, value in group.items():
        name = f"{prefix}{key}"
        names |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return names


def one_line(error: Exception | str) -> str:
    """Return a message on one line, without control characters and with at most 1000 characters.

    A message may contain values that a user typed or that were read from an untrusted file.
    """
    text = " ".join(str(error).split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= 1000 else f"{text[:700]} ... {text[-290:]}"


def unknown_name(name: str, allowed: list[str], kind: str = "setting") -> str:
    """Return the error message for an unknown name, with the names to use instead.

    The message does not contain `name`, because an error also has it as its argument or value.

    Args:
        name: the unknown name.
        allowed: names that exist.
        kind: what the name stands for, as a noun for the message, such as "setting".

    Returns:
        One line. For a renamed setting, the line gives the new name. For any other name, it
        suggests up to three similar names. If no name is similar, it lists all allowed names, or
        only their sections if there are more than 20 of them. For a name with a dot, only the
        allowed names with a dot are used, if there are any.
    """
    if name in RENAMED:
        return f"unknown {kind}: it is now called {RENAMED[name]}"
    if "." in name:
        allowed = [other for other in allowed if "." in other] or allowed
    if near := difflib.get_close_matches(name, allowed, n=3, cutoff=0.6):
        return f"unknown {kind}: did you mean {' or '.join(near)}?"
    if len(allowed) > 20:
        allowed = list({re.sub(r"\..*", ".*", other) for other in allowed})
    return f"unknown {kind}: choose from {', '.join(sorted(allowed))}"


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Convert `value` to the type `hint`, or raise a UserError with the name of the setting.

    Whole floats are accepted for integers, so that budget.tokens=1e7 can be typed.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = [a for a in args if a is not type(None)]  # the only unions in use are `X | None`
        return _convert(value, inner, name)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise UserError(f"this is a group of settings: set {name}.<setting>", name, value)
        return build(hint, value, name)
    if origin is Literal:
        if value not in args:
            raise UserError(f"choose from {', '.join(map(str, args))}", name, value)
        return value
    if origin in (list, tuple):
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise UserError(f"expected a list, such as {shell_word(f'{name}=[a,b]')}", name, value)
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
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    raise UserError(f"expected {expected.get(hint, hint)}", name, value)
