"""Detect how the user started the program, suggest commands of the same form, and format errors."""

from __future__ import annotations

import codecs
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from minigpt.core.settings import MISSING, ModelClassError, UserError, one_line, spell_step
from minigpt.core.typed import shell_command, shell_word, typed_settings, verb_words

# Settings that a config group determines, and the group that the user types instead.
OPTION_OF = {"data.source": "data", "optimizer.name": "optimizer", "logger.kind": "logger"}
# Settings that name a class: of the model, and of its teachers.
CLASS_SETTINGS = {
    "train": ("model.class_path", "teacher.class_path"),
    "evaluate": ("class_path",),
}


@dataclass(frozen=True)
class Program:
    """The program that the user typed: train.py, evaluate.py, or a verb of `minigpt`.

    Args:
        path: absolute path of the script that Python runs.
        words: the verb of `minigpt` as a tuple, such as ("train",); () for train.py or evaluate.py.
        script: the script as typed, such as train.py.
    """

    path: str
    words: tuple[str, ...]
    script: str

    @classmethod
    def detect(cls, name: str) -> Program:
        """Return the program that this process runs, as typed by the user.

        Args:
            name: the verb of `minigpt` that this process runs; "train" for train.py and "evaluate"
                for evaluate.py.
        """
        path = os.path.abspath(sys.argv[0])
        words = () if Path(path).name in ("train.py", "evaluate.py") else (name,)
        return cls(path, words, sys.argv[0])  # Hydra replaces sys.argv

    @property
    def arguments(self) -> list[str]:
        """The command-line arguments after the program and its verb (subcommand), if it has one."""
        return sys.argv[1 + len(self.words) :]

    def command(self, verb: str, /, *words: str, **settings: Any) -> str:
        """Return a command for bash and zsh that runs `verb`.

        The command uses the Python environment of this process. It must be typed in the working
        directory of this process.

        Args:
            verb: verb of `minigpt`.
            *words: settings as typed, for train or evaluate.
            **settings: settings by name; for verbs other than train and evaluate, as in
                `verb_words`.
        """
        if verb not in ("train", "evaluate"):
            return shell_command(*self._minigpt, *verb_words(verb, settings))
        if self.words:
            return shell_command(*self._minigpt, verb, *words, *typed_settings(settings))
        script = str(Path(self.script).with_name(f"{verb}.py"))
        return shell_command(*program_words("python"), script, *words, *typed_settings(settings))

    @property
    def _minigpt(self) -> list[str]:
        """The words of a shell command that start `minigpt`."""
        if Path(self.path).name == "__main__.py":
            return [*program_words("python"), "-m", "minigpt"]
        return program_words("minigpt")


def program_words(name: str) -> list[str]:
    """Return the first words of a shell command that starts the program `name`.

    The result depends on where the program is:

    - in this Python environment, and the shell finds it by its name: `name`;
    - in this Python environment, but the shell finds another program or none: the program's path;
    - not in this Python environment, but on the PATH: `name`;
    - in neither: `python -m` and `name`.

    For "python", the last two results would be another interpreter, or none. Instead, the result is
    the path of this interpreter.

    Args:
        name: name of the program, such as "python", "minigpt" or "wandb".
    """
    path, on_path = Path(sys.executable).with_name(name), shutil.which(name)
    if on_path is not None:
        same = Path(on_path).parent.resolve() == path.parent.resolve()  # also through links
        if same or (name != "python" and not path.exists()):
            return [name]
    if not path.exists():
        return [sys.executable] if name == "python" else [*program_words("python"), "-m", name]
    here = Path.cwd()
    return [str(path.relative_to(here) if path.is_relative_to(here) else path)]


def use_utf8() -> None:
    """Start this process again in Python's UTF-8 mode if the locale has only ASCII characters.

    Without this mode, Python cannot use other characters in arguments, paths and output.
    """
    ascii_only = codecs.lookup(sys.getfilesystemencoding()).name == "ascii"
    if ascii_only and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606


def names_class(word: str, name: str) -> bool:
    """Return whether `word` sets a model class, as model.class_path=mypackage.MyGPT does.

    Args:
        word: an argument as typed on the command line.
        name: the verb to which the argument belongs, train or evaluate.
    """
    return word.startswith(tuple(f"{setting}=" for setting in CLASS_SETTINGS[name]))


def describe(
    error: UserError,
    program: Program,
    options: frozenset[str] = frozenset(),
    positional: frozenset[str] = frozenset(),
) -> str:
    """Return one line for `error`: what is wrong, what is allowed, what to type instead.

    Args:
        error: an error that names arguments of the library.
        program: the program that runs. The names of its settings replace those of the arguments.
        options: names of the arguments that the user types as options, such as top_k for --top-k.
        positional: names of the arguments of which the user types only the value.
    """

    def typed(name: str, value: Any) -> str:
        if name in options:
            option = f"--{name.replace('_', '-')}"
            return option if value is MISSING else shell_command(option, str(value))
        if name in positional and value is not MISSING:
            values = value if isinstance(value, list | tuple) else [value]
            return shell_command(*map(str, values))
        name = OPTION_OF.get(name, name)
        return name if value is MISSING else typed_settings({name: value})[0]

    head = error.message
    if error.argument is not None and not isinstance(error, ModelClassError):
        head = f"{typed(error.argument, error.value)}: {head}"
    fixes = {name: typed(name, value) for name, value in error.fix.items()}
    steps = [fix if name in options else shell_word(fix) for name, fix in fixes.items()]
    if isinstance(error, ModelClassError):
        verb = program.words[0] if program.words else Path(program.path).stem
        names = [f"{name}=" for name in CLASS_SETTINGS.get(verb, ())] or ["--class-path "]
        steps.append(f"{names[error.argument == 'teacher']}{shell_word(error.class_name)}")
    if error.command is not None:
        steps.append(spell_step(program.command, *error.command))
    return f"{one_line(head)}: type {' '.join(steps)}" if steps else one_line(head)


def leave(message: str, code: int = 2) -> NoReturn:
    """Print `message` as a one-line error and exit with `code`."""
    text = message if message.isprintable() else one_line(message)  # spaces in commands stay
    print(f"error: {text}", file=sys.stderr)
    sys.exit(code)
