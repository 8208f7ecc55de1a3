"""Runs that are resumed after they ended before their first checkpoint or their summary."""

from pathlib import Path

import pytest

from minigpt.core.files import write_json
from minigpt.runs.records import read_metrics, read_summary
from tests.conftest import trained_folder
from tests.training.test_loop import fail_at_step


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


def test_run_that_ended_before_its_summary_gets_one_when_it_is_resumed(parent: Path):
    summary, rows = read_summary(parent), read_metrics(parent)
    losses = {name: summary[name] for name in ("val/loss", "val/perplexity", "best_val_loss")}
    for content in (None, {**summary, "status": "failed"}):
        (parent / "summary.json").unlink()
        if content is not None:
            write_json(parent / "summary.json", content)
        trained_folder([f"resume={parent}"])
        again = read_summary(parent)
        assert again["status"] == "finished"
        assert {name: again[name] for name in losses} == losses
        assert [row["step"] for row in read_metrics(parent)] == [row["step"] for row in rows]
    assert (parent / "report.html").stat().st_mtime_ns > 0
