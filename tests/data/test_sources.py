import json
import shutil
from pathlib import Path

import pytest

from minigpt.core.settings import UserError, build
from minigpt.data import sources
from minigpt.data.config import DataConfig
from minigpt.data.sources import Corpus, bundled_sample, local_files, open_corpus
from minigpt.tokenizer import END_OF_TEXT
from tests.conftest import naming

STORIES = ["Tim had a ball.\nIt was red.", "Mia saw a bird — «oh!»", "The end 🐦."]
TEXT = f"\n{END_OF_TEXT}\n".join(STORIES)


def write(path: Path, text: str = TEXT) -> Path:
    path.write_bytes(text.encode())
    return path


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
        local_files(train, []).stories("train")


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
    monkeypatch.setattr(sources, "_MEBIBYTE", 4)
    large = of(a)
    assert large != different[0]
    write(a, TEXT[:-1] + "!")
    assert of(a) != large


def test_own_text_and_the_bundled_sample_open_by_config(tmp_path):
    text, stories = tmp_path / "own.txt", [f"Story {n} é." for n in range(50)]
    text.write_text(END_OF_TEXT.join(stories), encoding="utf-8")
    own = build(DataConfig, {"source": "text", "train_files": str(text), "holdout": 0.1}, "data")
    corpus = open_corpus(own)
    assert list(corpus.stories("train")) == stories[:45]
    assert list(corpus.stories("valid")) == stories[45:]
    assert open_corpus(DataConfig()) == bundled_sample()


def test_an_empty_line_separates_stories_where_it_is_typed(tmp_path):
    text = tmp_path / "poems.txt"
    text.write_text("One\nline.\n\nTwo.\n\nThree.", encoding="utf-8")
    config = DataConfig(source="text", valid_files=(str(text),), separator=r"\n\n")
    assert list(open_corpus(config).stories("valid")) == ["One\nline.", "Two.", "Three."]
