"""How a program was started, and what it prints: commands to type next, errors in one line."""

from __future__ import annotations

import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from minigpt.core.settings import UserError, one_line


@dataclass(frozen=True)
class Program:
    """A program that was typed: train.py, evaluate.py, or a verb of `minigpt`.

    Args:
        path: what Python ran, absolute.
        words: the verb behind it, if any.
        scripts: whether it is a script of a checkout.
    """

    path: str
    words: tuple[str, ...]
    scripts: bool

    @classmethod
    def detect(cls, name: str) -> Program:
        """Return the program that this process is, which runs the verb `name`."""
        path = os.path.abspath(sys.argv[0])
        scripts = Path(path).name in ("train.py", "evaluate.py")
        return cls(path, () if scripts else (name,), scripts)

    @property
    def arguments(self) -> list[str]:
        """What was typed behind it."""
        return sys.argv[1 + len(self.words) :]

    def command(self, verb: str, /, **settings: Any) -> str:
        """Return the command line of a verb with `settings`, as a shell takes it."""
        if verb in ("train", "evaluate"):
            start = f"python {verb}.py" if self.scripts else f"minigpt {verb}"
            words = [f"{key}={hydra_value(value)}" for key, value in settings.items()]
        else:
            start, words = f"minigpt {verb}", [str(value) for value in settings.values()]
        return " ".join([start, *map(shlex.quote, words)])


def hydra_value(value: Any) -> str:
    """Return a plain value as Hydra reads it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(hydra_value, value))}]"
    if isinstance(value, str) and not re.fullmatch(r"[\w./:~-]+", value):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)


def describe(error: UserError, program: Program, options: frozenset[str] = frozenset()) -> str:
    """Return one line for `error`: what was wrong, what is allowed, what to type instead.

    Args:
        error: its arguments are named as the library has them.
        program: whose settings or options they are.
        options: names of arguments that are typed as --name of a verb.
    """
    from minigpt.core.settings import MISSING

    def named(argument: str) -> str:
        return f"--{argument.replace('_', '-')}" if argument in options else argument

    parts = []
    head = error.message
    if error.argument is not None:
        sign = " " if error.argument in options else "="
        value = "" if error.value is MISSING else f"{sign}{hydra_value(error.value)}"
        head = f"{named(error.argument)}{value}: {head}"
    parts.append(head)
    fixes = [
        f"{named(k)} {v}" if k in options else f"{k}={hydra_value(v)}" for k, v in error.fix.items()
    ]
    class_name = getattr(error, "class_name", None)
    if class_name is not None:
        fixes.append(_class_option(program, class_name))
    if fixes:
        parts.append(
            f"type {' '.join(map(shlex.quote, fixes)) if not options else ' '.join(fixes)}"
        )
    if error.command is not None:
        verb, settings = error.command
        parts.append(f"type {program.command(verb, **settings)}")
    return one_line(": ".join(parts[:2]) + "".join(f"; {part}" for part in parts[2:]))


def _class_option(program: Program, class_name: str) -> str:
    if program.words[:1] == ("train",) or Path(program.path).name == "train.py":
        return f"model.class_path={class_name}"
    if program.words[:1] == ("evaluate",) or Path(program.path).name == "evaluate.py":
        return f"class_path={class_name}"
    return f"--class-path {class_name}"


def leave(message: str) -> NoReturn:
    """Print `message` as an error, in one line, and exit with code 2."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)
