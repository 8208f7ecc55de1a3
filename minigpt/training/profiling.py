"""Profile of a few training steps: a trace, and a table of operators and kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile

from minigpt.core.console import log
from minigpt.core.files import write_text
from minigpt.training.module import GPTModule

PROFILE = "profile"  # folder in the run folder
_TABLE = "operators.txt"
_FIRST, _STEPS = 10, 10  # the first steps load libraries, compile and record
_ROWS = 40


class Profile(Callback):
    """Profile ten steps near the start of a run, and then write trace.json and operators.txt.

    If a resumed run has no profile yet, its steps are counted from the step at which it resumes. If
    fewer than 20 steps remain, the second half of the remaining steps is profiled.

    Args:
        module: the model in training.
        folder: folder of the two files.
    """

    def __init__(self, module: GPTModule, folder: Path) -> None:
        self.module, self.folder = module, folder
        self.first = self.last = -1  # of the steps to profile; -1: none
        self._profile: profile | None = None

    def on_train_start(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Choose the steps to profile, unless the run already has a profile."""
        if (self.folder / _TABLE).is_file():
            return
        start, end = trainer.global_step, self.module.n_steps
        self.first = start + min(_FIRST, (end - start) // 2)
        self.last = min(self.first + _STEPS, end)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Start the profiler before the first of the steps to profile."""
        if trainer.global_step == self.first and self._profile is None and trainer.is_global_zero:
            on_gpu = trainer.strategy.root_device.type == "cuda"
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
            self._profile = profile(activities=activities, acc_events=True)
            self._profile.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Write trace.json and operators.txt after the last of the profiled steps."""
        if self._profile is None or trainer.global_step < self.last:
            return
        result, self._profile = self._profile, None
        on_gpu = trainer.strategy.root_device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        result.stop()
        self.folder.mkdir(exist_ok=True)
        column = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        table = result.key_averages().table(sort_by=column, row_limit=_ROWS)
        result.export_chrome_trace(str(self.folder / "trace.json"))
        write_text(self.folder / _TABLE, table)
        log.info("profile: %s", self.folder)
