"""Settings as text: print settings as key=value, split lists, and quote words for a shell.

A setting is typed as key=value. A value that is a text needs no quotes, with two exceptions. In a
list or a sweep, a text that contains a comma is quoted. A text that would have another meaning
without quotes, such as 'null', is also quoted. Quotes may be single or double.
`minigpt.cli.words` reads this form.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

_QUOTED = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
# An item is quoted, or extends to the next comma outside ${...} and brackets; \, is a comma.
_ITEM = re.compile(
    rf"\s*(?P<quoted>{_QUOTED})\s*(?=,|\Z)"
    r"|(?:\$\{[^}]*\}|\\,|\[(?:\[[^\[\]]*\]|[^\[\]])*\]|[^,])*",
    re.DOTALL,
)
_PLAIN = re.compile(r"""(?!null\Z)[^\s,"'\[\]{}\\$]([^,"'\[\]{}\\$]*[^\s,"'\[\]{}\\$])?""")


def is_quoted(text: str) -> bool:
    """Return whether the whole text is in single or double quotes."""
    return re.fullmatch(_QUOTED, text, re.DOTALL) is not None


def split_items(text: str) -> list[str]:
    r"""Return the items of a list, from the text between its brackets.

    Items are separated by commas. A comma belongs to an item if it is in brackets, in `${...}`,
    after a backslash, or in quotes that surround the whole item.

    Args:
        text: the items, such as `a, "b, c"`.

    Returns:
        The items without spaces around them; an item in quotes keeps its quotes. In an item without
        quotes, `\,` becomes a comma. Empty text gives one empty item.
    """
    items, start = [], 0
    while start <= len(text):
        match = _ITEM.match(text, start)
        assert match is not None  # the second alternative matches any text
        items.append(match["quoted"] or match[0].strip().replace("\\,", ","))
        start = match.end() + 1
    return items


def quoted(text: str) -> str:
    r"""Return a text in double quotes, with the escapes that Hydra's grammar needs.

    A double quote in the text gets a backslash before it. The backslashes of the text are doubled
    only before a double quote and at the end of the text. An interpolation,
    `${...}`, is not escaped and remains an interpolation.
    """
    text = re.sub(r'(\\*)"', r"\1\1\\" + '"', text)
    return '"' + re.sub(r"(\\+)\Z", r"\1\1", text) + '"'


def typed_value(value: Any) -> str:
    """Return a plain value as it is typed after `key=`.

    Args:
        value: None, a bool, a number, a text, or a list of these. In a text, `${` is escaped, so
            that Hydra does not read it as an interpolation.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(typed_value, value))}]"
    if not isinstance(value, str) or _PLAIN.fullmatch(value):
        return str(value)
    return quoted(re.sub(r"(\\*)\$\{", r"\1\1\\${", value))


def typed_settings(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as words of the form key=value, not quoted for a shell."""
    return [f"{key}={typed_value(value)}" for key, value in settings.items()]


def shell_word(text: str) -> str:
    r"""Return a text as one word of a command in bash or zsh, on one line.

    Args:
        text: the text. If it contains characters that are not printable, or bytes of a file name
            that are not UTF-8, the word has the form $'...'. In this form, these characters and
            bytes are written as hexadecimal escapes, \x..., and so are backslashes, single quotes
            and exclamation marks.
    """
    if text.isprintable():
        return f"'{text}'" if text.startswith("=") and "'" not in text else shlex.quote(text)
    characters = [
        c
        if c.isprintable() and c not in "\\'!"
        else "".join(f"\\x{byte:02x}" for byte in _bytes(c))
        for c in text
    ]
    return f"$'{''.join(characters)}'"


def _bytes(character: str) -> bytes:
    """Return the UTF-8 bytes of a character.

    If a byte in a file name is not valid UTF-8, Python represents it by a special character (PEP
    383). For such a character, return that byte.
    """
    escaped = "\udc80" <= character <= "\udcff"
    return character.encode("utf-8", "surrogateescape" if escaped else "surrogatepass")


def path_argument(path: str) -> str:
    """Return a path as a positional argument, with ./ before a path that begins with a dash.

    Without ./, such a path would be read as an option.
    """
    return f"./{path}" if path.startswith("-") else path


def verb_words(verb: str, settings: Mapping[str, Any]) -> list[str]:
    """Return the words after `minigpt` for a verb other than train and evaluate.

    Args:
        verb: verb of the command line, such as study.
        settings: settings by name. `class_path` and `out` become the options --class-path and
            --out; the other values are paths, which become positional arguments.
    """
    options = {"class_path": "--class-path", "out": "--out"}
    paths = [path_argument(str(path)) for name, path in settings.items() if name not in options]
    typed = [
        word
        for name, option in options.items()
        if settings.get(name) is not None
        for word in (option, str(settings[name]))
    ]
    return [verb, *paths, *typed]


def shell_command(*words: str) -> str:
    """Return a command line that bash and zsh split into `words`."""
    return " ".join(map(shell_word, words))
