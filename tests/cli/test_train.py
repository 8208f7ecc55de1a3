"""`minigpt train` trains as the library does."""

import dataclasses
from pathlib import Path

from minigpt.cli.compose import load_config
from minigpt.runs.records import read_metrics
from minigpt.training.loop import train
from tests.commands import run
from tests.conftest import ROOT, tiny_overrides


def test_library_and_command_line_have_the_same_losses(tmp_path: Path):
    overrides = [*tiny_overrides(tmp_path), "name=typed"]
    assert run("train.py", overrides, ROOT).code == 0
    config = dataclasses.replace(load_config("train", overrides), name="notebook")
    folders = tmp_path / "runs/typed", train(config).folder
    losses = [[row["train/loss"] for row in read_metrics(f) if "lr" in row] for f in folders]
    assert len(losses[0]) == 20
    assert losses[0] == losses[1]
