"""The weights in releases/ match their evaluation.json and their model card."""

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from minigpt.core.settings import build
from minigpt.generation.sampling import SamplingConfig, stream_text
from minigpt.runs.checkpoint import weights_fingerprint
from minigpt.runs.folder import Run, bundled_release
from minigpt.runs.records import read_summary
from tests.cli.test_app import run_main
from tests.conftest import ROOT, composed

RELEASES = sorted(path.parent for path in ROOT.glob("releases/*/model.safetensors"))


def test_quickstart_shows_one_release():
    named = [
        path for path in RELEASES if f"releases/{path.name} " in (ROOT / "Makefile").read_text()
    ]
    assert len(named) == 1


@pytest.mark.parametrize("folder", RELEASES, ids=lambda path: path.name)
def test_experiment_reproduces_the_settings_of_a_release(folder: Path):
    config = Run.load(folder).config
    again = composed([f"experiment=release_{folder.name}"])
    for group in ("model", "optimizer", "budget", "trainer"):
        expected = getattr(again, group)
        newer = {"optimizer": "follow_batch", "trainer": "cuda_graph"}.get(group)
        if newer is not None:  # no effect on batches of 16 windows on a CPU
            expected = dataclasses.replace(expected, **{newer: config[group][newer]})
        if group == "trainer":  # the precision is a choice for one machine
            expected = dataclasses.replace(expected, precision=config[group]["precision"])
        assert build(type(expected), config[group], group) == expected
    assert config["seed"] == again.seed
    data = dataclasses.asdict(again.data)
    if data["tokenizer"]:  # an export keeps the name of a path
        data["tokenizer"] = Path(data["tokenizer"]).name
    assert config["data"].items() <= data.items()
    summary = read_summary(folder)
    parent, teachers = summary.get("init_from"), summary.get("teachers", [])
    assert (parent and parent["name"]) == (again.init_from and Path(again.init_from).name)
    assert [run["name"] for run in teachers] == [Path(run).name for run in again.teacher.runs]


def test_release_script_trains_each_run_after_its_parent_and_teachers():
    script = (ROOT / "sweeps/release.sh").read_text(encoding="utf-8")
    (sizes,) = re.findall(r"for size in (.*); do\n +python", script)
    made = {f"runs/first/{size}" for size in ("medium", "large")}
    for size in sizes.split():
        config = composed([f"experiment=release_{size}"])
        assert {*config.teacher.runs, *filter(None, [config.init_from])} <= made
        made.add(f"runs/{size.replace('_', '-')}")
    assert {path.name for path in RELEASES} <= {Path(path).name for path in made}


@pytest.mark.parametrize("folder", RELEASES, ids=lambda path: path.name)
def test_release_matches_its_card_and_evaluation(folder: Path):
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


def test_release_with_snapshots_grows_into_its_weights():
    run = Run.load(bundled_release())
    ages = [Run.load(path) for path in run.snapshots]
    assert len(ages) == 8
    assert sum(path.stat().st_size for path in run.snapshots) < 6e6
    last = ages[-1].load_model()
    assert weights_fingerprint(last) == weights_fingerprint(run.load_model())


def test_verbs_do_not_change_a_release(tmp_path, monkeypatch, capsys):
    release = shutil.copytree(bundled_release(), tmp_path / "release")
    before = contents(release)
    monkeypatch.chdir(tmp_path)
    for verb in (
        "generate release --max-tokens 5 --n 2",
        "probe release --near dad --analogy 'princess - girl + boy'",
        "export release hf",
        "scaling release --out scaling",
    ):
        assert run_main(monkeypatch, *shlex.split(verb)) == 0, capsys.readouterr().err
    assert {"embedding_map.png", "hf", "scaling"} <= {path.name for path in tmp_path.iterdir()}
    assert contents(release) == before


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Return the content of every file below `folder`, and None for folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
