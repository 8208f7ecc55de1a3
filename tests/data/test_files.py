import csv
import io
import json
from pathlib import Path
from typing import Any

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
    "c.json": json.dumps(STORIES, ensure_ascii=False).encode(),
    "a.csv": b"\xef\xbb\xbf" + table(","),
    "b.csv": table(";"),
    "a.tsv": table("\t"),
    "a.parquet": parquet(),
}


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


def test_a_long_item_of_a_list_is_tried_again_only_when_twice_as_much_was_read(
    tmp_path, monkeypatch
):
    tries = []

    class Decoder(json.JSONDecoder):
        def raw_decode(self, s: str, idx: int = 0):
            tries.append(len(s))
            return super().raw_decode(s, idx)

    monkeypatch.setattr(json, "JSONDecoder", Decoder)
    monkeypatch.setattr(formats, "CHUNK", 10)
    stories = ["x" * 5000, "short"]
    assert read_stories(write(tmp_path / "a.json", json.dumps(stories))) == stories
    assert len(tries) < 15


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
