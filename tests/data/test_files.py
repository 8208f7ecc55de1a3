import gzip
import json
import lzma
from pathlib import Path

import pytest

from minigpt.core.settings import UserError
from minigpt.data import files
from minigpt.data.files import read_stories
from minigpt.tokenizer import END_OF_TEXT
from tests.conftest import naming

STORIES = ["Tim had a ball.\nIt was red.", "Mia saw a bird — «oh!»", "The end 🐦."]
TEXT = f"\n{END_OF_TEXT}\n".join(STORIES)


def write(path: Path, text: str = TEXT) -> Path:
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz", "a.xz", "a.gz", "A.TXT.GZ"])
def test_text_reads_the_same_packed_or_not_with_any_line_ends(tmp_path, name):
    pack = {".xz": lzma.compress, ".gz": gzip.compress}.get(Path(name).suffix.lower(), bytes)
    windows = ("\ufeff" + TEXT + f"\n{END_OF_TEXT}\n \n{END_OF_TEXT}\n").replace("\n", "\r\n")
    (tmp_path / name).write_bytes(pack(windows.encode()))
    assert list(read_stories(tmp_path / name)) == STORIES


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz"])
def test_json_lines_hold_a_story_a_text_or_a_bare_string(tmp_path, name):
    pack = {".xz": lzma.compress, ".gz": gzip.compress}.get(Path(name).suffix, bytes)
    lines = [{"story": STORIES[0], "text": "no"}, {"id": 1, "text": STORIES[1]}, STORIES[2]]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / name).write_bytes(pack(text.encode()))
    assert list(read_stories(tmp_path / name)) == STORIES


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_chunk_borders_in_characters_separators_and_line_ends_change_nothing(
    tmp_path, monkeypatch, chunk
):
    path = write(tmp_path / "a.txt", TEXT.replace("\n", "\r\n"))
    monkeypatch.setattr(files, "_CHUNK", chunk)
    assert list(read_stories(path)) == STORIES


def test_another_separator_and_a_story_larger_than_the_chunk(tmp_path):
    long = "x" * (3 << 20)
    path = write(tmp_path / "a.txt", f"{long}\n\n\n\nshort")
    assert list(read_stories(path, "\n\n")) == [long, "short"]


def test_text_without_separator_is_given_up_on_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 100)
    monkeypatch.setattr(files, "_LONGEST", 1000)
    path = write(tmp_path / "a.txt", "x" * 5000 + TEXT)
    with pytest.raises(UserError, match=naming("a.txt", "data.separator")):
        next(read_stories(path))
    path = write(tmp_path / "a.jsonl", '"' + "x" * 5000 + '"')
    with pytest.raises(UserError, match=naming("a.jsonl", "64 MB")):
        next(read_stories(path))


PACKED = lzma.compress(TEXT.encode() * 100)
BROKEN = {
    "no_story.txt": (f"\n{END_OF_TEXT}\n ".encode(), r"\bstor(y|ies)\b"),
    "empty.jsonl": (b"", r"\bstor(y|ies)\b"),
    "one.txt": (b"Once upon a time.", naming(END_OF_TEXT, "data.separator")),
    "latin.txt": (TEXT.encode() + b"caf\xe9", naming("0xe9", str(len(TEXT.encode()) + 3), "iconv")),
    "bom.txt": (b"\xef\xbb\xbfcaf\xe9!", r"0xe9\D+6\b"),
    "wide.txt": (TEXT.encode("utf-16"), "iconv -f UTF-16"),
    "cut.txt": ("é".encode()[:1], r"0xc3\D+0\b"),
    "short.xz": (PACKED[:-20], "damaged"),
    "short.gz": (gzip.compress(TEXT.encode())[:-9], "damaged"),
    "plain.gz": (TEXT.encode(), "damaged"),
    "plain.xz": (TEXT.encode(), "damaged"),
    "stories.csv": (TEXT.encode(), naming(".csv", ".jsonl")),
    "bad.jsonl": (b'{"text": "a"}\n\n{"text": ', naming("bad.jsonl:3", "JSON")),
    "keys.jsonl": (b'{"title": "a", "body": "b"}', naming("keys.jsonl:1", "title", "body")),
    "number.jsonl": (b'{"text": 3}', naming("number.jsonl:1", "text")),
    "half.jsonl": (rb'"\ud83d!"', naming("half.jsonl:1", r"\ud83d")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_explained_in_one_line_with_its_name(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(read_stories(tmp_path / name))
    assert name in str(error.value)
    assert "\n" not in str(error.value)
