"""Runs that are resumed: what may be typed, and what is left when a run cannot start."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.callbacks import Callback

from minigpt import train
from minigpt.core.files import write_json
from minigpt.core.settings import UserError
from minigpt.data.config import DataConfig
from minigpt.runs.folder import Run
from minigpt.runs.records import read_metrics, read_summary
from minigpt.training.assembly import config_text
from minigpt.training.config import BudgetConfig, TrainConfig
from minigpt.training.resume_settings import budget_error, check_settings, run_lock
from tests.conftest import composed, naming, trained_folder
from tests.training.test_loop import fail_at_step


def test_larger_budget_is_named_before_the_download_that_follows_it(tiny: list[str]):
    folder = trained_folder([*tiny, "name=done"])
    before = composed([*tiny, "name=done"])
    data = dataclasses.replace(before.data, download_tokens=2560)
    larger = dataclasses.replace(before, data=data, budget=BudgetConfig(tokens=2560))
    with pytest.raises(UserError) as error:
        check_settings(larger, before, folder)
    assert (error.value.argument, error.value.command is not None) == ("budget.tokens", True)


def test_run_that_starts_over_has_only_the_commit_of_its_new_code(tiny: list[str], monkeypatch):
    start_over = [*tiny, "name=again", "resume=auto"]
    with monkeypatch.context() as patch:
        patch.setattr("minigpt.training.assembly.source_commit", lambda: "old")
        hook = "minigpt.training.module.GPTModule.on_train_batch_start"
        patch.setattr(hook, fail_at_step(1))
        with pytest.raises(RuntimeError, match="interrupted"):
            trained_folder(start_over)
    monkeypatch.setattr("minigpt.training.assembly.source_commit", lambda: "new")
    folder = trained_folder(start_over)
    assert read_summary(folder)["commit"] == "new"


def test_run_that_ended_before_its_summary_gets_one_when_it_is_resumed(tiny: list[str]):
    folder = trained_folder([*tiny, "name=killed"])
    summary, rows = read_summary(folder), read_metrics(folder)
    losses = {name: summary[name] for name in ("val/loss", "val/perplexity", "best_val_loss")}
    for content in (None, {**summary, "status": "failed"}):
        (folder / "summary.json").unlink()
        if content is not None:
            write_json(folder / "summary.json", content)
        trained_folder([f"resume={folder}"])
        again = read_summary(folder)
        assert again["status"] == "finished"
        assert {name: again[name] for name in losses} == losses
        assert [row["step"] for row in read_metrics(folder)] == [row["step"] for row in rows]
    assert (folder / "report.html").stat().st_mtime_ns > 0


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


def test_larger_budget_of_a_run_without_typed_settings_suggests_no_command(parent: Path):
    settings = yaml.safe_load((parent / "config.yaml").read_text(encoding="utf-8"))
    (parent / "config.yaml").write_text(yaml.safe_dump(settings | {"overrides": []}))
    error = budget_error(parent, 10_000)
    assert error is not None
    assert error.command is None
    assert error.fix["init_from"] == str(parent)
    assert error.fix["budget.tokens"] == 10_000 - 1280


def test_config_too_long_to_be_read_again_is_refused():
    files = tuple(f"{'x' * 60}{n}.txt" for n in range(1000))
    config = TrainConfig(data=DataConfig(source="text", train_files=files))
    with pytest.raises(UserError, match=naming("config.yaml", "data.train_files")):
        config_text(config, "run")


def test_resumed_run_that_cannot_start_keeps_its_summary(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
):
    command = [*tiny, "name=broken", "resume=auto", "callbacks.checkpoint_steps=5"]
    with monkeypatch.context() as patch:
        patch.setattr("minigpt.training.module.GPTModule.on_train_batch_start", fail_at_step(13))
        with pytest.raises(RuntimeError, match="interrupted"):
            trained_folder(command)
    folder = Path(composed(command).runs_dir, "broken")
    before = read_summary(folder)

    class Broken(Callback):
        def on_fit_start(self, trainer, pl_module) -> None:
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        trained_folder(command, callbacks=[Broken()])
    assert read_summary(folder) == before
    assert before["steps"] == 13


def test_resume_accepts_the_words_of_the_run(parent: Path):
    words = Run.load(parent).config["overrides"]
    config = dataclasses.replace(composed(words), resume=str(parent), name=None)
    assert train(config).folder == parent
