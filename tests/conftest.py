"""A corpus of a few hundred short stories and a model of a few thousand parameters."""

from __future__ import annotations

import os

# Before PyTorch is imported: models this small are slower on two threads than on one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MINIGPT_LOCAL"] = "null"  # tests ignore conf/local

import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from minigpt.training.config import TrainConfig

ROOT = Path(__file__).parent.parent
SHORT = ["budget.tokens=320", "trainer.n_validations=1"]  # 5 steps with the settings of `tiny`

# Modules of minigpt are imported in functions, because the main process of pytest-xdist reads this
# file before it starts the workers, and runs no test itself.


def naming(*names: str) -> str:
    """Return a pattern for `match` of a line that holds all names, in any order."""
    return "".join(rf"(?=.*(?<!\w){re.escape(name)}(?!\w))" for name in names)


def write_stories(path: Path, n: int, seed: int) -> Path:
    """Write `n` stories with one plot and few words, which a tiny model learns at once."""
    pick = random.Random(seed).choice
    stories = [
        f"Once upon a time, {pick(['Tom', 'Lily', 'Max'])} had a {pick(['red', 'big', 'new'])} "
        f"{pick(['ball', 'dog', 'kite'])}. {pick(['Mom', 'Dad'])} was {pick(['happy', 'sad'])}."
        for _ in range(n)
    ]
    path.write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    return path


@pytest.fixture(scope="session", autouse=True)
def undrawn_charts() -> Iterator[pytest.MonkeyPatch]:
    """Leave out the charts of report.html: drawing them takes 40 % of a tiny training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minigpt.training.report._charts", lambda rows: [])
        yield patch


@pytest.fixture
def drawn_charts(undrawn_charts: pytest.MonkeyPatch) -> Iterator[None]:
    """Draw the charts of report.html, for tests of the report and of unusual curves."""
    undrawn_charts.undo()
    yield
    undrawn_charts.setattr("minigpt.training.report._charts", lambda rows: [])


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Overrides of train.py for a run of 20 steps on a tiny corpus, all of it below tmp_path."""
    return tiny_overrides(tmp_path)


def tiny_overrides(folder: Path) -> list[str]:
    """Return the same overrides for a folder that several tests share."""
    train, valid = folder / "train.txt", folder / "valid.txt"
    return [
        f"data.train_files=[{write_stories(train, 400, 1)}]",
        f"data.valid_files=[{write_stories(valid, 40, 2)}]",
        *tiny_settings(folder),
    ]


def tiny_settings(folder: Path) -> list[str]:
    """Return the overrides without the files of the stories; nothing is written."""
    return [
        "data=text",
        f"data.cache_dir={folder / 'cache'}",
        "data.vocab_size=300",
        "data.batch_size=4",
        f"runs_dir={folder / 'runs'}",
        "model.context_length=16",
        "model.d_model=16",
        "model.n_heads=2",
        "model.d_ff=32",
        "model.n_layers=2",
        "budget.tokens=1280",
        "optimizer.warmup_steps=2",
        "trainer.accelerator=cpu",
        "trainer.log_every_n_steps=1",
        "trainer.n_validations=2",
        "callbacks.max_tokens=5",
        "callbacks.progress_bar=false",
    ]


@pytest.fixture(scope="session")
def runs_by_settings() -> dict[Any, Path]:
    """Return the runs of `trained_once`, by their settings."""
    return {}


@pytest.fixture
def trained_once(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, runs_by_settings: dict[Any, Path]
) -> Callable[..., Path]:
    """Return a function like `trained_folder` that trains once for several tests.

    The first call in this process trains, and later calls with the same arguments copy the run and
    the cache below their own tmp_path, and change the paths in the run. The overrides must be those
    of `tiny` and more, with a name, and the stories must be those of `tiny`.
    """

    def trained(overrides: list[str], **how: Any) -> Path:
        key = tuple(word.replace(str(tmp_path), "") for word in overrides), tuple(how.items())
        if key not in runs_by_settings:
            run = trained_folder(overrides, **how)
            store = tmp_path_factory.mktemp("once")
            shutil.copytree(run, store / "runs" / run.name)
            shutil.copytree(tmp_path / "cache", store / "cache")
            (store / "written-in").write_text(str(tmp_path))
            runs_by_settings[key] = store / "runs" / run.name
            return run
        original = runs_by_settings[key]
        store = original.parent.parent
        run = shutil.copytree(original, tmp_path / "runs" / original.name)
        shutil.copytree(store / "cache", tmp_path / "cache", dirs_exist_ok=True)
        written_in = (store / "written-in").read_text()
        for name in ("config.yaml", "train.log", "report.html"):
            text = (run / name).read_text(encoding="utf-8")
            (run / name).write_text(text.replace(written_in, str(tmp_path)), encoding="utf-8")
        return run

    return trained


def composed(overrides: list[str]) -> TrainConfig:
    """Return the settings of `train.py <overrides>`."""
    from minigpt.cli.compose import load_config

    return load_config("train", overrides)


def trained_folder(overrides: list[str], **how: Any) -> Path:
    """Train as `train.py <overrides>` does, with `how` for `train`; return the run folder."""
    from minigpt.training.loop import train

    return train(composed(overrides), **how).folder
