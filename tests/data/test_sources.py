from pathlib import Path

import pytest

from minigpt.core.settings import UserError, build
from minigpt.data.config import DataConfig
from minigpt.data.sources import bundled_sample, local_files, open_corpus
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
    assert local_files([str(tmp_path / f"*{folder[1:]}" / "a.txt")], []).train_files == (a,)
    relative = local_files([f"./{folder}/[[]b*.txt"], [])
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
    for separator in (r"\n\n", r"\r\n\r\n", "\n\n", "\r\n\r\n"):
        config = DataConfig(source="text", valid_files=(str(text),), separator=separator)
        assert list(open_corpus(config).stories("valid")) == ["One\nline.", "Two.", "Three."]


def test_the_files_of_a_folder_are_suggested_in_their_own_format(tmp_path):
    for name in ("a.csv", "b.csv", "c.txt", "d.png"):
        write(tmp_path / name)
    with pytest.raises(UserError) as error:
        local_files([str(tmp_path)], [])
    assert error.value.fix == {"data.train_files": [f"{tmp_path}/*.csv"]}
