"""Checkpointing: a killed run loses about ten minutes at most and resumes bit-exactly.

Ten minutes is the default of `checkpoint_minutes`. A checkpoint is the state of training between
two steps. Except at a validation, the state is collected at the end of a step and written at the
start of the next step, because only then metrics.csv has the row of the earlier step. A resumed run
therefore finds every row up to the step of its checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from minigpt.core.console import log
from minigpt.core.settings import UserError
from minigpt.runs.checkpoint import write_checkpoint
from minigpt.runs.names import BEST, CHECKPOINTS, LAST
from minigpt.training.config import CallbacksConfig
from minigpt.training.loggers import MetricsCsv
from minigpt.training.module import GPTModule

# Errors when a disk is full or read-only, or a quota or a size limit is exceeded.
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

_CHECKPOINT_DUE = 1  # not a signal: the signals that are handled below have larger numbers


@contextlib.contextmanager
def full_disk_in_one_line(folder: Path) -> Iterator[None]:
    """Turn the OSError of a full disk into a UserError, because a traceback would not help.

    Args:
        folder: the run folder; the error suggests resuming this run.

    Raises:
        UserError: the disk is full or read-only.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        message = f"cannot write {error.filename or folder} ({error.strerror})"
        message += ": free some space there"
        raise UserError(message, command=("train", {"resume": str(folder)})) from None


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoint plugin: atomic writes with a checksum, and a rotation of last.ckpt.

    A checkpoint that is saved while `hold` is set stays in memory until `write_held` is called.

    Args:
        keep: number of latest checkpoints to keep, including last.ckpt.
    """

    def __init__(self, keep: int) -> None:
        self.keep, self.hold = keep, False
        self._pending: tuple[dict[str, Any], Path] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write the checkpoint, or hold it in memory if `hold` is set.

        A held checkpoint contains the tensors of the model itself, not copies. Call `write_held`
        before these tensors change.

        Args:
            checkpoint: the content, as collected by Lightning.
            path: file to write.
            storage_options: ignored.

        Raises:
            OSError: the file cannot be written; the previous checkpoint is unchanged.
        """
        if self.hold:
            self._pending = checkpoint, Path(path)
            return
        path = Path(path)
        path.parent.mkdir(exist_ok=True)
        write_checkpoint(path, checkpoint, self.keep if path.stem == LAST else 1)

    def write_held(self) -> None:
        """Write the held checkpoint, if there is one."""
        if self._pending is not None:
            checkpoint, self._pending, self.hold = self._pending, None, False
            self.save_checkpoint(*checkpoint)


class Checkpoints(Callback):
    """Write best.ckpt at the lowest validation loss, and last.ckpt at regular intervals.

    last.ckpt is written after each validation, at intervals of minutes and of steps, and when a
    signal asks the run to stop: Ctrl-C, SIGTERM or, under Slurm, SIGUSR1. A second Ctrl-C stops the
    run immediately. After SIGUSR1, the job is put back into the queue. A run that fails keeps its
    latest checkpoints.

    Args:
        module: the model in training; its weights are checked before they are written.
        folder: the run folder.
        keep: intervals of last.ckpt and number of checkpoints to keep.

    Attributes:
        files: the plugin that writes the checkpoints; give it to the trainer.
        best_val_loss: lowest validation loss so far, in nats per token.
    """

    def __init__(self, module: GPTModule, folder: Path, keep: CallbacksConfig) -> None:
        self.module, self.folder, self.keep = module, folder / CHECKPOINTS, keep
        self.files = CheckpointFiles(keep.keep_checkpoints)
        self.best_val_loss = math.inf
        self._last_write = time.monotonic()
        self._signal = 0  # signal that this process received
        self._stop_signal = 0  # signal for which all processes stop
        self._is_saved = False  # last.ckpt holds the current state
        self._handlers: dict[int, Any] = {}  # previous handlers of the signals

    def on_train_start(self, *_: Any, **__: Any) -> None:
        """Replace Lightning's signal handlers, which could stop the run in the middle of a step."""
        if threading.current_thread() is not threading.main_thread():
            return
        signals = [signal.SIGINT, signal.SIGTERM]
        if "SLURM_JOB_ID" in os.environ:
            signals.append(signal.SIGUSR1)
        self._handlers = {number: signal.signal(number, self._ask_to_stop) for number in signals}

    def _ask_to_stop(self, number: int, _: Any) -> None:
        again = "; press Ctrl-C again to stop now" if number == signal.SIGINT else ""
        log.info("%s: stopping after this step%s", signal.Signals(number).name, again)
        self._signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._handlers[number])

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Write the held checkpoint, and stop the run if a signal asked for this."""
        self.files.write_held()
        if self._stop_signal and self._is_saved:
            if self._stop_signal == signal.SIGINT:
                raise KeyboardInterrupt
            if self._stop_signal == signal.SIGUSR1 and trainer.is_global_zero:
                _requeue()
            raise SIGTERMException(128 + self._stop_signal)  # the exit code
        self._is_saved = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect a checkpoint if one is due or the run is about to stop."""
        assert isinstance(trainer.val_check_batch, int)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the middle of a step
        ends = trainer.global_step >= self.module.n_steps  # the last step is always validated
        validates_next = ends or not (batch_idx + 1) % trainer.val_check_batch
        due = time.monotonic() - self._last_write > 60 * self.keep.checkpoint_minutes
        steps = self.keep.checkpoint_steps
        due |= steps is not None and trainer.global_step % steps == 0
        urgency = self._signal or (_CHECKPOINT_DUE if due else 0)
        if trainer.world_size > 1:  # all processes stop and save together, or none does
            own = torch.tensor(urgency, device=trainer.strategy.root_device)
            urgency = int(trainer.strategy.reduce(own, reduce_op="max"))
        self._stop_signal = urgency if urgency != _CHECKPOINT_DUE else 0
        if urgency and not validates_next:
            self.files.hold = True
            self._save(trainer, LAST)

    def on_validation_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Write last.ckpt, and also best.ckpt if the validation loss is the lowest so far."""
        if (loss := float(trainer.callback_metrics["val/loss"])) < self.best_val_loss:
            self.best_val_loss = loss
            self._save(trainer, BEST)
        self._save(trainer, LAST)

    def teardown(self, *_: Any, **__: Any) -> None:
        """Restore the signal handlers."""
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._ask_to_stop:
                signal.signal(number, handler)

    def _save(self, trainer: L.Trainer, name: str) -> None:
        self.module.check_weights()
        self._last_write = time.monotonic()
        for logger in trainer.loggers:
            logger.sync() if isinstance(logger, MetricsCsv) else logger.save()
        trainer.save_checkpoint(self.folder / f"{name}.ckpt")
        self._is_saved = name == LAST

    def state_dict(self) -> dict[str, Any]:
        """Return the state to store in a checkpoint."""
        return {"best_val_loss": self.best_val_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the lowest validation loss from a checkpoint."""
        self.best_val_loss = state_dict["best_val_loss"]


def _requeue() -> None:
    """Put this Slurm job back into the queue; Slurm does not do this after a warning signal."""
    names = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
    array = "_".join(os.environ[name] for name in names if name in os.environ)
    job = array or os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)  # noqa: S603, S607
        log.info("Slurm job %s was put back into the queue", job)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        log.warning("Slurm job %s could not be requeued: %s", job, " ".join(str(reason).split()))
