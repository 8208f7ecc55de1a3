import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from minigpt.core.settings import UserError, build
from minigpt.data import files, sources
from minigpt.data.config import DataConfig
from minigpt.data.preparation import prepare_split
from minigpt.data.sources import Corpus, bundled_sample, local_files, open_corpus
from minigpt.tokenizer import END_OF_TEXT, Tokenizer
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
        (["*"], naming("a.log", ".log")),
        (["~nobody-of-that-name/a.txt"], naming("data.train_files", "~nobody-of-that-name/a.txt")),
    ],
)
def test_a_name_that_gives_no_story_file_is_an_error_at_once(tmp_path, monkeypatch, train, message):
    write(tmp_path / "a.log")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        local_files(train, []).stories("train")


def test_globs_are_sorted_recursive_know_home_and_name_no_file_twice(tmp_path, monkeypatch):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    names = ["b.txt", "a.txt", "deep/er/c.txt", "odd[1].txt"]
    b, a, c, odd = (write(tmp_path / name) for name in names)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    files = local_files(["~/odd[1].txt", "~/**/*.txt"], []).train_files
    assert files == (odd, a, b, c)


@pytest.mark.parametrize("folder", ["stories [v2]", "mÿ störies", "a*b", "~"])
def test_folders_with_brackets_spaces_and_other_letters_are_found(tmp_path, monkeypatch, folder):
    (tmp_path / folder).mkdir()
    a, b = write(tmp_path / folder / "a.txt"), write(tmp_path / folder / "[b] ü.txt")
    monkeypatch.chdir(tmp_path)
    assert local_files([str(tmp_path / folder / "*.txt")], []).train_files == (b, a)
    assert local_files([str(b), str(tmp_path / folder / "[a].txt")], []).train_files == (b, a)
    relative = local_files([f"./{folder}/[[]b*.txt"] if folder != "~" else [str(b)], [])
    assert [path.resolve() for path in relative.train_files] == [b]


@pytest.mark.parametrize("link", ["relative", "symbolic", "hard"])
def test_a_file_of_two_names_counts_once_and_is_refused_in_both_splits(tmp_path, monkeypatch, link):
    path, other = write(tmp_path / "a.txt"), tmp_path / "b.txt"
    monkeypatch.chdir(tmp_path)
    if link == "symbolic":
        other.symlink_to(path)
    elif link == "hard":
        other.hardlink_to(path)
    name = "a.txt" if link == "relative" else str(other)
    assert local_files([str(path), name], []).train_files == (path,)
    with pytest.raises(UserError, match=naming("data.train_files", "data.valid_files")):
        local_files([str(path)], [name])


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


def test_a_repeated_story_leaves_the_held_out_part_or_training_beside_given_files(tmp_path, caplog):
    caplog.set_level("INFO")
    stories = [f"story {n}" for n in range(18)] + ["story 3", "new"]
    a = write(tmp_path / "a.txt", END_OF_TEXT.join(stories))
    split = local_files([str(a)], [], holdout=0.1)
    assert list(split.stories("train")) == stories[:18]
    assert list(split.stories("valid")) == ["new"]
    assert re.search(r"\b1\b.*held-out", caplog.text)
    caplog.clear()
    b = write(tmp_path / "b.txt", END_OF_TEXT.join(["story 3", "new", "only here"]))
    given = local_files([str(a)], [str(b)])
    assert list(given.stories("train")) == [s for s in stories if s not in ("story 3", "new")]
    assert list(given.stories("valid")) == ["story 3", "new", "only here"]
    assert re.search(r"\b3\b.*training", caplog.text)


def test_a_long_story_in_both_splits_is_left_out_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PIECE", 50)
    long = "\n\n".join(f"paragraph {n}" for n in range(50))
    a = write(tmp_path / "a.txt", END_OF_TEXT.join(["one", long, "two"]))
    b = write(tmp_path / "b.md", long)
    corpus = local_files([str(a)], [str(b)])
    assert list(corpus.pieces("train")) == [("one", True), ("two", True)]
    assert "".join(corpus.stories("valid")) == long


BOOK = "\n\n".join(f"Chapter {n}. " + "It was a day. " * (n % 7 + 1) for n in range(400)).strip()


@pytest.mark.parametrize("name", ["book.txt", "book.md"])
@pytest.mark.parametrize("piece", [200, 1 << 20])
def test_the_end_of_a_book_is_held_out_from_a_blank_line(
    tmp_path, monkeypatch, caplog, name, piece
):
    caplog.set_level("INFO")
    monkeypatch.setattr(files, "_PIECE", piece)
    corpus = local_files([str(write(tmp_path / name, BOOK))], [])
    train, valid = list(corpus.pieces("train")), list(corpus.pieces("valid"))
    texts = ["".join(text for text, _ in split) for split in (train, valid)]
    assert "".join(texts) == BOOK
    assert texts[1].startswith("\nChapter")
    assert len(texts[1]) == pytest.approx(0.05 * len(BOOK), rel=0.1)
    for split in (train, valid):
        assert [ends for _, ends in split] == [False] * (len(split) - 1) + [True]
    (line,) = caplog.messages
    assert name in line
    assert "data.separator" in line


def test_a_prepared_book_has_one_end_of_text_at_its_end(tmp_path):
    book = "\n\n".join([BOOK] * 80)
    corpus = local_files([str(write(tmp_path / "book.txt", book))], [])
    tokenizer = Tokenizer.train([BOOK], 300)
    for split in ("train", "valid"):
        text = "".join(corpus.stories(split))
        tokens = prepare_split(corpus, split, tokenizer, tmp_path)
        assert tokens.array().tolist() == [*tokenizer.encode(text), tokenizer.end_of_text]
        assert (tokens.n_stories, tokens.n_bytes) == (1, len(text.encode()))
    assert len(list(corpus.pieces("train"))) > 1


def test_paragraphs_are_stories_with_a_separator_and_several_books_one_document_each(tmp_path):
    book = write(tmp_path / "book.txt", BOOK)
    paragraphs = local_files([str(book)], [], separator="\n\n")
    assert len(list(paragraphs.stories("train"))) == 380
    assert len(list(paragraphs.stories("valid"))) == 20
    other = write(tmp_path / "other.md", BOOK.replace("day", "night"))
    two = local_files([str(book), str(other)], [])
    assert [ends for _, ends in two.pieces("train")] == [True, True]
    assert "night" in list(two.stories("valid"))[1]
    many = [str(write(tmp_path / f"{n}.txt", f"Story {n}.")) for n in range(20)]
    assert list(local_files(many, []).stories("valid")) == ["Story 19."]


@pytest.mark.parametrize("text", ["x", "xy", "no blank lines\n" * 5, "word " * 50, "文" * 100])
@pytest.mark.parametrize("holdout", [0.05, 0.5, 0.99])
def test_any_text_divides_without_blank_lines_too(tmp_path, text, holdout):
    corpus = local_files([str(write(tmp_path / "a.txt", text))], [], holdout)
    train, valid = ("".join(corpus.stories(split)) for split in ("train", "valid"))
    assert train + valid == text.strip()
    assert valid
    assert train or text == "x"


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

    monkeypatch.setattr(sources, "_HASH_WHOLE", 10)
    monkeypatch.setattr(sources, "_MEBIBYTE", 4)
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


def test_own_text_and_the_bundled_sample_open_by_config(tmp_path):
    text, stories = tmp_path / "own.txt", [f"Story {n} é." for n in range(50)]
    text.write_text(END_OF_TEXT.join(stories), encoding="utf-8")
    own = build(DataConfig, {"source": "text", "train_files": str(text), "holdout": 0.1}, "data")
    corpus = open_corpus(own)
    assert list(corpus.stories("train")) == stories[:45]
    assert list(corpus.stories("valid")) == stories[45:]
    assert open_corpus(DataConfig()) == bundled_sample()
    assert open_corpus(DataConfig(max_stories=5)).max_stories == 5
    assert open_corpus(DataConfig(max_stories=5, valid="tuning")).max_stories == 5


def test_an_empty_line_separates_stories_where_it_is_typed(tmp_path):
    text = tmp_path / "poems.txt"
    text.write_text("One\nline.\n\nTwo.\n\nThree.", encoding="utf-8")
    config = DataConfig(source="text", valid_files=(str(text),), separator=r"\n\n")
    assert list(open_corpus(config).stories("valid")) == ["One\nline.", "Two.", "Three."]
