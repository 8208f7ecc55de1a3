"""The weights in releases/ are those that their evaluation.json and their model card tell of."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import pytest

from minigpt.core.settings import build
from minigpt.generation.sampling import SamplingConfig, stream_text
from minigpt.runs.checkpoint import weights_fingerprint
from minigpt.runs.folder import Run
from minigpt.runs.records import read_summary
from tests.cli.test_app import run_main
from tests.conftest import ROOT, composed

RELEASES = sorted(path.parent for path in ROOT.glob("releases/*/model.safetensors"))


def test_there_is_one_that_quickstart_shows():
    named = [
        path for path in RELEASES if f"releases/{path.name} " in (ROOT / "Makefile").read_text()
    ]
    assert len(named) == 1


@pytest.mark.parametrize("folder", RELEASES, ids=lambda path: path.name)
def test_one_override_makes_a_release_again(folder: Path):
    made = Run.load(folder).config
    begun = read_summary(folder).get("init_from")
    experiment = f"experiment=release_{folder.name}"
    again = composed([f"{experiment}_continued" if begun else experiment])
    for group in ("model", "optimizer", "budget", "trainer"):
        expected = getattr(again, group)
        assert build(type(expected), made[group], group) == expected
    assert made["seed"] == again.seed
    assert made["data"].items() <= dataclasses.asdict(again.data).items()
    if begun:  # and another made what it began with
        assert again.init_from == begun["path"]
        (command,) = begun["commands"]
        first, then = composed([experiment]), composed(command[2:])
        found = {"precision": then.trainer.precision}  # on that machine
        assert dataclasses.replace(first.trainer, **found) == then.trainer
        same = ("model", "data", "optimizer", "budget", "seed")
        assert all(getattr(first, name) == getattr(then, name) for name in same)


@pytest.mark.parametrize("folder", RELEASES, ids=lambda path: path.name)
def test_a_release_is_what_it_says(folder: Path):
    run = Run.load(folder)
    net, evaluation = run.load_model(), json.loads((folder / "evaluation.json").read_text())
    assert evaluation["weights"] == weights_fingerprint(net)
    assert (evaluation["n_stories"], evaluation["data"]["source"]) == (3000, "tinystories_sample")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"**{evaluation['perplexity']:.3f}**" in card
    assert f"{net.n_parameters:,} parameters" in card
    sampling = SamplingConfig(temperature=0, max_tokens=20)
    story = "".join(stream_text(net, run.tokenizer, "Once upon a time", sampling))
    assert story.startswith(", there was a")


def test_every_verb_works_on_a_release_and_leaves_it_alone(tmp_path, monkeypatch, capsys):
    release = shutil.copytree(RELEASES[0], tmp_path / "release")
    before = {path.name: path.read_bytes() for path in release.iterdir()}
    monkeypatch.chdir(tmp_path)
    for verb in (
        "generate release --max-tokens 5 --n 2",
        "probe release --near dad --analogy 'princess - girl + boy'",
        "export release hf",
        "scaling release --out scaling",
    ):
        assert run_main(monkeypatch, *shlex.split(verb)) == 0, capsys.readouterr().err
    assert {"embedding_map.png", "hf", "scaling"} <= {path.name for path in tmp_path.iterdir()}
    assert {path.name: path.read_bytes() for path in release.iterdir()} == before
