r"""Read the words of a command line, and write settings in Hydra's grammar.

A setting of type `str` is called a text setting. Its value is taken literally: `name=3.10` sets the
name 3.10, and `name=It's (1)` sets the name It's (1). There are four exceptions: `null` means None,
`${...}` refers to another setting, `\${` stands for the characters `${`, and a leading `~` of
`runs_dir` and `hydra.sweep.dir` is replaced with the home folder. Quotes around the whole value
mark a text that would otherwise have another meaning: `name='null'` sets the name null. The items
of a list of texts are read in the same way. Hydra reads the values of all other settings.
"""

from __future__ import annotations

import functools
import itertools
import re
import types
import typing
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import parse

from minigpt.core.files import user_path
from minigpt.core.settings import UserError
from minigpt.core.typed import is_quoted, quoted, shell_word, split_items

# Hydra's own options. Everything else on the command line is a setting.
HYDRA_FLAGS = {
    "--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run",
    "--multirun", "--shell-completion", "--config-path", "--config-name", "--config-dir",
    "--experimental-rerun", "--info",
}  # fmt: skip
_FOLDERS = ("runs_dir", "hydra.sweep.dir", "hydra.run.dir")
_SWEEP = re.compile(r"(choice|glob|interval|range|shuffle|sort|tag)\(.*\)", re.DOTALL)


def without_dashes(arguments: Sequence[str]) -> list[str]:
    """Return the arguments, with each --key=value replaced by key=value.

    The agent of a W&B sweep writes settings with dashes.

    Raises:
        UserError: a word with two dashes is neither --key=value nor an option of Hydra; a setting
            has a single dash; or a setting is followed by a word that is neither a setting nor an
            option, such as the second word of a value with spaces.
    """
    words = [word.removeprefix("--") if _is_dashed(word) else word for word in arguments]
    for index, (word, following) in enumerate(pairwise([*words, ""])):
        flag, equals, value = word.partition("=")
        is_long = flag.startswith("--")
        if flag not in HYDRA_FLAGS if is_long else flag.startswith("-") and equals:
            value = value if equals else following
            typed = f"{flag.lstrip('-')}={value or '<value>'}"
            raise UserError(f"settings are typed as key=value: type {typed}, not {word}")
        if equals and not flag.startswith(("-", "~")) and _is_stray(following):
            rest = itertools.takewhile(_is_stray, words[index + 1 :])
            whole = shell_word(" ".join([word, *rest]))
            problem = f"{following} does not have the form key=value"
            raise UserError(f"{problem}; if it belongs to the setting before it, type {whole}")
    return words


def _is_dashed(word: str) -> bool:
    """Return whether the word is --key=value, but not an option of Hydra."""
    flag, equals, _ = word.partition("=")
    return word.startswith("--") and equals == "=" and flag not in HYDRA_FLAGS


def _is_stray(word: str) -> bool:
    """Return whether the word is not empty and is not a setting, a deletion (~key) or an option."""
    return word != "" and "=" not in word and not word.startswith(("-", "~"))


def is_sweep(words: Sequence[str]) -> bool:
    """Return whether the command line asks for a sweep (-m), which starts several runs."""
    return any(word in ("-m", "--multirun", "hydra.mode=MULTIRUN") for word in words)


def hydra_word(word: str, hints: Mapping[str, Any], sweep: bool) -> str:
    """Convert a word of the command line to Hydra's grammar.

    Args:
        word: the word as typed. Only a setting is converted. An option, or a deletion such as ~key,
            is returned unchanged.
        hints: type of each setting by dotted name.
        sweep: whether the command line asks for a sweep, in which commas separate several values.

    Raises:
        UserError: commas separate several values, but the values are not in brackets and `sweep` is
            false; a list has an empty item; or a reference `${...}` is wrong.
    """
    key, equals, text = word.partition("=")
    if key == "--config-dir" and text.startswith("~"):
        return f"{key}={user_path(text, 'config-dir')}"
    if not equals or word.startswith(("-", "~")):
        return word
    name = key.lstrip("+")
    if name in _FOLDERS and text.startswith("~"):  # Hydra would not expand it
        text = str(user_path(text, name))
        word = f"{key}={text}"
    depth = _text_depth(hints.get(name))
    if depth is None:
        return _other_word(word, sweep)
    if not sweep:
        return f"{key}={_value(name, text, depth)}"
    if _SWEEP.fullmatch(text):
        return word
    return f"{key}={','.join(_value(name, item, depth) for item in split_items(text))}"


def _text_depth(hint: Any) -> int | None:
    """Return 0 for `str`, 1 for a list or tuple of `str`, and so on; None for other types.

    An optional type, such as `str | None`, counts as the type without None.
    """
    arguments = [one for one in typing.get_args(hint) if one is not types.NoneType]
    if hint is str:
        return 0
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _text_depth(arguments[0])
    if typing.get_origin(hint) not in (list, tuple):
        return None
    inner = _text_depth(arguments[0])
    return None if inner is None else inner + 1


def _value(name: str, text: str, depth: int) -> str:
    """Convert the typed value of a text setting to Hydra's grammar, and return it.

    Args:
        name: name of the setting, for errors.
        text: the value as typed.
        depth: 0 for a text, 1 for a list of texts, 2 for a list of lists of texts.
    """
    if text == "null" or is_quoted(text) or depth == 0:
        return text if text == "null" else _text(name, text)
    is_list = text.startswith("[") and text.endswith("]")
    items = split_items(text[1:-1] if is_list else text)
    if is_list and items == [""]:
        return "[]"
    if len(items) > 1 and "" in items:
        filled = [item[1:-1] if is_quoted(item) else item for item in items if item]
        raise UserError("an item of the list is empty", name, text, {name: filled})
    if is_list and depth > 1:
        return f"[{','.join(_value(name, item, depth - 1) for item in items)}]"
    if len(items) > 1 and not is_list:
        problem = "a list of several items needs brackets, as in [a,b]; for one item with commas"
        raise UserError(problem, name, text, {name: [text]})
    texts = [_text(name, item) for item in items]
    return f"[{','.join(texts)}]" if is_list else texts[0]


def _text(name: str, text: str) -> str:
    r"""Return a text in Hydra's grammar, in quotes if Hydra would change it.

    Two forms are kept as typed: `${...}`, which refers to another setting, and `\${`, which stands
    for the characters `${`.
    """
    if "${" in text:
        try:
            parse(text)
        except OmegaConfBaseException:
            problem = r"${...} refers to another setting; for the characters ${ themselves"
            raise UserError(problem, name, text, {name: text}) from None
    return text if is_quoted(text) or _parsed(text) == text else quoted(text)


def _other_word(word: str, sweep: bool) -> str:
    """Convert `word`, a setting whose type is not text, to Hydra's grammar.

    A value that Hydra cannot read is quoted, which makes it a text. The setting does not accept a
    text, so a later error names the setting and its type.
    """
    key, _, text = word.partition("=")
    try:
        override: Override = _parser().parse_override(word)
    except HydraException:
        return f"{key}={quoted(text)}"
    if override.is_sweep_override() and not sweep:
        remedy = "type one of them, or add -m for one run per value"
        raise UserError(f"{word} has several values: {remedy}")
    return word


def _parsed(text: str) -> Any:
    """Return the value that Hydra reads from `text`; None if Hydra raises an error.

    Hydra may read only the beginning of `text`, without an error.
    """
    try:
        return _parser().parse_rule(text, "element")
    except HydraException:
        return None


@functools.cache
def _parser() -> OverridesParser:
    return OverridesParser.create()
