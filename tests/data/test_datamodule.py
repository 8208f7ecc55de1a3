"""The data module: which stories it trains and validates on."""

from pathlib import Path

import pytest

from minigpt.core.settings import UserError
from minigpt.data import sources
from minigpt.data.config import DataConfig
from minigpt.data.corpus import Corpus
from minigpt.data.datamodule import DataModule
from minigpt.data.sources import open_corpus
from minigpt.tokenizer import END_OF_TEXT
from tests.conftest import naming

STORIES = [f"Story {i}: the dog sat on mat {i * i}." for i in range(100)]


def write(path: Path, stories: list[str]) -> Path:
    path.write_text(END_OF_TEXT.join(stories), encoding="utf-8")
    return path


def texts(tokens, data: DataModule) -> list[str]:
    return data.tokenizer.decode(tokens.array().tolist()).split(END_OF_TEXT)[:-1]


def test_tuning_holds_out_every_seventh_story_and_opens_no_validation_file(tmp_path, monkeypatch):
    train = write(tmp_path / "train.txt", STORIES)
    sample = Corpus((train,), (tmp_path / "absent.txt",))
    monkeypatch.setattr(sources, "bundled_sample", lambda: sample)
    settings = {"vocab_size": 300, "cache_dir": str(tmp_path / "cache")}
    data = DataModule(DataConfig(valid="tuning", **settings), 16, n_steps=2, seed=1)
    data.setup()
    assert texts(data.valid, data) == STORIES[6::7]
    assert texts(data.train, data) == [text for i, text in enumerate(STORIES) if i % 7 != 6]
    with pytest.raises(UserError, match=naming("absent.txt")):
        DataModule(DataConfig(**settings), 16, n_steps=2, seed=1).setup()


def test_tuning_of_own_files_leaves_the_last_share_to_the_report(tmp_path):
    train = write(tmp_path / "train.txt", STORIES)
    config = DataConfig("text", (str(train),), holdout=0.1)
    tuning = DataConfig("text", (str(train),), holdout=0.1, valid="tuning")
    reported, split = open_corpus(config), open_corpus(tuning, valid_only=True)
    assert list(reported.stories("valid")) == STORIES[90:]
    assert list(split.stories("valid")) == STORIES[6:90:7]
    assert len(list(split.stories("train"))) == 90 - len(STORIES[6:90:7])
    prints = [str(c.fingerprint(s)) for c in (reported, split) for s in ("train", "valid")]
    assert len(set(prints)) == 4
