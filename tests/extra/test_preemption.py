"""A scheduler stops several processes at once: they save one checkpoint and continue together."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minigpt.runs.records import Row, read_metrics
from tests.conftest import ROOT, tiny_overrides

TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py"]
STEPS = 400


def start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    job = [
        *tiny_overrides(folder), "trainer=ddp", f"budget.tokens={128 * STEPS}", f"name={name}",
        "resume=auto",
    ]  # fmt: skip
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen([sys.executable, *TORCHRUN, *job], cwd=ROOT, stderr=log)


def measured(folder: Path) -> list[Row]:
    """Return the rows of metrics.csv without the columns of speed."""
    speeds = ("tokens_per_second", "mfu")
    return [
        {name: value for name, value in row.items() if name not in speeds}
        for row in read_metrics(folder)
    ]


@pytest.mark.timeout(300)
def test_torchrun_continues_by_the_same_command_after_sigterm(tmp_path: Path):
    whole = start(tmp_path, "whole")
    log = tmp_path / "log.txt"
    assert whole.wait() == 0, log.read_text()
    folder = tmp_path / "runs/stopped"
    for _ in range(2):
        stopped = start(tmp_path, "stopped")
        before = len(read_metrics(folder))
        while len(read_metrics(folder)) < before + 60:
            assert stopped.poll() is None, log.read_text()
            time.sleep(0.02)
        stopped.send_signal(signal.SIGTERM)
        assert stopped.wait() != 0
        assert (folder / "checkpoints/last.ckpt").is_file()
        assert len(read_metrics(folder)) < STEPS
    end = start(tmp_path, "stopped")
    assert end.wait() == 0, log.read_text()
    assert measured(folder) == measured(tmp_path / "runs/whole")
