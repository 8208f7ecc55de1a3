"""A trained run, and helpers for tests of its exports."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from minigpt.core.settings import build
from minigpt.evaluation import EvaluationConfig, StoriesConfig
from minigpt.exporting import ExportConfig, export
from minigpt.runs.folder import Run
from minigpt.training.loop import train
from tests.conftest import composed, tiny_overrides

QUICK = EvaluationConfig(stories=StoriesConfig(prompts=(), temperatures=(0.5,)), words=())


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A trained run with an embedding scale that is not a power of two."""
    tiny = tiny_overrides(tmp_path_factory.mktemp("trained"))
    overrides = [*tiny, "model.d_model=12", "model.dropout=0.1", "name=tiny"]
    return train(composed(overrides)).folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run for one test."""
    return shutil.copytree(trained, tmp_path / "runs" / "tiny")


def exported(run: Path, out: Path, **settings: str) -> Path:
    """Export `run` into `out`, and return `out`."""
    export(Run.load(run), out, build(ExportConfig, settings, ""))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def change_config(folder: Path, **settings: Any) -> None:
    """Replace top-level settings in a run's config.yaml; None removes one."""
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) | settings
    path.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))


def card_of(folder: Path) -> str:
    """Return the model card of an export."""
    return (folder / "README.md").read_text(encoding="utf-8")


def row_of(card: str, name: str) -> str:
    """Return the value of a row of the table in a model card."""
    (value,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", card, re.MULTILINE)
    return value
