"""`make chaos`: tests that are too long for `make test`."""

from pathlib import Path

import pytest

from tests.conftest import tiny_overrides
from tests.killing import assert_same, kill_and_resume
from tests.processes import CHECKPOINT, STEP, VALIDATION, Training

KILLS, STEPS = 50, 700


@pytest.mark.timeout(3600)
def test_fifty_kills_do_not_change_a_run(tmp_path: Path):
    command = [
        *tiny_overrides(tmp_path),
        f"budget.tokens={64 * STEPS}",
        "model.dropout=0.1",
        "trainer.log_every_n_steps=3",
        "trainer.n_validations=70",
        "callbacks.checkpoint_steps=4",
        "callbacks.keep_checkpoints=3",
    ]
    whole = Training([*command, "name=whole"], tmp_path / "whole.txt")
    assert whole.wait() == 0, whole.output_text()
    killed_in = kill_and_resume(command, tmp_path, KILLS, seed=2)
    assert len(killed_in) == KILLS
    assert {STEP, VALIDATION, CHECKPOINT} <= set(killed_in)
    assert_same(tmp_path / "runs/killed", tmp_path / "runs/whole")
