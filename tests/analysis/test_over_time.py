"""Measures of the snapshots of a run, on a model of a few thousand parameters."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from minigpt.analysis import over_time
from minigpt.analysis.classes import (
    BANDS,
    CLASSES,
    NAMES,
    POSITIONS,
    PUNCTUATION,
    SPEECH,
    class_losses,
    scored_texts,
    token_counts,
)
from minigpt.analysis.over_time import is_well_formed, sentences, write_over_time
from minigpt.core.settings import UserError
from minigpt.model import GPT, GPTConfig
from minigpt.runs.checkpoint import write_snapshot
from minigpt.runs.folder import Run
from minigpt.tokenizer import Tokenizer
from tests.cli.test_app import run_main
from tests.conftest import naming

STORY = 'One day, a girl named Lily met Tom. She said, "Hello Tom!" Then Lily ran home with Tom.'
LONG = " ".join([STORY] * 4)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([STORY] * 5, 300)


def net_of(tokenizer: Tokenizer, context: int = 256) -> GPT:
    torch.manual_seed(0)
    shape = GPTConfig(tokenizer.vocab_size, context, d_model=16, n_layers=2, n_heads=2, d_ff=16)
    return GPT(shape).eval()


def test_tokens_have_the_classes_of_their_text(tokenizer):
    counts = token_counts([STORY], tokenizer)
    (text,) = scored_texts([STORY], tokenizer, 5, 256, counts)
    pieces = [tokenizer.token(i) for i in text.ids[1:]]
    assert "".join(pieces) == STORY
    own: dict[str, list[str]] = {name: [] for name in CLASSES}
    for piece, classes in zip(pieces, text.classes, strict=True):
        for name in classes:
            own[name].append(piece)
    joined = {name: "".join(own[name]) for name in CLASSES}
    assert joined[NAMES[0]].split() == ["Lily", "Tom"]
    assert joined[NAMES[1]].split() == ["Tom", "Lily", "Tom"]
    assert joined[SPEECH].strip() == '"Hello Tom!"'
    assert set(joined[PUNCTUATION].replace(" ", "")) == set(',."!')
    assert len(own[POSITIONS[0]]) == 16
    assert sum(len(own[band]) for band in BANDS) == len(pieces)


def test_classes_of_frequency_follow_the_counts(tokenizer, monkeypatch):
    monkeypatch.setattr("minigpt.analysis.classes.FREQUENT", 1)
    monkeypatch.setattr("minigpt.analysis.classes.KNOWN", 2)
    ids = tokenizer.encode(STORY)
    counts = Counter({ids[0]: 9, ids[1]: 5, ids[2]: 1})
    (text,) = scored_texts([STORY], tokenizer, 1, 3, counts)
    assert [(classes & set(BANDS)) for classes in text.classes] == [{band} for band in BANDS]


def test_losses_of_classes_are_means_of_the_loss_of_tokens(tokenizer):
    net = net_of(tokenizer)
    texts = scored_texts([STORY, LONG], tokenizer, 2, 256, {})
    losses = class_losses(net, texts)
    total, n = 0.0, 0
    for text in texts:
        ids = torch.tensor([text.ids])
        loss = net.loss(ids[:, :-1], ids[:, 1:]).item()
        total, n = total + loss * (len(text.ids) - 1), n + len(text.ids) - 1
    assert losses["all tokens"] == pytest.approx(total / n, rel=1e-5)
    assert losses[BANDS[0]] is None  # no token has a known frequency
    assert losses[BANDS[2]] == pytest.approx(losses["all tokens"])


def test_heuristics_of_sentences():
    text = 'Tom had an apple. "Hi!" said mom. he ran ran home! A apple fell. It had had rain'
    parts = sentences(text)
    assert len(parts) == 6
    faultless = [part for part in parts if is_well_formed(part)]
    assert faultless == ["Tom had an apple.", "Hi!"]
    assert is_well_formed("It was very very cold.")
    assert not is_well_formed("An dog ran.")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer) -> Run:
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
    verb = ["study", str(run.checkpoint), "--over-time", "--n", "2", "--out", str(tmp_path)]
    assert run_main(monkeypatch, *verb) == 0
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


def test_study_over_time_needs_one_run_with_snapshots(run, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError) as error:
        write_over_time(Run(tmp_path, Path("none")), tmp_path / "out")
    assert "callbacks.snapshots" in error.value.fix
    two = [str(run.checkpoint)] * 2
    assert run_main(monkeypatch, "study", *two, "--over-time") == 2
    assert re.search(naming("--over-time", "2"), capsys.readouterr().err)
