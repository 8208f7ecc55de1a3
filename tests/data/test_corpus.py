"""The division of a corpus into a training and a validation split."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from minigpt.core.settings import UserError
from minigpt.data import corpus, files
from minigpt.data.corpus import Corpus
from minigpt.data.preparation import prepare_split
from minigpt.data.sources import local_files
from minigpt.tokenizer import END_OF_TEXT, Tokenizer
from tests.conftest import naming
from tests.data.test_sources import STORIES, TEXT, write


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
    assert list(Corpus((a,), (b,), max_train_bytes=1).stories("train")) == STORIES[:1]
    only_valid = Corpus((), (b,), max_train_bytes=1)
    assert list(only_valid.stories("valid")) == ["held out"]
    with pytest.raises(UserError, match=naming("data.train_files")):
        only_valid.stories("train")


def test_a_repeated_story_leaves_the_held_out_part_or_training_beside_given_files(tmp_path):
    stories = [f"story {n}" for n in range(18)] + ["story 3", "new"]
    a = write(tmp_path / "a.txt", END_OF_TEXT.join(stories))
    split = local_files([str(a)], [], holdout=0.1)
    assert list(split.stories("train")) == stories[:18]
    assert list(split.stories("valid")) == ["new"]
    assert re.search(r"\b1\b.*held-out", split.notes[-1])
    b = write(tmp_path / "b.txt", END_OF_TEXT.join(["story 3", "new", "only here"]))
    given = local_files([str(a)], [str(b)])
    assert list(given.stories("train")) == [s for s in stories if s not in ("story 3", "new")]
    assert list(given.stories("valid")) == ["story 3", "new", "only here"]
    assert re.search(r"\b3\b.*training", given.notes[-1])


def test_a_long_story_in_both_splits_is_left_out_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PIECE", 50)
    long = "\n\n".join(f"paragraph {n}" for n in range(50))
    a = write(tmp_path / "a.txt", END_OF_TEXT.join(["one", long, "two"]))
    b = write(tmp_path / "b.md", long)
    both = local_files([str(a)], [str(b)])
    assert list(both.pieces("train")) == [("one", True), ("two", True)]
    assert "".join(both.stories("valid")) == long


BOOK = "\n\n".join(f"Chapter {n}. " + "It was a day. " * (n % 7 + 1) for n in range(400)).strip()


@pytest.mark.parametrize("name", ["book.txt", "book.md"])
@pytest.mark.parametrize("piece", [200, 1 << 20])
def test_the_end_of_a_book_is_held_out_from_a_blank_line(tmp_path, monkeypatch, name, piece):
    monkeypatch.setattr(files, "_PIECE", piece)
    book = local_files([str(write(tmp_path / name, BOOK))], [])
    train, valid = list(book.pieces("train")), list(book.pieces("valid"))
    texts = ["".join(text for text, _ in split) for split in (train, valid)]
    assert "".join(texts) == BOOK
    assert texts[1].startswith("\nChapter")
    assert len(texts[1]) == pytest.approx(0.05 * len(BOOK), rel=0.1)
    for split in (train, valid):
        assert [ends for _, ends in split] == [False] * (len(split) - 1) + [True]
    (line,) = book.notes
    assert name in line
    assert "data.separator" in line


def test_a_prepared_book_has_one_end_of_text_at_its_end(tmp_path):
    book = "\n\n".join([BOOK] * 80)
    prepared = local_files([str(write(tmp_path / "book.txt", book))], [])
    tokenizer = Tokenizer.train([BOOK], 300)
    for split in ("train", "valid"):
        text = "".join(prepared.stories(split))
        tokens = prepare_split(prepared, split, tokenizer, tmp_path)
        assert tokens.array().tolist() == [*tokenizer.encode(text), tokenizer.end_of_text]
        assert (tokens.n_stories, tokens.n_bytes) == (1, len(text.encode()))
    assert len(list(prepared.pieces("train"))) > 1
    again = local_files([str(tmp_path / "book.txt")], [])  # found in the cache, not read
    tokens = prepare_split(again, "train", tokenizer, tmp_path)
    assert tokens.notes == tuple(prepared.notes)
    assert again.notes == []


def test_paragraphs_are_stories_with_a_separator_and_several_books_one_document_each(tmp_path):
    book = write(tmp_path / "book.txt", BOOK)
    paragraphs = local_files([str(book)], [], separator="\n\n")
    assert len(list(paragraphs.stories("train"))) == 380
    assert len(list(paragraphs.stories("valid"))) == 20
    (note,) = paragraphs.notes
    assert re.findall(r"\d+", note) == ["20", "400"]
    other = write(tmp_path / "other.md", BOOK.replace("day", "night"))
    two = local_files([str(book), str(other)], [])
    assert [ends for _, ends in two.pieces("train")] == [True, True]
    assert "night" in list(two.stories("valid"))[1]
    many = [str(write(tmp_path / f"{n}.txt", f"Story {n}.")) for n in range(20)]
    assert list(local_files(many, []).stories("valid")) == ["Story 19."]


@pytest.mark.parametrize("total", [2, 3, 7, 10])
def test_a_holdout_that_leaves_none_names_one_that_does(tmp_path, total):
    a = str(write(tmp_path / "a.jsonl", "\n".join(f'"story {n}"' for n in range(total))))
    with pytest.raises(UserError) as error:
        local_files([a], [], holdout=0.04).stories("train")
    share = error.value.fix["data.holdout"]
    held_out = local_files([a], [], holdout=share)
    assert len(list(held_out.stories("valid"))) == 1
    assert len(list(held_out.stories("train"))) == total - 1


def test_one_row_cannot_be_divided_and_no_fraction_is_asked_for(tmp_path):
    a = write(tmp_path / "a.jsonl", '"The only story."')
    with pytest.raises(UserError, match=naming("data.holdout", "1", ".txt")) as error:
        local_files([str(a)], []).stories("train")
    assert error.value.fix == {}


@pytest.mark.parametrize(("tuning", "n_reads"), [(False, 3), (True, 4)])
def test_training_files_are_read_few_times(tmp_path, monkeypatch, tuning, n_reads):
    """Once to count the stories, and once for each split; tuning also finds repeated stories."""
    read, paths = corpus.read_pieces, []
    monkeypatch.setattr(corpus, "read_pieces", lambda *of: paths.append(of) or read(*of))
    path = write(tmp_path / "a.txt", END_OF_TEXT.join(f"Story {i % 80}." for i in range(100)))
    both = dataclasses.replace(local_files([str(path)], []), tuning=tuning)
    train, valid = (list(both.stories(split)) for split in ("train", "valid"))
    assert len(train) + len(valid) < 100  # the held-out part has lost those that training has
    assert len(paths) == n_reads


@pytest.mark.parametrize("given", [False, True])
def test_a_tuning_story_that_training_has_too_leaves_the_held_out_part(tmp_path, given):
    stories = [f"story {n % 20}" for n in range(40)]
    a = write(tmp_path / "a.txt", END_OF_TEXT.join([*stories, "x", "new", *"abcdefgh"]))
    b = (write(tmp_path / "b.txt", "other"),) if given else ()
    tuned = Corpus((a,), b, holdout=0.02, tuning=True)
    train, valid = list(tuned.stories("train")), list(tuned.stories("valid"))
    assert valid == ["new", "g"]
    assert set(train).isdisjoint(valid)
    assert re.search(r"\b5\b.*held-out", tuned.notes[-1])


def test_a_book_has_no_tuning_stories_and_the_error_says_how_to_get_some(tmp_path):
    book = write(tmp_path / "book.txt", BOOK)
    for split in ("train", "valid"):
        with pytest.raises(UserError, match=naming("data.valid", "data.separator")):
            list(Corpus((book,), (), tuning=True).stories(split))
    paragraphs = Corpus((book,), (), tuning=True, separator="\n\n")
    assert len(list(paragraphs.stories("valid"))) > 0


@pytest.mark.parametrize("text", ["x", "xy", "no blank lines\n" * 5, "word " * 50, "文" * 100])
@pytest.mark.parametrize("holdout", [0.05, 0.5, 0.99])
def test_any_text_divides_without_blank_lines_too(tmp_path, text, holdout):
    divided = local_files([str(write(tmp_path / "a.txt", text))], [], holdout)
    train, valid = ("".join(divided.stories(split)) for split in ("train", "valid"))
    assert train + valid == text.strip()
    assert valid
    assert train or text == "x"


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path, monkeypatch):
    a, b = write(tmp_path / "a.txt"), write(tmp_path / "b.txt", TEXT + "!")
    moved = tmp_path / "elsewhere.txt"
    shutil.copyfile(a, moved)

    def of(*files: Path, split: corpus.Split = "train", **settings) -> str:
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
        of(a, max_stories=1),
        of(a, max_stories=2),
        of(a, max_stories=2, tuning=True),
        of(a, tuning=True),
        of(a, tuning=True, holdout=0.1),
        of(a, tuning=True, valid_files=(b,)),
        of(a, valid_files=(b,)),
        of(a, valid_files=(b,), split="valid"),
        of(a, field="body"),
        of(Path(shutil.copyfile(a, tmp_path / "a.jsonl"))),
        of(Path(shutil.copyfile(a, tmp_path / "a.csv"))),
    ]
    assert len(set(different)) == len(different)
    # With validation files, no training stories are held out.
    assert of(a, tuning=True, valid_files=(b,), holdout=0.1) == of(a, tuning=True, valid_files=(a,))
    assert of(a, split="valid", max_stories=1) == of(a, split="valid")
    assert of(valid_files=(b,), split="valid") == of(a, valid_files=(b,), split="valid")

    monkeypatch.setattr(corpus, "_HASH_WHOLE", 10)
    monkeypatch.setattr(corpus, "_MEBIBYTE", 4)
    large = of(a)
    assert large != different[0]
    write(a, TEXT[:-1] + "!")
    assert of(a) != large


@pytest.mark.parametrize("tuning", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_max_stories_keeps_the_first_training_stories_and_all_validation(tmp_path, tuning, given):
    a = write(tmp_path / "a.txt", END_OF_TEXT.join(f"story {n}" for n in range(40)))
    b = (write(tmp_path / "b.txt", "story 2"),) if given else ()
    whole = Corpus((a,), b, holdout=0.1, tuning=tuning)
    train, valid = list(whole.stories("train")), list(whole.stories("valid"))
    for n in (1, 9, len(train), 1000):
        few = dataclasses.replace(whole, max_stories=n)
        assert list(few.stories("train")) == train[:n]
        assert list(few.stories("valid")) == valid


def test_max_stories_counts_a_divided_document_and_a_story_in_pieces_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PIECE", 200)
    paths = write(tmp_path / "a.txt", BOOK), write(tmp_path / "b.txt", BOOK)
    whole = local_files([str(path) for path in paths], [])
    first = list(dataclasses.replace(whole, max_stories=1).pieces("train"))
    assert sum(ends for _, ends in first) == 1
    assert first == list(whole.pieces("train"))[: len(first)]
