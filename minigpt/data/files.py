"""Read the stories of one file, which may be larger than memory, damaged, or not what it says."""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from minigpt.core.files import parse_json
from minigpt.core.settings import UserError
from minigpt.tokenizer import END_OF_TEXT, utf8_length

_CHUNK = 1 << 20  # bytes read at a time
_LONGEST = 64 << 20  # characters a story may have; what keeps memory bounded without a separator
# A packed file may unpack to so many bytes, or times its size, whichever is more: English packs to
# a fifth, a story that repeats to a hundredth, and a file made to fill a disk to a thousandth.
_UNPACKED, _UNPACKED_TIMES = 64 << 20, 200


def read_stories(path: Path, separator: str = END_OF_TEXT) -> Iterator[str]:
    """Yield the stories of one file: stripped, never empty, with `\\n` line ends.

    Args:
        path: .txt (stories divided by `separator`) or .jsonl (one story a line: a string, or an
            object with its text under "story" or "text"); either may be packed, .xz or .gz.
        separator: what stands between two stories of a text file.

    Raises:
        UserError: the file is missing, damaged, not UTF-8, or not in the form described above.
    """
    stories = _json_stories(path) if is_jsonl(path) else _text_stories(path, separator)
    empty = True
    for story in stories:
        if story := story.strip():
            empty = False
            yield story
    if empty:
        raise UserError(f"{path} has no story in it; leave it out")


def is_jsonl(path: Path) -> bool:
    """Return whether a file holds JSON lines, by its name.

    Raises:
        UserError: it is neither JSON lines nor text.
    """
    name = path.name.lower()
    unpacked = name.removesuffix(".xz").removesuffix(".gz")
    if unpacked == name and not name.endswith((".txt", ".jsonl")):
        raise UserError(f"{path}: cannot read {path.suffix!r} files; convert to .txt or .jsonl")
    return unpacked.endswith(".jsonl")


def _text_stories(path: Path, separator: str) -> Iterator[str]:
    remedy = f"put a line {END_OF_TEXT} after each story, or set data.separator"
    too_long = UserError(f"{path}: 64 MB without {separator!r} are no story; {remedy}")
    pieces = _split(_decode(path), separator, too_long)
    # Two pieces before the first story goes out: a file without a separator is not one long story.
    first, second = next(pieces), next(pieces, None)
    if second is not None:
        yield from itertools.chain((first, second), pieces)
    elif first.strip():
        raise UserError(f"{path}: there is no {separator!r} between stories; {remedy}")


def _json_stories(path: Path) -> Iterator[str]:
    too_long = UserError(f"{path}: a line is longer than 64 MB; write one story a line")
    for number, line in enumerate(_split(_decode(path), "\n", too_long), start=1):
        if not line.strip():
            continue
        value: Any = None
        try:
            value = parse_json(line)
            if isinstance(value, dict):
                value = value["story" if "story" in value else "text"]
            if not isinstance(value, str):
                raise ValueError("not a text")
            utf8_length(value)  # JSON can spell half a surrogate pair, UTF-8 cannot
        except KeyError:
            keys = ", ".join(value) or "none"
            raise UserError(f"{path}:{number}: no key 'story' or 'text', only {keys}") from None
        except ValueError as error:
            example = '{"text": "Once upon a time ..."}'
            raise UserError(f"{path}:{number}: {error}; write JSON such as {example}") from None
        yield value


def _split(chunks: Iterable[str], separator: str, too_long: UserError) -> Iterator[str]:
    """Yield what stands between separators, at least one piece; `too_long` is raised past 64 MB."""
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(separator)
        yield from whole
        if len(rest) > _LONGEST:
            raise too_long
    yield rest


def _decode(path: Path) -> Iterator[str]:
    """Yield the text of a UTF-8 file in chunks, without byte order mark, with `\\n` line ends."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    offset = 0
    for chunk in itertools.chain(_unpack(path), [b""]):
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            # error.object also holds bytes kept from the chunk before: count from its end.
            at = offset + len(chunk) - len(error.object) + error.start
            utf16 = offset == 0 and chunk[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            convert = f"iconv -f {'UTF-16' if utf16 else 'WINDOWS-1252'} -t UTF-8"
            byte = f"byte 0x{error.object[error.start]:02x} at offset {at}"
            raise UserError(f"{path} is not UTF-8 ({byte}); save it as such by {convert}") from None
        offset += len(chunk)
        yield text


def _unpack(path: Path) -> Iterator[bytes]:
    openers: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
    opener = openers.get(path.suffix.lower(), open)
    try:
        most = max(_UNPACKED, _UNPACKED_TIMES * path.stat().st_size)
        with opener(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                most -= len(chunk)
                if most < 0 and opener is not open:
                    large = f"unpacks to more than {_UNPACKED_TIMES} times its size"
                    raise UserError(f"{path} {large}; unpack it yourself if you trust it")
                yield chunk
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        problem = f"{path} is damaged or truncated ({error})"
        raise UserError(f"{problem}; copy or download it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
