import gzip
import json
import lzma
import re
import shutil
from pathlib import Path

import pytest

from minigpt.core.settings import UserError
from minigpt.data import sources
from minigpt.data.sources import (
    END_OF_TEXT,
    Corpus,
    bundled_sample,
    local_files,
    read_stories,
)
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
    monkeypatch.setattr(sources, "_CHUNK", chunk)
    assert list(read_stories(path)) == STORIES


def test_another_separator_and_a_story_larger_than_the_chunk(tmp_path):
    long = "x" * (3 << 20)
    path = write(tmp_path / "a.txt", f"{long}\n\n\n\nshort")
    assert list(read_stories(path, "\n\n")) == [long, "short"]


def test_text_without_separator_is_given_up_on_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_CHUNK", 100)
    monkeypatch.setattr(sources, "_LONGEST", 1000)
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


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], naming("data.train_files")),
        (["no.txt"], naming("no.txt", "data.train_files")),
        (["no*.txt"], naming("no*.txt", "data.train_files")),
        (["."], naming("data.train_files", "*.txt")),
        (["*"], naming("a.md", ".md")),
    ],
)
def test_a_name_that_gives_no_story_file_is_an_error_at_once(tmp_path, monkeypatch, train, message):
    write(tmp_path / "a.md")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        local_files(train, [])


def test_globs_are_sorted_recursive_know_home_and_name_no_file_twice(tmp_path, monkeypatch):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    names = ["b.txt", "a.txt", "deep/er/c.txt", "odd[1].txt"]
    b, a, c, odd = (write(tmp_path / name) for name in names)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    found = local_files(["~/odd[1].txt", "~/**/*.txt"], []).train_files
    assert found == (odd, a, b, c)


def test_a_file_in_both_splits_is_refused(tmp_path):
    path = write(tmp_path / "a.txt")
    with pytest.raises(UserError, match=naming("a.txt", "data.train_files", "data.valid_files")):
        local_files([str(path)], [str(tmp_path / "*.txt")])


def test_the_last_share_over_all_files_is_held_out(tmp_path):
    for k in range(2):
        stories = [f"story {10 * k + i}" for i in range(10)]
        write(tmp_path / f"{k}.txt", END_OF_TEXT.join(stories))
    held_out = local_files([str(tmp_path / "*.txt")], [], holdout=0.15)
    assert list(held_out.stories("train")) == [f"story {i}" for i in range(17)]
    assert list(held_out.stories("valid")) == [f"story {i}" for i in range(17, 20)]
    with pytest.raises(UserError, match=naming("data.holdout", "0.01", "20", "validation")):
        local_files([str(tmp_path / "*.txt")], [], holdout=0.01).stories("train")
    with pytest.raises(UserError, match=naming("data.holdout", "0.99", "20", "training")):
        local_files([str(tmp_path / "*.txt")], [], holdout=0.99).stories("valid")


@pytest.mark.parametrize("holdout", [0, 1, -0.1, float("nan")])
def test_a_holdout_that_is_no_share_is_refused(holdout):
    with pytest.raises(UserError, match=naming("data.holdout", str(holdout))):
        Corpus((), (), holdout)


def test_validation_files_stand_alone_and_the_cap_keeps_whole_training_stories(tmp_path):
    a, b = write(tmp_path / "a.txt"), write(tmp_path / "b.txt", f"held out{END_OF_TEXT}")
    two = len("".join(STORIES[:2]).encode())
    assert list(Corpus((a,), (b,), max_train_bytes=two).stories("train")) == STORIES[:2]
    assert list(Corpus((a,), (b,), max_train_bytes=two - 1).stories("train")) == STORIES[:1]
    only_valid = Corpus((), (b,), max_train_bytes=1)
    assert list(only_valid.stories("valid")) == ["held out"]
    with pytest.raises(UserError, match=naming("data.train_files")):
        only_valid.stories("train")


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path, monkeypatch):
    a, b = write(tmp_path / "a.txt"), write(tmp_path / "b.txt", TEXT + "!")
    moved = tmp_path / "elsewhere.txt"
    shutil.copyfile(a, moved)

    def of(*files: Path, split: sources.Split = "train", **settings) -> str:
        return json.dumps(Corpus(files, **{"valid_files": (), **settings}).fingerprint(split))

    assert of(a) == of(moved)
    different = [
        of(a),
        of(b),
        of(a, b),
        of(b, a),
        of(a, split="valid"),
        of(a, holdout=0.1),
        of(a, separator="##"),
        of(a, max_train_bytes=9),
        of(a, valid_files=(b,)),
        of(a, valid_files=(b,), split="valid"),
        of(Path(shutil.copyfile(a, tmp_path / "a.jsonl"))),
    ]
    assert len(set(different)) == len(different)
    assert of(valid_files=(b,), split="valid") == of(a, valid_files=(b,), split="valid")

    monkeypatch.setattr(sources, "_HASH_WHOLE", 10)
    monkeypatch.setattr(sources, "_CHUNK", 4)
    large = of(a)
    assert large != different[0]
    write(a, TEXT[:-1] + "!")
    assert of(a) != large


def test_the_bundled_sample_is_whole_and_its_splits_share_no_story():
    sample = bundled_sample()
    train, valid = list(sample.stories("train")), list(sample.stories("valid"))
    assert (len(train), len(valid)) == (14_849, 3_000)
    assert not set(train) & set(valid)
    assert not any(re.search(r"endoftext|\r|\ufffd", story) for story in train + valid)
