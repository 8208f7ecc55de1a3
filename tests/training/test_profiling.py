import contextlib
import json
from pathlib import Path

import pytest

from tests.conftest import trained_folder
from tests.training.test_loop import fail_at_step


def test_profile_writes_a_trace_and_a_table_of_ten_steps(tiny: list[str]):
    folder = trained_folder([*tiny, "trainer.profile=true", "trainer.accumulate_grad_batches=2"])
    trace = json.loads((folder / "profile/trace.json").read_text(encoding="utf-8"))
    name = "Optimizer.step#CombinedOptimizer.step"
    steps = [e for e in trace["traceEvents"] if e.get("name") == name]
    assert len(steps) == 5  # the second half of a run of ten updates
    table = (folder / "profile/operators.txt").read_text(encoding="utf-8")
    assert "aten::" in table
    assert "Self CPU" in table


@pytest.mark.long
def test_profile_of_a_resumed_run_is_of_the_remaining_steps(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "runs/broken"
    command = [*tiny, f"name={folder.name}", "resume=auto", "trainer.profile=true"]
    for step, has_profile in ((13, False), (None, True)):
        with monkeypatch.context() as patch, contextlib.suppress(RuntimeError):
            hook = "minigpt.training.module.GPTModule.on_train_batch_start"
            patch.setattr(hook, fail_at_step(step or 99))
            trained_folder([*command, "callbacks.checkpoint_steps=12"])
        assert (folder / "profile/operators.txt").is_file() is has_profile
    trace = json.loads((folder / "profile/trace.json").read_text(encoding="utf-8"))
    name = "Optimizer.step#CombinedOptimizer.step"
    assert sum(event.get("name") == name for event in trace["traceEvents"]) == 4


def test_run_without_profile_has_no_such_folder(tiny: list[str]):
    assert not (trained_folder([*tiny, "budget.tokens=320"]) / "profile").exists()
