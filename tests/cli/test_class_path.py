"""A custom model class, given as a class path, in training and in every verb."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from minigpt.cli.compose import import_class, typed_class
from minigpt.playground.answers import Playground
from minigpt.runs.folder import Run
from minigpt.runs.records import read_summary
from tests.commands import Result, run, run_here
from tests.conftest import tiny_overrides, trained_folder

MODULE = """
from dataclasses import dataclass

from minigpt import GPT, GPTConfig


@dataclass(frozen=True)
class Shape(GPTConfig):
    roll: int = 0


class MyGPT(GPT):
    config_class = Shape

    def forward(self, ids, cache=None):
        return super().forward(ids, cache).flip(-1).roll(self.config.roll, -1)


class Two(GPT):
    def __init__(self, config, other):
        super().__init__(config)


class NoGPT:
    pass


class NoConfig(GPT):
    config_class = dict
"""
CLASS, OPTION = "flipped_gpt.MyGPT", "--class-path"
QUICK = ["stories.n=1", "stories.max_tokens=3"]


def settings(folder: Path, name: str, own: bool = True) -> list[str]:
    """Return the settings of the run `name`, with the custom class if `own`."""
    wide = ["model.context_length=64", "budget.tokens=5120", f"name={name}"]
    mine = [f"model.class_path={CLASS}", "model.roll=3"] if own else []
    return [*tiny_overrides(folder), *wide, *mine]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the module, a run of its class, `mine`, and a run of GPT, `plain`."""
    folder = tmp_path_factory.mktemp("class") / "here"
    folder.mkdir()
    (folder / "flipped_gpt.py").write_text(MODULE, encoding="utf-8")
    result = run("train.py", settings(folder, "mine"), folder)
    assert result.code == 0, result.err
    trained_folder(settings(folder, "plain", own=False))
    return folder


def one_line(result: Result, *names: str) -> None:
    """Assert exit code 2 and a one-line error with these names."""
    assert (result.code, result.out) == (2, ""), result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1, result.err
    assert all(name in result.err for name in names), result.err


def test_the_class_and_its_parameters_are_stored(here: Path):
    config = Run.load(here / "runs/mine").config
    assert config["model_class"] == CLASS
    assert config["model"]["roll"] == 3
    assert "class_path" not in config["model"]
    assert f"model.class_path={CLASS}" in config["overrides"]


def test_evaluate_measures_the_loss_of_the_class(here: Path):
    typed = [f"class_path={CLASS}", "ckpt=runs/mine", *QUICK]
    result = run_here("evaluate.py", typed, here)
    assert result.code == 0, result.err
    measured = json.loads((here / "runs/mine/evaluation.json").read_text(encoding="utf-8"))
    summary = read_summary(here / "runs/mine")
    assert measured["perplexity"] == pytest.approx(summary["val/perplexity"], rel=1e-5)
    assert summary["val/loss"] < 3  # of 300 tokens; without the class it would be above 6


@pytest.mark.long
def test_every_verb_that_loads_a_model_takes_the_class(here: Path):
    for words in (
        ["generate", "runs/mine", "--max-tokens", "5"],
        ["generate", "runs/mine", "--max-tokens", "5", "--n", "2"],
        ["probe", "runs/mine"],
        ["export", "runs/mine", "out", "--format", "safetensors"],
        ["generate", "out", "--max-tokens", "5"],
        ["study", "runs/mine", "runs/plain", "--n", "1"],  # a plain run beside it
    ):
        result = run_here("minigpt", [*words, OPTION, CLASS], here)
        assert result.code == 0, result.err
    assert yaml.safe_load((here / "out/config.yaml").read_text())["model_class"] == CLASS
    rows = json.loads((here / "study/coherence.json").read_text(encoding="utf-8"))["rows"]
    assert {row["run"] for row in rows} >= {"mine", "plain"}


def test_playground_serves_the_class(here: Path, monkeypatch: pytest.MonkeyPatch):
    served_runs = []
    monkeypatch.setattr(
        "minigpt.playground.server.serve", lambda runs, *_: served_runs.extend(runs)
    )
    result = run_here("minigpt", ["playground", "runs/plain", "runs/mine", OPTION, CLASS], here)
    assert result.code == 0, result.err
    monkeypatch.chdir(here)
    models = Playground.load(served_runs).models.values()
    names = [type(model.net).__name__ for model in models]
    assert names == ["GPT", "MyGPT"]


def test_a_run_of_the_class_continues(here: Path):
    keep = ["callbacks.checkpoint_steps=5", "callbacks.keep_checkpoints=4"]
    typed = [*settings(here, "cut"), *keep]
    assert run_here("train.py", typed, here).code == 0
    folder = here / "runs/cut"
    whole = read_summary(folder)["val/loss"]
    older = sorted((folder / "checkpoints").glob("last-*.ckpt"))[0]
    for path in (folder / "checkpoints/last.ckpt", folder / "checkpoints/best.ckpt"):
        path.unlink()
    shutil.copy(older, folder / "checkpoints/last.ckpt")
    (folder / "summary.json").unlink()
    one_line(run_here("train.py", ["resume=runs/cut"], here), CLASS, "model.class_path=")
    resumed = run_here("train.py", ["resume=runs/cut", f"model.class_path={CLASS}"], here)
    assert resumed.code == 0, resumed.err
    assert read_summary(folder)["val/loss"] == whole
    again = run_here("train.py", [*typed, "resume=auto"], here)
    assert again.code == 0, again.err


def test_runs_of_the_class_are_averaged(here: Path, monkeypatch: pytest.MonkeyPatch):
    result = run_here("train.py", [*settings(here, "second"), "init_from=runs/mine"], here)
    assert result.code == 0, result.err
    words = ["runs/second", "mean", "--average", "runs/mine", "--evaluate", OPTION, CLASS]
    exact = ["--format", "safetensors", "--dtype", "float32"]
    result = run_here("minigpt", ["export", *words, *exact], here)
    assert result.code == 0, result.err
    monkeypatch.chdir(here)
    model = import_class(CLASS, "class_path")
    folders = ("runs/mine", "runs/second", "mean")
    first, second, mean = (Run.load(here / name, model).load_model() for name in folders)
    for a, b, c in zip(first.parameters(), second.parameters(), mean.parameters(), strict=True):
        assert torch.allclose((a + b) / 2, c)
    measured = json.loads((here / "mean/evaluation.json").read_text(encoding="utf-8"))
    assert measured["nats_per_token"] < 3


def test_quotes_around_a_class_path_are_not_part_of_it(here: Path, monkeypatch):
    monkeypatch.chdir(here)
    plain = typed_class("model.class_path", [f"model.class_path={CLASS}"])
    assert typed_class("model.class_path", [f"model.class_path='{CLASS}'"]) is plain


@pytest.mark.parametrize("verb", ["generate", "probe", "playground", "study", "export"])
def test_without_the_class_its_run_is_refused_by_name(verb: str, here: Path):
    words = [verb, "runs/mine", *(["out-of-none"] if verb == "export" else [])]
    one_line(run_here("minigpt", words, here), CLASS, f"{OPTION} {CLASS}")


def test_without_the_class_evaluate_and_init_from_are_refused_by_name(here: Path):
    one_line(run_here("evaluate.py", ["ckpt=runs/mine"], here), f"class_path={CLASS}")
    typed = [*settings(here, "none", own=False), "init_from=runs/mine"]
    one_line(run_here("train.py", typed, here), f"model.class_path={CLASS}")


def test_a_run_of_gpt_is_refused_with_another_class(here: Path):
    result = run_here("minigpt", ["generate", "runs/plain", OPTION, CLASS], here)
    one_line(result, "runs/plain", "GPT")


@pytest.mark.parametrize("format", ["hf", "onnx", "gguf", "html"])
def test_export_for_other_programs_is_refused_by_name(format: str, here: Path):
    words = ["export", "runs/mine", f"for-{format}", "--format", format, OPTION, CLASS]
    one_line(run_here("minigpt", words, here), CLASS, f"--format {format}", "--format safetensors")
    assert not (here / f"for-{format}").exists()


@pytest.mark.parametrize(
    "path",
    [
        "no.Such",
        "flipped_gpt.Missing",
        "flipped_gpt.NoGPT",
        "flipped_gpt.Two",
        "flipped_gpt.NoConfig",
        "GPT",
        "",
    ],
)
def test_a_wrong_class_path_is_one_line(path: str, here: Path):
    typed = settings(here, "none", own=False)
    train = run_here("train.py", [*typed, f"model.class_path={path}"], here)
    one_line(train, f"model.class_path={path}")
    evaluate = run_here("evaluate.py", ["ckpt=runs/mine", f"class_path={path}"], here)
    one_line(evaluate, f"class_path={path}")
    one_line(run_here("minigpt", ["generate", "runs/mine", OPTION, path], here), OPTION, path)
    assert not (here / "runs/none").exists()
