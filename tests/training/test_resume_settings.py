"""Which run is resumed, its lock, and what may be typed with `resume`."""

import dataclasses
import logging
import re
from pathlib import Path

import pytest
import yaml

from minigpt import train
from minigpt.core.settings import UserError
from minigpt.runs.folder import Run
from minigpt.runs.records import read_metrics
from minigpt.training.config import BudgetConfig
from minigpt.training.resume_settings import budget_error, check_settings, run_lock
from tests.conftest import composed, naming, trained_folder


def test_larger_budget_is_named_before_the_download_that_follows_it(tiny: list[str], parent: Path):
    before = composed([*tiny, "name=parent"])
    data = dataclasses.replace(before.data, download_tokens=2560)
    larger = dataclasses.replace(before, data=data, budget=BudgetConfig(tokens=2560))
    with pytest.raises(UserError) as error:
        check_settings(larger, before, parent)
    assert (error.value.argument, error.value.command is not None) == ("budget.tokens", True)


@pytest.mark.parametrize("error", [OSError(37, "No locks available"), NotImplementedError()])
def test_a_folder_without_locks_is_an_error(tmp_path, monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("minigpt.training.resume_settings.FileLock.acquire", fail)
    with pytest.raises(UserError, match=naming("runs_dir", "lock")):
        run_lock(tmp_path)


def test_resume_refuses_other_settings_and_stories(parent: Path):
    with pytest.raises(UserError, match=re.escape("seed=3")) as error:
        train(composed([f"resume={parent}", "seed=3"]))
    assert error.value.argument == "resume"
    with pytest.raises(UserError) as error:
        train(composed([f"resume={parent}", "budget.tokens=9e6"]))
    assert error.value.argument == "budget.tokens"
    with pytest.raises(UserError) as error:
        train(composed([f"resume={parent}"]), stories=["A story."])
    assert error.value.argument == "stories"
    assert train(composed([f"resume={parent}"])).folder == parent


def test_settings_that_a_resumed_run_ignores_are_warned_about(parent: Path, caplog):
    config = composed([f"resume={parent}"])
    data = dataclasses.replace(config.data, batch_size=64)
    train(config)
    assert not any(record.levelno == logging.WARNING for record in caplog.records)
    train(dataclasses.replace(config, seed=3, data=data))
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert re.search(naming(str(parent), "seed=3", "data.batch_size=64"), record.getMessage())


def test_larger_budget_of_a_run_without_typed_settings_suggests_no_command(parent: Path):
    settings = yaml.safe_load((parent / "config.yaml").read_text(encoding="utf-8"))
    (parent / "config.yaml").write_text(yaml.safe_dump(settings | {"overrides": []}))
    error = budget_error(parent, 10_000)
    assert error is not None
    assert error.command is None
    assert error.fix["init_from"] == str(parent)
    assert error.fix["budget.tokens"] == 10_000 - 1280


def test_resume_accepts_the_words_of_the_run(parent: Path):
    words = Run.load(parent).config["overrides"]
    config = dataclasses.replace(composed(words), resume=str(parent), name=None)
    assert train(config).folder == parent


@pytest.mark.parametrize("steps", [0, 7])
def test_resume_auto_continues_the_run_of_that_name_or_starts_it(
    steps: int, tiny: list[str], monkeypatch: pytest.MonkeyPatch
):
    """With step 0 the run is killed before its first checkpoint."""
    command = [*tiny, "budget.tokens=640", "name=mine", "resume=auto"]
    command += ["callbacks.checkpoint_steps=2"]

    def fail(self, batch, batch_idx) -> None:
        if self.global_step == steps:
            raise RuntimeError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr("minigpt.training.module.GPTModule.on_train_batch_start", fail)
        with pytest.raises(RuntimeError, match="interrupted"):
            trained_folder(command)
    steps_run: list[int] = []
    monkeypatch.setattr(
        "minigpt.training.module.GPTModule.on_train_batch_start",
        lambda self, *_: steps_run.append(self.global_step),
    )
    folder = trained_folder(command)
    assert folder.name == "mine"
    assert steps_run == list(range(max(0, steps - 1), 10))
    assert [row["step"] for row in read_metrics(folder) if "lr" in row] == list(range(1, 11))
    assert trained_folder(command) == folder  # the run is complete


def test_resume_auto_needs_a_name(tiny: list[str]):
    with pytest.raises(UserError, match=naming("resume", "name")):
        trained_folder([*tiny, "resume=auto"])
