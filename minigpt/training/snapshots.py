"""Snapshots of the weights during a run, at steps that are spaced on a logarithmic scale."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback

from minigpt.runs.checkpoint import write_snapshot
from minigpt.runs.names import SNAPSHOTS
from minigpt.training.module import GPTModule


def snapshot_steps(n: int, n_steps: int) -> list[int]:
    """Return `n` steps from 0 to `n_steps`, evenly spaced on the scale log(1 + step).

    Rounding would make some of the first steps equal, so each step is at least 1 more than the
    previous one.

    Args:
        n: number of snapshots, from 2 to n_steps + 1.
        n_steps: number of updates in the run.
    """
    steps = [round(math.expm1(i / (n - 1) * math.log1p(n_steps))) for i in range(n)]
    for i in range(1, n):
        steps[i] = max(steps[i], steps[i - 1] + 1)
    return steps


class Snapshots(Callback):
    """Write the weights to snapshots/step-XXXXXX.safetensors at the steps of `snapshot_steps`.

    The metadata of a file contains the step, the number of tokens so far, and the training loss of
    the latest batch, in nats per token. A resumed run keeps the snapshots that exist already.

    Args:
        module: the model in training. The first process must have all weights, so fsdp is excluded.
        folder: the run folder.
        n: number of snapshots, from 2 to the number of updates plus 1.
    """

    def __init__(self, module: GPTModule, folder: Path, n: int) -> None:
        self.module, self.folder = module, folder / SNAPSHOTS
        self.steps = set(snapshot_steps(n, module.n_steps))

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """For a new run, write the initial weights."""
        self.folder.mkdir(exist_ok=True)
        if trainer.global_step == 0:
            self._write(0, math.nan)

    @rank_zero_only
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Write a snapshot if one is due at this step."""
        if (step := trainer.global_step) in self.steps and step > 0:
            assert self.module.train_loss is not None
            self._write(step, float(self.module.train_loss))

    def _write(self, step: int, loss: float) -> None:
        path = self.folder / f"step-{step:06d}.safetensors"
        if not path.is_file():  # the hook may be called for several batches at one step
            tokens = step * self.module.tokens_per_step
            values = {"step": step, "tokens": tokens, "train_loss": loss}
            write_snapshot(path, self.module.net, self.module.hparams, values)
