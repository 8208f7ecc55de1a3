"""Datasets on disk, read by `datasets` itself; no network."""

import gc
import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

from minigpt.core.settings import UserError
from minigpt.data import hub
from minigpt.data.config import DataConfig
from minigpt.data.sources import open_corpus
from tests.conftest import naming

# datasets leaves .csv files for the garbage collector to close
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def collect_garbage():
    """Close those files before the next test."""
    yield
    gc.collect()


STORIES = [f"Story {n}: the dog\r\nran. " for n in range(300)]
READ = [story.replace("\r\n", "\n").strip() for story in STORIES]


def dataset(folder: Path, kind: str, field: str = "text") -> Path:
    """Write a dataset of two splits, as the Hub has them."""
    for split, stories in {"train": STORIES, "validation": ["Held out.", ""]}.items():
        rows = datasets.Dataset.from_dict({"id": list(range(len(stories))), field: stories})
        write = {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[kind]
        folder.mkdir(exist_ok=True)
        write(folder / f"{split}.{kind}")
    return folder


def config(tmp_path: Path, **more: Any) -> DataConfig:
    values = {"dataset": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache")}
    return DataConfig(source="hf", **{**values, "download_tokens": None, **more})


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_dataset_folder_is_read_by_its_field_and_splits(tmp_path, kind):
    dataset(tmp_path / "data", kind, "body")
    corpus = open_corpus(config(tmp_path, valid_split="validation"))
    assert list(corpus.stories("train")) == READ
    assert list(corpus.stories("valid")) == ["Held out."]
    held_out = open_corpus(config(tmp_path, field="body"))
    assert list(held_out.stories("train")) == READ[:285]
    assert list(held_out.stories("valid")) == READ[285:]
    alone = open_corpus(config(tmp_path, valid_split="validation"), valid_only=True)
    assert alone.train_files == ()


def test_reading_a_dataset_leaves_the_settings_of_the_libraries(tmp_path):
    def settings() -> list[bool]:
        return [
            datasets.are_progress_bars_disabled(),
            datasets.config.HF_UPDATE_DOWNLOAD_COUNTS,
            constants.HF_HUB_DISABLE_TELEMETRY,
        ]

    dataset(tmp_path / "data", "jsonl")
    before = settings()
    open_corpus(config(tmp_path))
    with pytest.raises(UserError):
        open_corpus(config(tmp_path, field="nope"))
    assert settings() == before


def test_a_dataset_folder_may_have_brackets_in_its_name(tmp_path):
    dataset(tmp_path / "data [v2] ü", "jsonl")
    brackets = config(tmp_path, dataset=str(tmp_path / "data [v2] ü"), valid_split="validation")
    assert list(open_corpus(brackets).stories("train")) == READ


def test_only_what_the_budget_needs_is_streamed_and_a_request_has_the_same_stories(
    tmp_path, monkeypatch
):
    dataset(tmp_path / "data", "jsonl")
    small = open_corpus(config(tmp_path, download_tokens=500))
    first = [*small.stories("train"), *small.stories("valid")]
    size = small.train_files[0].stat().st_size
    assert first == READ[: len(first)]
    assert 500 * 3 < len("".join(first)) <= 500 * 3.84 * 1.02 + 1
    larger = open_corpus(config(tmp_path, download_tokens=1000))
    assert larger.train_files == small.train_files
    assert larger.train_files[0].stat().st_size > size
    again = open_corpus(config(tmp_path, download_tokens=500))
    assert [*again.stories("train"), *again.stories("valid")] == first
    whole = open_corpus(config(tmp_path))
    assert [*whole.stories("train"), *whole.stories("valid")] == READ
    monkeypatch.setattr(datasets, "load_dataset", None)  # everything is there
    assert open_corpus(config(tmp_path)).train_files == whole.train_files


@pytest.mark.parametrize("killed_at", [5, 123])
def test_a_killed_download_continues_where_it_was(tmp_path, monkeypatch, killed_at):
    dataset(tmp_path / "data", "jsonl")
    monkeypatch.setattr(hub, "_SAVED", 500)
    stream, reads = hub._stories, []

    def killed(*arguments: Any) -> Any:
        yield from itertools.islice(stream(*arguments), killed_at)
        raise KeyboardInterrupt

    def counted(*arguments: Any) -> Any:
        for item in stream(*arguments):
            reads.append(item[0])
            yield item

    monkeypatch.setattr(hub, "_stories", killed)
    with pytest.raises(KeyboardInterrupt):
        open_corpus(config(tmp_path))
    monkeypatch.setattr(hub, "_stories", counted)
    corpus = open_corpus(config(tmp_path))
    assert [*corpus.stories("train"), *corpus.stories("valid")] == READ
    assert len(reads) <= 300 - killed_at + 25


@pytest.mark.parametrize("rest", [None, b""])
def test_deleted_or_cut_download_is_read_again(tmp_path, rest):
    dataset(tmp_path / "data", "jsonl")
    (path,) = open_corpus(config(tmp_path, download_tokens=500)).train_files
    whole = path.read_bytes()
    path.unlink()
    if rest is not None:
        path.write_bytes(rest)
    open_corpus(config(tmp_path, download_tokens=500))
    assert path.read_bytes() == whole


def test_a_dataset_that_changed_on_disk_is_read_again(tmp_path):
    folder = dataset(tmp_path / "data", "jsonl")
    open_corpus(config(tmp_path))
    (folder / "train.jsonl").write_text(json.dumps({"text": "New."}) + "\n", encoding="utf-8")
    (path,) = open_corpus(config(tmp_path)).train_files
    assert json.loads(path.read_text()) == {"text": "New."}


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({"split": "nosuch"}, ["data.dataset", "nosuch", "train"]),
        ({"field": "nope"}, ["data.field", "nope", "id", "text"]),
        ({"field": "id"}, ["data.field", "id"]),
        ({"subset": "nosuch"}, ["data.dataset", "nosuch"]),
        ({"dataset": "/no/folder"}, ["data.dataset", "/no/folder"]),
    ],
)
def test_what_a_dataset_lacks_is_one_line(tmp_path, more, names):
    dataset(tmp_path / "data", "jsonl")
    with pytest.raises(UserError, match=naming(*names)) as error:
        open_corpus(config(tmp_path, **more))
    assert "\n" not in str(error.value)


def test_without_a_network_one_line_says_what_to_set(tmp_path, monkeypatch):
    def offline(*_: Any) -> Any:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub.HfApi, "dataset_info", offline)
    with pytest.raises(UserError, match=naming("data.dataset", "owner/name", "data.train_files")):
        open_corpus(config(tmp_path, dataset="owner/name"))


def test_a_damaged_file_of_a_dataset_is_one_line(tmp_path):
    folder = dataset(tmp_path / "data", "parquet")
    path = folder / "train.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=naming("data.dataset")) as error:
        open_corpus(config(tmp_path))
    assert "\n" not in str(error.value)


def test_without_the_package_its_name_is_given(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        open_corpus(config(tmp_path))
