"""The tokenizer of a run: that of another run by `data.tokenizer`, and what a model follows."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from minigpt.core.settings import UserError
from minigpt.exporting import ExportConfig, export
from minigpt.model import GPTConfig
from minigpt.runs.checkpoint import weights_fingerprint
from minigpt.runs.folder import Run
from minigpt.runs.records import read_summary
from minigpt.tokenizer import Tokenizer
from minigpt.training.loop import train
from tests.conftest import composed, naming


def trained(overrides: list[str]) -> Path:
    return train(composed(overrides)).folder


@pytest.fixture
def parent(tiny: list[str]) -> Path:
    """A run with a tokenizer of 290 tokens."""
    return trained([*tiny, "data.vocab_size=290", "name=parent"])


def without_size(tiny: list[str]) -> list[str]:
    return [word for word in tiny if not word.startswith("data.vocab_size=")]


@pytest.mark.long
def test_tokenizers_of_runs_checkpoints_exports_and_files_are_used(tiny, parent, tmp_path):
    exported = tmp_path / "exported"
    export(Run.load(parent), exported, ExportConfig(format="safetensors"))
    expected = Run.load(parent).tokenizer.fingerprint
    checkpoint = parent / "checkpoints/last.ckpt"
    for n, path in enumerate([parent, checkpoint, exported, parent / "tokenizer.json"]):
        name = [f"data.tokenizer={path}", f"name=child{n}"]
        run = Run.load(trained([*without_size(tiny), *name]))
        assert run.tokenizer.fingerprint == expected
        assert run.config["data"]["vocab_size"] == run.config["model"]["vocab_size"] == 290
        assert run.config["data"]["tokenizer"] == str(path)
        assert run.load_model().config.vocab_size == 290


def test_a_resumed_run_keeps_its_tokenizer_without_the_run_it_came_from(tiny, parent):
    words = [*without_size(tiny), f"data.tokenizer={parent}", "callbacks.checkpoint_steps=5"]
    whole = trained([*words, "name=whole"])
    half = trained([*words, "name=half"])
    for path in (half / "checkpoints").iterdir():
        if path.name != "last-1.ckpt":
            path.unlink()
    shutil.rmtree(parent)
    again = trained([*words, "name=half", "resume=auto"])
    assert Run.load(again).tokenizer.fingerprint == Run.load(whole).tokenizer.fingerprint
    weights = {weights_fingerprint(Run.load(folder).load_model()) for folder in (whole, again)}
    assert len(weights) == 1


def test_a_typed_vocabulary_of_another_size_is_refused(tiny, parent):
    for size in ("300", "3000"):
        words = [*without_size(tiny), f"data.vocab_size={size}", f"data.tokenizer={parent}"]
        with pytest.raises(UserError, match=naming(size, "290", str(parent))) as error:
            trained([*words, "name=child"])
        assert error.value.argument == "data.vocab_size"
    same = trained([*without_size(tiny), "data.vocab_size=290", f"data.tokenizer={parent}"])
    assert Run.load(same).tokenizer.vocab_size == 290


def test_another_tokenizer_than_that_of_init_from_is_refused(tiny, parent, tmp_path):
    words = [*without_size(tiny), f"init_from={parent}", "name=child"]
    other = tmp_path / "other.json"
    Tokenizer.train(["some other text"], 290).save(other)
    with pytest.raises(UserError, match=naming(str(parent), str(other))) as error:
        trained([*words, f"data.tokenizer={other}"])
    assert error.value.argument == "data.tokenizer"
    child = trained([*words, f"data.tokenizer={parent}"])
    assert Run.load(child).tokenizer.fingerprint == Run.load(parent).tokenizer.fingerprint


@pytest.mark.parametrize("kind", ["nowhere", "empty folder", "damaged", "text"])
def test_tokenizers_that_are_none_are_one_line(tiny, tmp_path, kind):
    path = tmp_path / "given"
    if kind != "nowhere":
        path.mkdir()
    if kind == "damaged":
        (path / "tokenizer.json").write_text('{"model": {')
    if kind == "text":
        path = tmp_path / "train.txt"
    with pytest.raises(UserError, match=naming(str(path))) as error:
        trained([*tiny, f"data.tokenizer={path}"])
    assert error.value.argument == "data.tokenizer"
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_model_has_as_many_rows_as_the_stories_give_tokens(tiny, caplog):
    words = [*without_size(tiny), "data.vocab_size=5000", "callbacks.checkpoint_steps=5"]
    run = Run.load(trained([*words, "name=few"]))
    size = run.tokenizer.vocab_size
    assert size < 1000
    assert run.load_model().config.vocab_size == run.config["model"]["vocab_size"] == size
    parameters = run.load_model().n_parameters
    assert read_summary(run.folder)["parameters"] == parameters
    assert f"{parameters:,}" in (run.folder / "report.html").read_text()
    assert re.search(naming(f"{size:,}", "data.vocab_size=5,000"), caplog.text)
    for path in (run.folder / "checkpoints").iterdir():
        if path.name != "last-1.ckpt":
            path.unlink()
    again = Run.load(trained([*words, "name=few", "resume=auto"]))
    assert again.load_model().config.vocab_size == size
    assert json.loads((again.folder / "summary.json").read_text())["parameters"] == parameters


def test_a_model_with_more_rows_than_tokens_keeps_them(tiny):
    run = Run.load(trained([*tiny, "model.vocab_size=320", "name=more"]))
    assert (run.tokenizer.vocab_size, run.load_model().config.vocab_size) == (300, 320)


def test_a_config_from_python_needs_the_vocabulary_size_only_once(tiny):
    config = composed([*tiny, "name=python"])
    rows = dataclasses.replace(config.model, vocab_size=GPTConfig.vocab_size)  # not set
    config = dataclasses.replace(config, model=rows)
    run = train(config)
    assert run.config["model"]["vocab_size"] == run.tokenizer.vocab_size == 300
    again = train(dataclasses.replace(config, resume="auto"))
    assert again.folder == run.folder
