"""`make chaos`: tests that are too long for `make test`."""

import signal
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import tiny_overrides
from tests.killing import Trouble, assert_same, kill_and_resume
from tests.processes import CHECKPOINT, STEP, VALIDATION, Training
from tests.surroundings import Disk, Terminal, write_into_broken_pipe

KILLS, STEPS = 50, 700


@pytest.mark.timeout(3600)
def test_fifty_kills_do_not_change_a_run(tmp_path: Path):
    """Every third process ends by SIGHUP, or after losing its terminal, its pipe or its disk."""
    disk = Disk(tmp_path / "disk")
    runs = disk.folder / "runs"
    command = [
        *tiny_overrides(tmp_path),
        f"runs_dir={runs}",
        f"budget.tokens={64 * STEPS}",
        "model.dropout=0.1",
        "trainer.log_every_n_steps=3",
        "trainer.n_validations=70",
        "callbacks.checkpoint_steps=4",
        "callbacks.keep_checkpoints=3",
    ]
    try:
        whole = Training([*command, "name=whole"], tmp_path / "whole.txt")
        assert whole.wait() == 0, whole.output_text()
        troubles = [hang_up, close_terminal, break_pipe, partial(fill, disk, runs / "killed")]
        killed_in = kill_and_resume(command, tmp_path, KILLS, 2, troubles)
        assert len(killed_in) == KILLS
        assert {STEP, VALIDATION, CHECKPOINT} <= set(killed_in)
        assert_same(runs / "killed", runs / "whole")
    finally:
        disk.close()


def hang_up() -> Trouble:
    def end(training: Training) -> int:
        training.send(signal.SIGHUP)
        return 128 + signal.SIGHUP

    return Terminal().attach, end


def close_terminal() -> Trouble:
    terminal = Terminal()

    def end(training: Training) -> int:
        terminal.close()
        return kill_later(training)

    return terminal.attach, end


def break_pipe() -> Trouble:
    return write_into_broken_pipe, kill_later


def kill_later(training: Training) -> int:
    """Kill a process after ten more steps."""
    n_steps = training.steps + 10
    assert training.wait_until(lambda: training.steps >= n_steps)
    training.send(signal.SIGKILL)
    return -signal.SIGKILL


def fill(disk: Disk, run: Path) -> Trouble:
    def end(training: Training) -> int:
        disk.fill(training, run / "checkpoints/last.ckpt")
        training.wait()
        disk.clear()
        return 1

    return None, end
