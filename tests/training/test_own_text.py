"""A file of any format, a dataset folder and a book train without further settings."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from minigpt.generation import SamplingConfig, generate
from minigpt.tokenizer import END_OF_TEXT
from tests.conftest import tiny_settings, trained_folder

STORIES = [f"Tom saw {n} cats.\nThey were big." for n in range(100)]

PARAGRAPHS = [
    f"Tom saw a {what}. It was {how}." for what in ("cat", "dog") for how in ("big", "red")
]


def _table(delimiter: str) -> bytes:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([("id", "text"), *enumerate(STORIES)])
    return out.getvalue().encode()


def _parquet() -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"text": STORIES}), sink)
    return sink.getvalue().to_pybytes()


def _zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


CONTENTS: dict[str, Callable[[], bytes]] = {
    "a.csv": lambda: _table(","),
    "a.tsv": lambda: _table("\t"),
    "a.ndjson": lambda: "\n".join(map(json.dumps, STORIES)).encode(),
    "a.json": lambda: json.dumps([{"text": story} for story in STORIES]).encode(),
    "a.parquet": _parquet,
    "a.txt.zst": lambda: _zstd(END_OF_TEXT.join(STORIES).encode()),
}


@pytest.mark.long
@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_of_each_format_trains_by_one_override(name: str, tmp_path: Path):
    file = tmp_path / name
    file.write_bytes(CONTENTS[name]())
    folder = trained_folder([*tiny_settings(tmp_path), f"data.train_files=[{file}]", "name=a"])
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert "5 of 100" in log  # held out
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == "finished"


@pytest.mark.long
def test_a_dataset_folder_of_the_hub_trains_by_one_override(tmp_path: Path):
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "train.parquet").write_bytes(_parquet())
    settings = [word for word in tiny_settings(tmp_path) if word != "data=text"]
    folder = trained_folder(["data=hf", f"data.dataset={tmp_path / 'stories'}", *settings])
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


@pytest.mark.long
def test_model_of_a_book_goes_on_past_a_paragraph(tmp_path: Path):
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(PARAGRAPHS * 19_000), encoding="utf-8")
    settings = [word for word in tiny_settings(tmp_path) if "model." not in word]
    more = ["model=w32", "model.context_length=64", "budget.tokens=200_000", "optimizer.lr=0.01"]
    folder = trained_folder([*settings, *more, f"data.train_files=[{book}]", "name=book"])
    assert book.name in (folder / "train.log").read_text(encoding="utf-8")  # how it was divided
    (text,) = generate(folder, "Tom saw a", 1, SamplingConfig(0.0, max_tokens=100))
    assert text.count("\n\n") >= 2
    assert text.split("\n\n")[1] in PARAGRAPHS
    assert END_OF_TEXT not in text
