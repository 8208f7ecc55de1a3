"""Measures of the snapshots of a run, on a model of a few thousand parameters."""

import base64
import json
import re
from pathlib import Path

import pytest
import torch

from minigpt.analysis import over_time
from minigpt.analysis.classes import (
    CLASSES,
)
from minigpt.analysis.over_time import is_well_formed, sentences, write_over_time
from minigpt.core.settings import UserError
from minigpt.runs.checkpoint import write_snapshot
from minigpt.runs.folder import Run
from minigpt.tokenizer import Tokenizer
from tests.analysis.test_classes import STORY, net_of
from tests.cli.test_app import run_main
from tests.conftest import naming


def test_heuristics_of_sentences():
    text = 'Tom had an apple. "Hi!" said mom. he ran ran home! A apple fell. It had had rain'
    parts = sentences(text)
    assert len(parts) == 6
    faultless = [part for part in parts if is_well_formed(part)]
    assert faultless == ["Tom had an apple.", "Hi!"]
    assert is_well_formed("It was very very cold.")
    assert not is_well_formed("An dog ran.")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A run folder with two snapshots, whose words are those of the map."""
    folder = tmp_path_factory.mktemp("life") / "tiny"
    (folder / "snapshots").mkdir(parents=True)
    words = " ".join(word for group in over_time.CLUSTERS.values() for word in group)
    tokenizer = Tokenizer.train([f"{STORY} {words}"] * 5, 600)
    tokenizer.save(folder / "tokenizer.json")
    net = net_of(tokenizer)
    shape = {"vocab_size": tokenizer.vocab_size, "context_length": 256, "d_model": 16,
             "n_layers": 2, "n_heads": 2, "d_ff": 16}  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps({"model": shape}))
    for step in (0, 10):
        path = folder / f"snapshots/step-{step:06d}.safetensors"
        values = {"step": step, "tokens": 100 * step, "train_loss": 5.0}
        write_snapshot(path, net, {"model": shape}, values)
        with torch.no_grad():
            net.embedding.weight[:, 0] += 0.5
    return Run(folder, path)


def test_study_over_time_measures_every_snapshot(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(over_time, "NOVELTY_STORIES", 50)
    monkeypatch.setattr(over_time.OverTimeConfig, "n_scored", 3)
    (run.folder / "report.html").touch()
    verb = ["study", str(run.checkpoint), "--over-time", "--n", "2", "--out", str(tmp_path)]
    assert run_main(monkeypatch, *verb) == 0
    assert (run.folder / "report.html").read_text() == ""  # the results are in another folder
    assert "over-time.md" in capsys.readouterr().out
    content = json.loads((tmp_path / "over-time.json").read_text())
    first, last = content["snapshots"]
    assert (first["tokens"], last["tokens"]) == (0, 1000)
    assert first["losses"]["all tokens"] != last["losses"]["all tokens"]
    assert [len(layer) for layer in last["induction"]] == [2, 2]
    assert 0 <= last["spelling"] <= 1
    table = (tmp_path / "over-time.md").read_text()
    assert all(f"| {name} |" in table for name in CLASSES)
    assert (tmp_path / "over-time.png").stat().st_size > 10_000
    page = (tmp_path / "embeddings.html").read_text()
    data = json.loads(re.search(r"const data = (.*);\n", page)[1])
    assert data["tokens"] == ["0", "1k"]
    assert len(data["points"][0]) == len(data["words"]) == len(data["groups"]) > 10
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert run_main(monkeypatch, *verb[:-1], str(run.folder)) == 0
    figure = base64.b64encode((run.folder / "over-time.png").read_bytes()).decode()
    assert figure in (run.folder / "report.html").read_text(encoding="utf-8")


def test_study_over_time_needs_one_run_with_snapshots(run, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError) as error:
        write_over_time(Run(tmp_path, Path("none")), tmp_path / "out")
    assert "callbacks.snapshots" in error.value.fix
    two = [str(run.checkpoint)] * 2
    assert run_main(monkeypatch, "study", *two, "--over-time") == 2
    assert re.search(naming("--over-time", "2"), capsys.readouterr().err)
