"""Formats and compression of files with stories, and files in other or damaged formats."""

import bz2
import csv
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from minigpt.core.settings import UserError
from minigpt.tokenizer import END_OF_TEXT
from tests.conftest import naming
from tests.data.test_files import FORMATS, STORIES, TEXT, parquet, read_stories, table


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


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", FORMATS)
def test_each_format_holds_the_same_stories_packed_or_not(tmp_path, name, packing):
    path = tmp_path / f"{name}{packing}"
    path.write_bytes(packed(path.name, FORMATS[name]))
    assert read_stories(path) == STORIES


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
    "bzip2-1.txt": (bz2.compress(TEXT.encode(), 1), "bzip2"),
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
    "open.csv": (b'text\n"a\nb\nc\n', naming("open.csv, line 2")),
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
