"""Detect how the program was started, suggest commands in that form, and format errors."""

from __future__ import annotations

import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from minigpt.core.files import user_path
from minigpt.core.settings import MISSING, ModelClassError, UserError, one_line

PATH_SETTINGS = {
    "runs_dir", "resume", "init_from", "ckpt", "out", "data.tokenizer",
    "data.train_files", "data.valid_files", "data.dataset", "data.cache_dir",
}  # fmt: skip
# Settings that a config group determines, and the group that the user types instead.
OPTION_OF = {"data.source": "data", "optimizer.name": "optimizer", "logger.kind": "logger"}
# Setting that names the model class.
CLASS_PATH = {"train": "model.class_path=", "evaluate": "class_path="}


@dataclass(frozen=True)
class Program:
    """The program that the user typed: train.py, evaluate.py, or a verb of `minigpt`.

    Args:
        path: absolute path of the script that Python runs.
        words: the verb after the path, as a tuple; () for train.py or evaluate.py.
    """

    path: str
    words: tuple[str, ...]

    @classmethod
    def detect(cls, name: str) -> Program:
        """Return the program of this process; `name` is the verb that it runs."""
        path = os.path.abspath(sys.argv[0])
        return cls(path, () if Path(path).name in ("train.py", "evaluate.py") else (name,))

    @property
    def arguments(self) -> list[str]:
        """The arguments after the program and its verb."""
        return sys.argv[1 + len(self.words) :]

    def command(self, verb: str, /, **settings: Any) -> str:
        """Return a shell command that runs `verb` with `settings`.

        Args:
            verb: verb of `minigpt`.
            **settings: settings of train or evaluate; for other verbs, positional arguments.
        """
        if verb in ("train", "evaluate"):
            start = f"minigpt {verb}" if self.words else f"python {verb}.py"
            words = [f"{key}={hydra_value(value)}" for key, value in settings.items()]
        else:
            start, words = f"minigpt {verb}", [str(value) for value in settings.values()]
        return " ".join([start, *map(shlex.quote, words)])


def hydra_value(value: Any) -> str:
    """Return a plain value in the syntax of Hydra's command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(hydra_value, value))}]"
    if isinstance(value, str) and not re.fullmatch(r"[\w./:-]+", value, re.ASCII):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)


def quote_paths(word: str) -> str:
    """Return a typed setting with quotes around paths that Hydra could not parse otherwise.

    Such a path contains a character other than ASCII letters, digits and `_./:*?@%+=|-`. A leading
    ~ is expanded too, because Hydra itself creates runs_dir for a multirun and does not expand it.
    """
    key, _, value = word.partition("=")
    if key.lstrip("+") not in PATH_SETTINGS or re.search(r"[\"']|\$\{", value):
        return word
    is_list = value.startswith("[") and value.endswith("]")
    items = [item.strip() for item in (value[1:-1] if is_list else value).split(",")]
    if all(re.fullmatch(r"[\w./:*?@%+=|-]*", item, re.ASCII) for item in items):
        return word
    paths = [str(user_path(item, key)) if item.startswith("~") else item for item in items]
    quoted = ",".join(map(hydra_value, paths))
    return f"{key}=[{quoted}]" if is_list else f"{key}={quoted}"


def describe(error: UserError, program: Program, options: frozenset[str] = frozenset()) -> str:
    """Return one line for `error`: what is wrong, what is allowed, what to type instead.

    Args:
        error: an error that names arguments of the library.
        program: the program. Its settings and options replace the names of the arguments.
        options: names of the arguments that are options of the running verb, typed as --name.
    """

    def typed(name: str, value: Any) -> str:
        if name in options:
            option = f"--{name.replace('_', '-')}"
            return option if value is MISSING else f"{option} {value}"
        name = OPTION_OF.get(name, name)
        return name if value is MISSING else f"{name}={hydra_value(value)}"

    head = error.message
    if error.argument is not None and not isinstance(error, ModelClassError):
        head = f"{typed(error.argument, error.value)}: {head}"
    fixes = {name: typed(name, value) for name, value in error.fix.items()}
    steps = [fix if name in options else shlex.quote(fix) for name, fix in fixes.items()]
    if isinstance(error, ModelClassError):
        verb = program.words[0] if program.words else Path(program.path).stem
        steps.append(f"{CLASS_PATH.get(verb, '--class-path ')}{error.class_name}")
    if error.command is not None:
        verb, settings = error.command
        steps.append(program.command(verb, **settings))
    return one_line(f"{head}: type {' '.join(steps)}" if steps else head)


def leave(message: str, code: int = 2) -> NoReturn:
    """Print `message` as a one-line error and exit with `code`."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(code)
