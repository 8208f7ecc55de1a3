"""Kill and resume a run many times, and compare it with an uninterrupted run."""

import csv
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from minigpt.runs.checkpoint import is_whole, read_checkpoint
from minigpt.runs.folder import last_checkpoints
from minigpt.runs.names import METRICS, SAMPLES
from tests.processes import CHECKPOINT, STARTING, STEP, VALIDATION, Training

TIMING = {"tokens_per_second", "mfu"}  # columns that no two runs share


# What to call in a new process, and the function that ends it and returns its exit code.
Trouble = tuple[Callable[[], None] | None, Callable[[Training], int]]
Troubles = Sequence[Callable[[], Trouble]]


def kill_and_resume(
    overrides: list[str], folder: Path, kills: int, seed: int, troubles: Troubles = ()
) -> list[int]:
    """Train the run `killed` to its end, with `kills` kills; return its phase at each kill.

    The command line is the same each time. A process is killed after a random number of steps, as
    soon as it is in the next phase of a fixed cycle. Every third process ends by the next of
    `troubles` instead, if there are any.
    """
    generator = random.Random(seed)
    phases = [STEP, CHECKPOINT, VALIDATION, CHECKPOINT, STARTING]
    killed_in: list[int] = []
    command = [*overrides, "name=killed", "resume=auto"]
    while True:
        n = len(killed_in)
        before, end = None, None
        if troubles and n % 3 == 2 and n < kills:
            before, end = troubles[n // 3 % len(troubles)]()
        training = Training(command, folder / "killed.txt", before=before)
        if end is not None:
            n_steps = generator.randint(1, 8)
            assert training.wait_until(lambda t=training, n=n_steps: t.steps >= n)
            code = end(training)
            assert training.wait() == code, training.output_text()
            killed_in.append(training.phase)
        elif n < kills:
            phase, steps = phases[len(killed_in) % len(phases)], generator.randint(1, 8)
            if phase == STARTING:
                training.process.join(generator.uniform(0, 0.5))
            else:
                reached = training.wait_until(
                    lambda t=training, n=steps, p=phase: t.steps >= n and t.phase == p
                )
                assert reached, f"ended after {len(killed_in)} kills: {training.output_text()}"
            training.send(signal.SIGKILL)
            assert training.wait() == -signal.SIGKILL
            killed_in.append(training.phase)
        else:
            assert training.wait() == 0, training.output_text()
            return killed_in


def assert_same(killed: Path, whole: Path) -> None:
    """Assert equal weights, bit for bit, and equal metrics and stories without gaps or repeats."""
    for name in ("last", "last-1", "best"):
        one, other = (read_checkpoint(run / f"checkpoints/{name}.ckpt") for run in (killed, whole))
        assert one["global_step"] == other["global_step"]
        assert_equal(one["state_dict"], other["state_dict"])
        assert_equal(one["optimizer_states"], other["optimizer_states"])
    assert rows(killed) == rows(whole)
    steps = [(row["step"], bool(row["val/loss"])) for row in rows(killed)]
    assert len(steps) == len(set(steps))
    stories = [(run / SAMPLES).read_text(encoding="utf-8") for run in (killed, whole)]
    assert stories[0] == stories[1]
    assert all(map(is_whole, last_checkpoints(killed)))
    assert not list(killed.rglob("*.tmp"))


def assert_equal(one: object, other: object) -> None:
    """Assert that two nested values are equal, tensors bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list) and isinstance(other, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal(left, right)
    else:
        assert one == other


def rows(run: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv without the columns of timing."""
    with (run / METRICS).open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    return [{name: cell for name, cell in row.items() if name not in TIMING} for row in table]
