import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minigpt.core.settings import UserError
from minigpt.data import files, formats
from minigpt.data.files import find_cut, read_pieces
from minigpt.tokenizer import END_OF_TEXT, Tokenizer
from tests.conftest import naming

STORIES = ["Tim had a ball.\nIt was red.", "Mia saw a bird — «oh!»", "The end 🐦."]
TEXT = f"\n{END_OF_TEXT}\n".join(STORIES)


def write(path: Path, text: str = TEXT) -> Path:
    path.write_bytes(text.encode())
    return path


def read_stories(path: Path, *args: Any) -> list[str]:
    """Return the stories of a file, whose pieces are joined."""
    stories, pieces = [], []
    for text, ends in read_pieces(path, *args):
        pieces.append(text)
        if ends:
            stories.append("".join(pieces))
            pieces = []
    assert not pieces
    return stories


def zst(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zst,
}


def packed(name: str, content: bytes) -> bytes:
    return PACKINGS.get(Path(name).suffix.lower(), bytes)(content)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.xz", "a.xz", "a.gz", "A.TXT.GZ", "a.zst"])
def test_text_reads_the_same_packed_or_not_with_any_line_ends(tmp_path, name):
    windows = ("\ufeff" + TEXT + f"\n{END_OF_TEXT}\n \n{END_OF_TEXT}\n").replace("\n", "\r\n")
    (tmp_path / name).write_bytes(packed(name, windows.encode()))
    assert read_stories(tmp_path / name) == STORIES


def table(delimiter: str, column: str = "text", **more: Any) -> bytes:
    out = io.StringIO()
    rows = csv.writer(out, delimiter=delimiter, **more)
    rows.writerow(["id", column, "note"])
    rows.writerows([n, story, ""] for n, story in enumerate(STORIES))
    return out.getvalue().encode()


def parquet(column: str = "text", stories: list[str | None] = [*STORIES], **more: Any) -> bytes:  # noqa: B006
    sink = pa.BufferOutputStream()
    numbers = list(range(len(stories)))
    pq.write_table(pa.table({"id": numbers, column: pa.array(stories, pa.string()), **more}), sink)
    return sink.getvalue().to_pybytes()


OBJECTS = [{"id": n, "text": story} for n, story in enumerate(STORIES)]
FORMATS = {
    "a.jsonl": "\r\n\r\n".join(map(json.dumps, OBJECTS)).encode(),
    "a.ndjson": "\n".join(json.dumps(story, ensure_ascii=False) for story in STORIES).encode(),
    "a.json": json.dumps(OBJECTS, indent=2).encode(),
    "b.json": json.dumps(STORIES).encode(),
    "a.csv": b"\xef\xbb\xbf" + table(","),
    "b.csv": table(";"),
    "a.tsv": table("\t"),
    "a.parquet": parquet(),
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", FORMATS)
def test_each_format_holds_the_same_stories_packed_or_not(tmp_path, name, packing):
    path = tmp_path / f"{name}{packing}"
    path.write_bytes(packed(path.name, FORMATS[name]))
    assert read_stories(path) == STORIES


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "a.jsonl",
            "\n".join(json.dumps({"n": 1, "body": s, "tags": []}) for s in STORIES).encode(),
        ),
        ("a.json", json.dumps([{"body": s, "n": None} for s in STORIES]).encode()),
        ("a.parquet", parquet("body")),
        ("a.csv", b'body\n"' + b'"\n"'.join(s.encode() for s in STORIES) + b'"'),
    ],
)
def test_the_only_field_of_text_is_read_and_a_wrong_field_lists_them(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_stories(tmp_path / name) == STORIES
    assert read_stories(tmp_path / name, END_OF_TEXT, "body") == STORIES
    with pytest.raises(UserError, match=naming("data.field", "nope", "body")):
        read_stories(tmp_path / name, END_OF_TEXT, "nope")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"title": "A", "body": "B"}'),
        ("a.json", b'[{"title": "A", "body": "B"}]'),
        ("a.csv", b"title,body\nA,B"),
        ("a.parquet", parquet("title", ["A"], body=["B"])),
    ],
)
def test_several_fields_of_text_are_listed_and_one_can_be_chosen(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=naming(name, "title", "body", "data.field")):
        read_stories(tmp_path / name)
    assert read_stories(tmp_path / name, END_OF_TEXT, "body") == ["B"]


def test_text_comes_before_story_and_values_may_lack(tmp_path):
    lines = [{"story": "no", "text": "a"}, {"story": "b"}, {"text": None}, "c", {"text": " \n"}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    assert read_stories(path) == ["a", "b", "c"]
    (tmp_path / "a.parquet").write_bytes(parquet("text", ["a", None, "b"]))
    assert read_stories(tmp_path / "a.parquet") == ["a", "b"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["a.txt", *FORMATS])
def test_chunk_borders_in_characters_separators_and_line_ends_change_nothing(
    tmp_path, monkeypatch, chunk, name
):
    content = FORMATS.get(name, TEXT.replace("\n", "\r\n").encode())
    (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(formats, "CHUNK", chunk)
    assert read_stories(tmp_path / name) == STORIES


def test_another_separator_and_a_story_larger_than_the_chunk(tmp_path):
    long = "x" * (3 << 20)
    path = write(tmp_path / "a.txt", f"{long}\n\n\n\nshort")
    assert read_stories(path, "\n\n") == [long, "short"]
    assert len(list(read_pieces(path, "\n\n"))) == 3


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_empty_lines_that_hold_spaces_separate_too(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(formats, "CHUNK", chunk)
    path = write(tmp_path / "a.txt", "\ufeffOne\r\nline.\r\n \t\r\n\ufeffTwo.\n\xa0\nThree.\xa0")
    assert read_stories(path, "\n\n") == ["One\nline.", "Two.", "Three."]


def test_blank_rows_of_a_table_are_no_rows(tmp_path):
    content = "\n \nid,text\n\n1,One.\n , \n \n2,Two.\n"
    assert read_stories(write(tmp_path / "a.csv", content)) == ["One.", "Two."]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_byte_order_marks_in_values_are_removed(tmp_path, name):
    story = "\ufeffOne \ufeffstory."
    content = parquet("text", [story]) if name == "a.parquet" else json.dumps(story).encode()
    (tmp_path / name).write_bytes(content)
    assert read_stories(tmp_path / name) == ["One story."]


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.parquet"])
def test_line_ends_of_other_systems_inside_a_value_are_ours(tmp_path, name):
    story = "One\r\ntwo\rthree"
    contents = {
        "a.csv": f'text\r\n"{story}"\r\n'.encode(),
        "a.json": json.dumps([story]).encode(),
        "a.parquet": parquet("text", [story]),
    }
    (tmp_path / name).write_bytes(contents[name])
    assert read_stories(tmp_path / name) == ["One\ntwo\nthree"]


WHITE_SPACE = [
    "\n\n", "\n \n", "\n\n\n", " \n\n    ", "\n\n\xa0", "\n\n\x1c", "\n\n\u3000", "  \n",
    "\n\t\n\t", "\n", "  ", "\n\xa0\n", " ", "\x1c\n",
]  # fmt: skip


@pytest.mark.parametrize("chunk", [97, 1 << 20])
@pytest.mark.parametrize("piece", [60, 1000])
def test_pieces_of_a_book_are_the_book_and_have_its_ids(tmp_path, monkeypatch, piece, chunk):
    monkeypatch.setattr(files, "_PIECE", piece)
    monkeypatch.setattr(formats, "CHUNK", chunk)
    words = ["It's", "Tim", "sang:", "12", "—", "birds", "'s", "🐦", "über"]
    book = "".join(
        words[n * n % 9] + WHITE_SPACE[n * n * n % len(WHITE_SPACE)] for n in range(3000)
    ).strip()
    pieces = list(read_pieces(write(tmp_path / "book.txt", f"\n{book}\n \n")))
    assert "".join(text for text, _ in pieces) == book
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces) > 5
    tokenizer = Tokenizer.train([book], 300)
    ids = [id for text, _ in pieces for id in tokenizer.encode(text)]
    assert ids == tokenizer.encode(book)
    assert [
        id for text, _ in pieces for id in tokenizer.encode_stories([text])[:-1].tolist()
    ] == ids


def test_a_long_text_is_cut_at_blank_lines_else_line_ends_else_spaces_else_anywhere():
    assert find_cut("one two\nthree four\n\nfive six", 0, 30, 10) == 19
    assert find_cut("one two\nthree four five six", 0, 27, 15) == 7
    assert find_cut("one two three", 0, 13, 6) == 7
    assert find_cut("oneandonly", 0, 10, 6) == 6


def test_a_line_that_would_fill_memory_is_given_up_on(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "CHUNK", 100)
    monkeypatch.setattr(files, "_LONGEST", 1000)
    for name, content in {
        "a.jsonl": '"' + "x" * 5000 + '"',
        "a.json": '["' + "x" * 5000 + '"]',
        "a.csv": "text\n" + "x" * 5000,
        "b.csv": 'text\n"' + "x\n" * 5000,
    }.items():
        with pytest.raises(UserError, match=naming(name)):
            read_stories(write(tmp_path / name, content))


def archive(kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as file:
            file.writestr("a.txt", TEXT)
    elif kind == "npy":
        np.save(out, np.arange(3))
    else:
        with tarfile.open(fileobj=out, mode="w") as file:
            info = tarfile.TarInfo("a.txt")
            info.size = len(TEXT.encode())
            file.addfile(info, io.BytesIO(TEXT.encode()))
    return out.getvalue()


PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
FOREIGN = {
    "a.zip": (archive("zip"), "zip archive"),
    "zip.txt": (archive("zip"), "zip archive"),
    "a.tar": (archive("tar"), "tar archive"),
    "a.tar.gz": (gzip.compress(archive("tar")), "tar archive"),
    "a.tar.zst": (zst(archive("tar")), "tar archive"),
    "a.tgz": (gzip.compress(archive("tar")), "tar archive"),
    "tar.gz": (gzip.compress(archive("tar")), "tar archive"),
    "tar.txt": (archive("tar"), "tar archive"),
    "a.7z": (b"7z\xbc\xaf\x27\x1c\0\4", "7z archive"),
    "7z.txt": (b"7z\xbc\xaf\x27\x1c\0\4", "7z archive"),
    "a.pdf": (b"%PDF-1.7\n", "PDF"),
    "pdf.txt": (b"%PDF-1.7\n", "PDF"),
    "a.docx": (archive("zip"), "Word"),
    "a.png": (PNG, "image"),
    "png.txt": (PNG, "image"),
    "a.npy": (archive("npy"), "NumPy"),
    "npy.md": (archive("npy"), "NumPy"),
    "a.pkl": (b"\x80\x04\x95", "pickle"),
    "pickle.txt": (b"\x80\x04\x95", "pickle"),
    "parquet.txt": (parquet(), "Parquet"),
    "zip.parquet": (archive("zip"), "zip archive"),
    "gzip.parquet": (gzip.compress(parquet()), "gzip"),
    "zip.gz": (archive("zip"), "zip archive"),
    "zip.txt.xz": (lzma.compress(archive("zip")), "zip archive"),
    "a.txt.Z": (b"\x1f\x9d\x90", "compress"),
    "lines.txt": (b"a\nb\0", naming("NUL", "line 2")),
    "twice.txt.gz": (gzip.compress(gzip.compress(TEXT.encode())), "gzip"),
    "gzip.txt": (gzip.compress(TEXT.encode()), "gzip"),
    "xz.jsonl": (lzma.compress(TEXT.encode()), "xz"),
    "bzip2.txt": (bz2.compress(TEXT.encode()), "bzip2"),
    "zstd.txt": (zst(TEXT.encode()), "zstd"),
    "nul.txt": (TEXT.encode() + b"\0", f"NUL.* {len(TEXT.encode())}\\b"),
    "a.log": (TEXT.encode(), naming(".log", ".jsonl")),
    "noname": (TEXT.encode(), naming(".jsonl")),
}


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.txt.zst", "pyarrow")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    content = {"a.parquet": FORMATS["a.parquet"], "a.txt.zst": zst(TEXT.encode())}
    (tmp_path / name).write_bytes(content[name])
    with pytest.raises(UserError, match=f"pip install {package}"):
        read_stories(tmp_path / name)


PACKED = lzma.compress(TEXT.encode() * 100)
BROKEN = {
    "no_story.txt": (f"\n{END_OF_TEXT}\n ".encode(), r"\bstor(y|ies)\b"),
    "empty.jsonl": (b"", r"\bstor(y|ies)\b"),
    "latin.txt": (TEXT.encode() + b"caf\xe9", naming("0xe9", str(len(TEXT.encode()) + 3), "iconv")),
    "bom.txt": (b"\xef\xbb\xbfcaf\xe9!", r"0xe9\D+6\b"),
    "wide.txt": (TEXT.encode("utf-16"), "iconv -f UTF-16 "),
    "wide_le.txt": (TEXT.encode("utf-16-le"), naming("line 1", "iconv -f UTF-16LE ")),
    "wide_be.txt": (TEXT.encode("utf-16-be"), naming("line 1", "iconv -f UTF-16BE ")),
    "wider.txt": (TEXT.encode("utf-32"), naming("line 1", "iconv -f UTF-32 ")),
    "gbk.txt": ("从前有一只狗。".encode("gbk"), naming("line 1", "such as WINDOWS-1252")),
    "cut.txt": ("é".encode()[:1], r"0xc3\D+0\b"),
    "short.xz": (PACKED[:-20], "damaged"),
    "short.gz": (gzip.compress(TEXT.encode())[:-9], "damaged"),
    "plain.gz": (TEXT.encode(), "damaged"),
    "plain.xz": (TEXT.encode(), "damaged"),
    "bad.jsonl": (b'{"text": "a"}\n\n{"text": ', naming("bad.jsonl, line 3", "JSON")),
    "empty.txt": (b"", r"\bstor(y|ies)\b"),
    "empty.json": (b"", naming("empty.json", "item 0")),
    "empty.csv": (b"", r"empty.csv.*\bstor(y|ies)\b"),
    "blank.csv": (b"\n  \n", r"blank.csv.*\bstor(y|ies)\b"),
    "later.csv": (b"\n\nid,text\n1,a\n2\n", naming("later.csv, line 5", "1", "2")),
    "none.json": (b"[]", r"\bstor(y|ies)\b"),
    "empty.parquet": (b"", "damaged"),
    "short.bz2": (bz2.compress(TEXT.encode())[:-9], "damaged"),
    "short.zst": (zst(TEXT.encode() * 100)[:-9], "damaged"),
    "cut.csv": (table(",")[:-6], naming("cut.csv", "line 5")),
    "lines.txt.gz": (gzip.compress(TEXT.encode())[:-4], r"damaged.*line 5\b"),
    "plain.bz2": (TEXT.encode(), "damaged"),
    "plain.zst": (TEXT.encode(), "damaged"),
    "short.jsonl.gz": (gzip.compress(FORMATS["a.jsonl"])[:-9], r"damaged.*line"),
    "short.csv": (table(",", quoting=csv.QUOTE_ALL)[:-6], naming("short.csv, line 5")),
    "quote.csv": (b'text\nfine\n"a"b', naming("quote.csv, line 3")),
    "columns.csv": (b"id,text\n1,a\n2,b,c\n", naming("columns.csv, line 3", "2", "3")),
    "columns.tsv": (b"id\ttext\n1\ta\n2\n", naming("columns.tsv, line 3", "2", "1")),
    "latin.csv": (b"text\nfine\ncaf\xe9\n", naming("0xe9", "line 3")),
    "short.json": (FORMATS["a.json"][:-9], naming("short.json", "item 3")),
    "end.json": (b'["a", "b"', naming("end.json", "item 2")),
    "comma.json": (b'["a", "b" "c"]', naming("comma.json", "item 3")),
    "object.json": (b'{"text": "a"}', naming("object.json", ".jsonl")),
    "more.json": (b'["a"] ["b"]', naming("more.json")),
    "number.json": (b'["a", 3]', naming("number.json, item 2", "3")),
    "mixed.json": (b'[{"body": "a"}, {"title": "b"}]', naming("item 2", "body", "title")),
    "deep.json": (b"[" * 100_000, naming("deep.json", "item 1")),
    "deep.jsonl": (b"[" * 100_000, naming("deep.jsonl, line 1")),
    "mixed.jsonl": (b'{"body": "a"}\n{"title": "b"}', naming("line 2", "body", "title")),
    "numbers.parquet": (parquet("text", [None], n=[1])[:-9], "damaged"),
    "no_text.parquet": (parquet("no", [], id=[]), naming("no_text.parquet")),
    "short.parquet": (parquet()[:-9], "damaged"),
    "plain.parquet": (TEXT.encode(), "damaged"),
    "short.parquet.gz": (gzip.compress(parquet())[:-9], "damaged"),
    "keys.jsonl": (b'{"title": "a", "body": "b"}', naming("keys.jsonl, line 1", "title", "body")),
    "number.jsonl": (b'{"text": 3}', naming("number.jsonl, line 1", "3")),
    "half.jsonl": (rb'"\ud83d!"', naming("half.jsonl, line 1", r"\ud83d")),
}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [(name, *case) for cases in (FOREIGN, BROKEN) for name, case in cases.items()],
    ids=lambda value: value if isinstance(value, str) and "." in value[:-3] else "",
)
def test_archive_binary_or_damaged_file_is_a_one_line_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_stories(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
