"""A book in one file trains without further settings, and its model writes on past a paragraph."""

from pathlib import Path

import pytest

from minigpt.generation import SamplingConfig, generate
from minigpt.tokenizer import END_OF_TEXT
from tests.conftest import tiny_settings, trained_folder

PARAGRAPHS = [
    f"Tom saw a {what}. It was {how}." for what in ("cat", "dog") for how in ("big", "red")
]


@pytest.mark.long
def test_model_of_a_book_goes_on_past_a_paragraph(tmp_path: Path):
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(PARAGRAPHS * 1000), encoding="utf-8")
    settings = [word for word in tiny_settings(tmp_path) if "model." not in word]
    more = ["model=w32", "model.context_length=64", "budget.tokens=200_000", "optimizer.lr=0.01"]
    folder = trained_folder([*settings, *more, f"data.train_files=[{book}]", "name=book"])
    assert book.name in (folder / "train.log").read_text(encoding="utf-8")  # how it was divided
    (text,) = generate(folder, "Tom saw a", 1, SamplingConfig(0.0, max_tokens=100))
    assert text.count("\n\n") >= 2
    assert text.split("\n\n")[1] in PARAGRAPHS
    assert END_OF_TEXT not in text
