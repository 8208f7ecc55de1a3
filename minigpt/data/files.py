"""Read the stories of one file.

The file is read in chunks, so it may be larger than memory. UserError reports a damaged file, or a
file that is not in the format that its name says.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import itertools
import json
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from minigpt.core.files import parse_json
from minigpt.core.settings import UserError
from minigpt.core.typed import shell_word
from minigpt.data.formats import CHUNK, Format, detect_format, optional, unpack
from minigpt.tokenizer import END_OF_TEXT, utf8_length

Piece = tuple[str, bool]  # piece of a story, and whether it is the last piece of that story
Row = tuple[int, Any]  # number of a line, row or list item, and its value

_LONGEST = 64 << 20  # maximum length in characters of a line, field or list item held in memory
_PIECE = 1 << 20  # characters; a story of more than twice this length is split into pieces
_SPACE = re.compile(r"\s*")
# Where a long story may be cut, in order of preference: at a blank line, a line end, or a space.
_BREAKS = tuple(map(re.compile, (r"\n[ \t]*\n\s*", r"\n\s*", r"\s+")))
_BLANK = re.compile(r"^[^\S\n]+$", re.MULTILINE)
_BYTE_ORDER_MARK = "\ufeff"


def read_pieces(
    path: Path, separator: str = END_OF_TEXT, field: str | None = None
) -> Iterator[Piece]:
    """Yield the stories of one file; a story of more than two million characters comes in pieces.

    White space at both ends of a story is removed, and empty stories are skipped. Line ends become
    line feeds, and byte order marks are removed. Concatenating the pieces of a story gives the
    story. Long stories are cut at pre-token boundaries where possible. Memory use does not grow
    with the number of stories.

    Args:
        path: path of the file, which may be compressed. A .txt or .md file contains stories with a
            separator between them, or is one document. A .jsonl, .ndjson or .json file contains
            strings or objects. A .csv, .tsv or .parquet file contains a table.
        separator: separator between two stories in a .txt or .md file. If the separator contains a
            blank line, lines that contain only white space count as blank.
        field: column or key that holds the stories; None selects `text` if it exists, else `story`,
            else the only text column.

    Yields:
        A piece of a story, and whether it is the last piece of that story.

    Raises:
        UserError: the file is missing, damaged, not UTF-8, in an unknown format, or without
            stories, or the field does not exist.
    """
    file_format = detect_format(path)
    if file_format.kind == "text":
        pieces = _text_pieces(_decode(path, file_format), separator)
    else:
        pieces = _row_pieces(path, file_format, field)
    first = next(pieces, None)
    if first is None:
        raise UserError(f"{path} contains no story; leave the file out")
    yield first
    yield from pieces


def choose_field(
    where: str, names: Collection[str], texts: Collection[str], field: str | None
) -> str:
    """Return the name of the column that holds the stories.

    Args:
        where: name of the file or dataset for error messages; for JSON, it ends with the number of
            the line or item.
        names: names of all columns.
        texts: names of the columns that contain text.
        field: the requested column; None selects `text` if it exists, else `story`, else the only
            text column.

    Returns:
        The name of the column, which is in `names`.

    Raises:
        UserError: there is no such column, or the choice is ambiguous.
    """
    standard = [name for name in ("text", "story") if name in names]
    candidates = [field] if field is not None else standard[:1] or list(texts)
    if len(candidates) == 1 and candidates[0] in names:
        return candidates[0]
    wanted = "'text' or 'story'" if field is None else repr(field)
    problem = f"has no field {wanted}; its fields: {', '.join(names) or 'none'}"
    if len(candidates) > 1:
        problem = f"has several text fields: {', '.join(texts)}"
    fix = {"data.field": next(iter(texts))} if texts else None
    raise UserError(f"{where} {problem}", "data.field", fix=fix)


def clean(text: str) -> str:
    """Return `text` without white space at its ends and byte order marks, and with line feeds."""
    text = text.replace(_BYTE_ORDER_MARK, "")
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def find_cut(text: str, first: int, last: int, near: int) -> int:
    """Return the position at which to cut `text`: between `first` and `last`, close to `near`.

    A blank line is preferred to a line end, and a line end to a space. Among positions of the same
    kind, the closest to `near` is chosen. The cut is directly before the white-space character that
    precedes a word. This is a pre-token boundary, so cutting does not change the token ids of the
    text. If there is no such position between `first` and `last`, `near` is returned.

    Args:
        text: the text to cut.
        first: lower limit of the position, excluded.
        last: upper limit of the position, included.
        near: preferred position, from `first` to `last`.

    Returns:
        The position of the first character after the cut.
    """
    for pattern in _BREAKS:
        cuts = (match.end() - 1 for match in pattern.finditer(text, first + 1, last + 1))
        safe = [cut for cut in cuts if text[cut] in " \t\n" and text[cut + 1 : cut + 2].strip()]
        if safe:
            return min(safe, key=lambda cut: abs(cut - near))
    return near


def _split_long(text: str) -> list[str]:
    """Split `text` into pieces.

    The last piece has at most 2 · `_PIECE` characters, and every other piece at most `_PIECE`.
    """
    start, pieces = 0, []
    while len(text) - start > 2 * _PIECE:
        end = start + _PIECE
        cut = find_cut(text, start + _PIECE // 2, end, end)
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def _text_pieces(chunks: Iterable[str], separator: str) -> Iterator[Piece]:
    if "\n\n" in separator:
        chunks = _empty_blank_lines(chunks)
    # `begun`: whether a piece of the story in `rest` was already yielded; `new` follows `rest`
    rest, begun, new = "", False, [""]
    for chunk in itertools.chain(chunks, [None]):
        if chunk is not None:
            new.append(chunk)
            if 2 * sum(map(len, new)) < len(rest):  # a document would be copied for each chunk
                continue
        *stories, rest = "".join([rest, *new]).split(separator) + [""] * (chunk is None)
        new.clear()
        for story in stories:
            *parts, last = _split_long(story.rstrip() if begun else story.strip())
            yield from ((part, False) for part in parts)
            if begun or last:
                yield last, True
            begun = False
        *parts, rest = _split_long(rest if begun else rest.lstrip())
        yield from ((part, False) for part in parts)
        begun = begun or bool(parts)


def _empty_blank_lines(chunks: Iterable[str]) -> Iterator[str]:
    rest = ""
    for chunk in chunks:
        lines, end, rest = (rest + chunk).rpartition("\n")
        yield _BLANK.sub("", lines) + end
        if len(rest) > _PIECE:  # too long to be a blank line or to be held in memory
            yield rest
            rest = ""
    yield _BLANK.sub("", rest)


def _row_pieces(path: Path, file_format: Format, field: str | None) -> Iterator[Piece]:
    kind = file_format.kind
    if kind == "parquet":
        rows = _parquet_rows(path, file_format, field)
    else:
        chunks = _decode(path, file_format)
        if kind == "json":
            rows = _objects(f"{path}, item", _json_items(path, chunks), field)
        elif kind == "jsonl":
            rows = _objects(f"{path}, line", _json_lines(path, chunks), field)
        else:
            rows = _table_rows(path, chunks, kind, field)
    for number, value in rows:
        if value is None:  # a missing value
            continue
        try:
            if not isinstance(value, str):
                raise ValueError(f"write the story as a string, not as {value!r:.100}")
            utf8_length(value)  # JSON can contain a lone surrogate, UTF-8 cannot
        except ValueError as error:
            unit = {"json": "item", "parquet": "row"}.get(kind, "line")
            raise UserError(f"{path}, {unit} {number}: {error}") from None
        if story := clean(value):
            *parts, last = _split_long(story)
            yield from ((part, False) for part in parts)
            yield last, True


def _objects(where: str, values: Iterable[Row], field: str | None) -> Iterator[Row]:
    """Yield the story in each JSON value, with the number of the line or list item.

    If the value is an object, the story is one of its fields, else the story is the value itself.
    Error messages begin with `where` and the number.
    """
    for number, value in values:
        if isinstance(value, dict):
            texts = [name for name, entry in value.items() if isinstance(entry, str)]
            name = choose_field(f"{where} {number}", value, texts, field)
            if name not in ("text", "story"):
                field = name  # it was the only text column: later objects must have it too
            value = value[name]
        yield number, value


def _json_lines(path: Path, chunks: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(_lines(path, chunks), start=1):
        if line.strip():
            try:
                value = parse_json(line)
                line = ""  # it may be long
                yield number, value
            except ValueError as error:
                example = '{"text": "Once upon a time ..."}'
                reason = str(error).replace(": line 1 column", " at column")
                problem = f"{path}, line {number}: {reason}"
                raise UserError(f"{problem}; write JSON such as {example}") from None


def _json_items(path: Path, chunks: Iterable[str]) -> Iterator[Row]:
    """Yield the number (from 1) and the value of each item of a JSON list, read in chunks."""
    decode, number, marks = json.JSONDecoder().raw_decode, 0, "["
    parts, enough = [], 0  # the text to parse, and the length from which a long item is tried again
    for chunk in itertools.chain(chunks, [""]):
        parts.append(chunk)
        if chunk and sum(map(len, parts)) < enough:
            continue
        text, at, enough = "".join(parts), 0, 0
        while (start := _skip_space(text, at)) < len(text):
            item, begin = f"{path}, item {number + 1}", _skip_space(text, start + 1)
            if text[start] not in (marks or " "):
                expected = " or ".join(map(repr, marks)) or "nothing more"
                problem = f"{item}: expected {expected}, got {text[start]!r}"
                raise UserError(f"{problem}; write a JSON list, or rename the file to .jsonl")
            if text[start] == "]" or (number == 0 and text[begin : begin + 1] == "]"):
                at, marks = (start if text[start] == "]" else begin) + 1, ""
                continue
            try:
                value, end = decode(text, begin)
            except (ValueError, RecursionError) as error:
                if chunk and len(text) - begin <= _LONGEST:
                    enough = min(2 * (len(text) - at), _LONGEST)
                    break  # the rest of the item may follow
                reason = getattr(error, "msg", str(error))
                raise UserError(f"{item} is not valid JSON ({reason}); correct it") from None
            if chunk and end == len(text):
                break  # the next digit of a number may follow
            at, number, marks = end, number + 1, ",]"
            yield number, value
        parts = [text[at:]]
    if marks:
        raise UserError(f"{path} is truncated after item {number}; copy it again")


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _table_rows(path: Path, chunks: Iterable[str], kind: str, field: str | None) -> Iterator[Row]:
    """Yield the line number and the story of each row of a .csv or .tsv file; skip blank rows."""
    csv.field_size_limit(_LONGEST)
    lines = map("{}\n".format, _lines(path, chunks))  # holds no line, which may be long
    n_blank = 0  # lines before the header
    for header in lines:
        if header.strip():
            break
        n_blank += 1
    else:
        return
    delimiter = "\t" if kind == "tsv" else max(",;\t", key=header.count)
    rows = csv.reader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
    begin = 1  # first line of the row
    try:
        names = [name.strip() for name in next(rows)]
        column = names.index(choose_field(str(path), names, names, field))
        begin = rows.line_num + 1
        for row in rows:
            if any(map(str.strip, row)):
                if len(row) != len(names):
                    raise csv.Error(f"{len(row)} columns, but the first row has {len(names)}")
                yield n_blank + begin, row[column]
            begin = rows.line_num + 1
    except csv.Error as error:
        problem = f"{path}, line {n_blank + begin}: {error}"
        remedy = (
            f"put double quotes around fields that contain {delimiter!r}, a quote or a line break"
        )
        raise UserError(f"{problem}; {remedy}") from None


def _parquet_rows(path: Path, file_format: Format, field: str | None) -> Iterator[Row]:
    parquet = optional("pyarrow.parquet", "Parquet")
    number = 0
    with contextlib.ExitStack() as stack:
        source: Any = path
        if file_format.packing:  # decompress to a file, because Parquet's index is at the end
            source = stack.enter_context(tempfile.TemporaryFile())
            source.writelines(unpack(path, file_format.packing))
        try:
            file = parquet.ParquetFile(source, buffer_size=CHUNK, pre_buffer=False)
            stack.enter_context(file)
            schema = file.schema_arrow
            strings = ("string", "large_string", "dictionary<values=string")
            texts = [c.name for c in schema if str(c.type).startswith(strings)]
            name = choose_field(str(path), schema.names, texts, field)
            # Few rows at a time: all rows of a small file may refer to one long text.
            for batch in file.iter_batches(128, columns=[name]):
                for value in batch.column(0):
                    number += 1
                    yield number, value.as_py()
        except UserError:
            raise
        except (OSError, ValueError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise UserError(f"cannot read {path}: {error.strerror}") from None
            reason, *_ = str(error).splitlines() or ["unreadable"]
            problem = f"{path} is damaged after row {number} ({reason}); copy it again"
            raise UserError(problem) from None


def _lines(path: Path, chunks: Iterable[str]) -> Iterator[str]:
    number, parts = 1, [""]  # the line that is read; it is joined once, because it may be long
    for chunk in chunks:
        *lines, rest = chunk.split("\n")
        if lines:
            number += len(lines)
            parts = ["".join([*parts, lines[0]])]
            yield parts.pop()
            yield from lines[1:]
        parts.append(rest)
        if sum(map(len, parts)) > _LONGEST:
            raise UserError(f"{path}, line {number} is longer than 64 MiB; write a story per line")
    yield "".join(parts)


def _decode(path: Path, file_format: Format) -> Iterator[str]:
    """Yield the text of a UTF-8 file in chunks.

    Byte order marks are removed, and line ends become line feeds.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    offset, line = 0, 1
    for chunk in itertools.chain(unpack(path, file_format.packing), [b""]):
        wide = _wide_encoding(chunk) if offset == 0 else None
        if not wide and (at := chunk.find(b"\0")) >= 0:
            line += chunk.count(b"\n", 0, at)
            where = f"a NUL byte at offset {offset + at}, line {line}"
            raise UserError(f"{path} is binary, not text ({where}); leave it out")
        if wide:
            raise _not_utf8(path, file_format, f"line 1 is {wide}", wide)
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            # error.object may begin with bytes of the previous chunk, but ends where `chunk` ends.
            at = offset + len(chunk) - len(error.object) + error.start
            line += error.object.count(b"\n", 0, error.start)
            where = f"byte 0x{error.object[error.start]:02x} at offset {at}, line {line}"
            cut = error.reason == "unexpected end of data"
            raise _not_utf8(path, file_format, where, None, cut) from None
        offset += len(chunk)
        line += chunk.count(b"\n")
        if text := text.replace(_BYTE_ORDER_MARK, ""):
            yield text


def _not_utf8(
    path: Path, file_format: Format, where: str, encoding: str | None, is_cut: bool = False
) -> UserError:
    """Return the error for a file that is not UTF-8, with the command that converts the file.

    Args:
        path: path of the file.
        file_format: format and compression of the file.
        where: the first byte that is not UTF-8.
        encoding: encoding of the file; None if it is not known.
        is_cut: whether the file ends within a character.
    """
    remedy = f"convert it with iconv -f {encoding} -t UTF-8"
    if encoding is None:
        remedy = "convert it from its encoding, such as WINDOWS-1252: "
        remedy += "iconv -f WINDOWS-1252 -t UTF-8"
    if file_format.packing:
        remedy = f"decompress it, then {remedy}"
    else:
        remedy += f" {shell_word(str(path))} > {shell_word(f'{path}.utf8{path.suffix}')}"
    if is_cut:
        remedy = f"copy it again if it is truncated, or {remedy}"
    return UserError(f"{path} is not UTF-8 ({where}); {remedy}")


def _wide_encoding(start: bytes) -> str | None:
    """Return the name of the encoding if a text starts in UTF-32 or UTF-16, else None.

    A text in UTF-16 without a byte order mark is recognised by its Latin letters: nearly every
    second byte is 0.
    """
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    low, high = start[:400:2], start[1:400:2]
    for name, zeros, letters in (("UTF-16LE", high, low), ("UTF-16BE", low, high)):
        if zeros.count(0) > 0.9 * len(zeros) > 0 and letters.count(0) == 0:
            return name
    return None
