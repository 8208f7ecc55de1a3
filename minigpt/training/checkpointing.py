"""Checkpointing: a killed run loses about ten minutes at most and resumes bit-exactly.

Ten minutes is the default of `checkpoint_minutes`. A checkpoint is the state of training between
two steps. The state is collected at the end of a step, but written at the start of the next step,
because Lightning writes the row of metrics.csv between these two moments. A resumed run therefore
finds every row up to the step of its checkpoint.

If a validation follows a step, the state is collected at the start of the validation. It is written
only if a signal during the validation stops the run or asks for a checkpoint. A run that is resumed
from this state repeats the validation. After a complete validation, the state is collected and
written immediately.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
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
from minigpt.core.distributed import global_rank, in_slurm_job
from minigpt.core.files import DISK_FULL
from minigpt.core.settings import DiskFullError, UserError
from minigpt.core.signals import REPEAT_SECONDS, SIGHUP, SIGUSR1, is_ignored, watch
from minigpt.runs.checkpoint import write_checkpoint
from minigpt.runs.folder import last_checkpoints
from minigpt.runs.names import BEST, CHECKPOINTS, LAST
from minigpt.training.config import CallbacksConfig
from minigpt.training.loggers import MetricsCsv
from minigpt.training.module import GPTModule

VALIDATES = "validates"  # entry of a checkpoint: the run was stopped during the validation

_CHECKPOINT_DUE = 1  # differs from the exit codes for signals, which are above 128


@contextlib.contextmanager
def full_disk_in_one_line(folder: Path) -> Iterator[None]:
    """Turn the OSError of a full or read-only disk into a one-line error without a traceback.

    Args:
        folder: the run folder. If it has a checkpoint, the error suggests resuming the run.

    Raises:
        DiskFullError: the disk is full or read-only.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        message = f"cannot write {error.filename or folder} ({error.strerror})"
        message += ": free some space there, and start again"
        can_resume = bool(last_checkpoints(folder))
        command = ("train", {"resume": str(folder)}) if can_resume else None
        raise DiskFullError(message, command=command) from None


class CheckpointFiles(TorchCheckpointIO):
    """Lightning plugin that writes checkpoints atomically, with checksums, and rotates last.ckpt.

    The previous last.ckpt is renamed to last-1.ckpt, and so on. A last.ckpt that is saved while
    `hold` is set stays in memory until `write_held` is called.

    Args:
        keep: number of latest checkpoints to keep, including last.ckpt.
    """

    def __init__(self, keep: int) -> None:
        self.keep, self.hold = keep, False
        self.is_provisional = False  # last.ckpt precedes a validation; the next replaces it
        self._pending: tuple[dict[str, Any], Path] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write the checkpoint; if it is last.ckpt and `hold` is set, hold it in memory instead.

        A held checkpoint contains the tensors of the model itself, not copies. Call `write_held`
        before these tensors change.

        Args:
            checkpoint: the content, as collected by Lightning.
            path: file to write.
            storage_options: ignored.

        Raises:
            OSError: the file cannot be written; the previous checkpoint is unchanged.
        """
        path = Path(path)
        if self.hold and (path.parent.name, path.stem) == (CHECKPOINTS, LAST):
            self._pending = checkpoint, path
            return
        path.parent.mkdir(exist_ok=True)
        is_kept = path.stem == LAST and not self.is_provisional
        write_checkpoint(path, checkpoint, self.keep if is_kept else 1)
        if path.stem == LAST:
            self.is_provisional = VALIDATES in checkpoint

    def write_held(self) -> None:
        """Write the checkpoint that is held in memory, if there is one."""
        pending = self._pending
        self.drop_held()
        if pending is not None:
            self.save_checkpoint(*pending)

    def drop_held(self) -> None:
        """Discard the checkpoint that is held in memory, if there is one, and clear `hold`."""
        self._pending, self.hold = None, False


class Checkpoints(Callback):
    """Write best.ckpt at the lowest validation loss, and last.ckpt at regular intervals.

    last.ckpt is written after each validation, at intervals of minutes and of steps, and when a
    signal asks the run to stop. The signals are SIGINT (Ctrl-C), SIGTERM, SIGHUP and, under Slurm,
    SIGUSR1. SIGHUP does not stop a run without a terminal: the run writes last.ckpt and continues.
    After SIGUSR1, the Slurm job is put back into the queue.

    When a signal asks the run to stop, the run first completes its current step. There are two
    exceptions: during the first step and during a validation, the run stops immediately. A second
    Ctrl-C stops the run immediately at any time. If the run fails, its latest checkpoints remain.

    Args:
        module: the model in training. Before its weights are written, they are checked for nan
            and infinity.
        folder: the run folder.
        keep: intervals of last.ckpt and number of checkpoints to keep.
        validates: whether the run was stopped during a validation. If so, the resumed run starts by
            repeating this validation.

    Attributes:
        files: the plugin that writes the checkpoints; give it to the trainer.
        best_val_loss: lowest validation loss so far, in nats per token.
        is_best: whether the latest validation had the lowest loss so far.
    """

    def __init__(
        self, module: GPTModule, folder: Path, keep: CallbacksConfig, validates: bool = False
    ) -> None:
        self.module, self.folder, self.keep = module, folder / CHECKPOINTS, keep
        self.files = CheckpointFiles(keep.keep_checkpoints)
        self.best_val_loss, self.is_best = math.inf, False
        self._validates = self.files.is_provisional = validates
        self._last_write = time.monotonic()
        self._is_due = False  # the next step or validation batch writes a checkpoint
        self._signal, self._signal_time = 0, 0.0  # signal that this process received
        self._stop_code = 0  # exit code with which all processes stop
        self._is_saved = False  # last.ckpt holds the current state
        # Whether a signal stops the run at once. It does before the first update, because compiling
        # the model takes minutes, and in a validation, because the state was collected before it.
        self._stops_at_once, self._are_states_checked = True, False
        self._handlers: dict[int, Any] = {}  # previous handlers of the signals

    def on_train_start(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Install signal handlers, and repeat the validation in which the run was stopped, if any.

        The new handlers replace Lightning's, which could stop the run in the middle of a step.
        """
        if threading.current_thread() is threading.main_thread():
            signals: list[int] = [signal.SIGINT, signal.SIGTERM]
            if not is_ignored(SIGHUP):
                signals.append(SIGHUP)
            if in_slurm_job():
                signals.append(SIGUSR1)
            self._handlers = {number: signal.signal(number, self._on_signal) for number in signals}
        if self._validates:
            trainer.validating = True  # what Lightning does after a step
            validation = trainer.fit_loop.epoch_loop.val_loop
            validation.restarting = False
            validation.run()
            trainer.training = True
            trainer.should_stop = trainer.global_step >= self.module.n_steps

    def _on_signal(self, number: int, _: Any) -> None:
        if not watch.answer(number):
            self._is_due = True
            return
        name, again = signal.Signals(number).name, False
        if self._signal:
            late = time.monotonic() - self._signal_time > REPEAT_SECONDS
            again = late and number == self._signal == signal.SIGINT
        else:
            self._signal, self._signal_time = number, time.monotonic()
            hint = "; press Ctrl-C again to stop now" if number == signal.SIGINT else ""
            when = "now" if self._stops_at_once else f"after this step{hint}"
            log.info("%s: stopping %s", name, when)
        if self._stops_at_once or again:
            self._stops_at_once = False
            raise self._stop(128 + number)

    def _stop(self, code: int) -> SIGTERMException:
        """Return the exception that ends the run with the exit code `code`.

        If `code` is that of SIGUSR1, this method also requeues the Slurm job.
        """
        if SIGUSR1 and code == 128 + SIGUSR1 and global_rank() == 0:
            _requeue()
        return SIGTERMException(code)

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        """Write any checkpoint held in memory; then stop the run if a signal asked it to."""
        self.files.write_held()
        if self._stop_code and self._is_saved:
            raise self._stop(self._stop_code)
        self._is_saved = False

    def on_before_optimizer_step(self, *_: Any, **__: Any) -> None:
        """From now on, let a signal stop the run only at the end of a step.

        This ends when the next validation begins. A second Ctrl-C still stops the run immediately.
        """
        self._stops_at_once, watch.patient = False, True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect a checkpoint if one is due or a signal asks the run to stop.

        If a validation follows, `on_validation_start` collects the checkpoint instead.
        """
        assert isinstance(trainer.val_check_batch, int)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the middle of a step
        ends = trainer.global_step >= self.module.n_steps  # the last step is always validated
        validates_next = ends or not (batch_idx + 1) % trainer.val_check_batch
        due = time.monotonic() - self._last_write > 60 * self.keep.checkpoint_minutes
        steps = self.keep.checkpoint_steps
        due |= self._is_due or (steps is not None and trainer.global_step % steps == 0)
        urgency = 128 + self._signal if self._signal else _CHECKPOINT_DUE * due
        if trainer.world_size > 1:  # all processes stop and save together, or none does
            own = torch.tensor(urgency, device=trainer.strategy.root_device)
            urgency = int(trainer.strategy.reduce(own, reduce_op="max"))
        self._stop_code = urgency if urgency != _CHECKPOINT_DUE else 0
        self._is_due = bool(urgency) and validates_next  # the validation writes it
        if urgency and not validates_next:
            self.files.hold = True
            self._save(trainer, LAST)

    def on_validation_start(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Collect the state for a checkpoint; then stop the run if a signal asked it to."""
        self._validates = self.files.hold = True
        self._save(trainer, LAST)
        if code := self._stop_code or (128 + self._signal if self._signal else 0):
            raise self._stop(code)
        self._stops_at_once = True

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """If a checkpoint is due, write the one that was collected before this validation.

        If a signal should have stopped the run, but the exception from its handler was lost, stop
        the run now. Python discards an exception that a signal handler raises while a `__del__`
        method runs.
        """
        if self._signal:
            raise self._stop(128 + self._signal)
        if self._is_due:
            self._is_due = False
            self.files.write_held()

    def on_validation_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Write last.ckpt, and also best.ckpt if the validation loss is the lowest so far."""
        self._stops_at_once = self._validates = False
        self.files.drop_held()
        loss = float(trainer.callback_metrics["val/loss"])
        self.is_best = loss < self.best_val_loss
        if self.is_best:
            self.best_val_loss = loss
            self._save(trainer, BEST)
        self._save(trainer, LAST)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """If the run is stopped during a validation, write the checkpoint held in memory."""
        self._stops_at_once = False
        if is_ignored(signal.SIGINT):  # by Lightning; a second Ctrl-C should stop at once
            signal.signal(signal.SIGINT, self._on_signal)
        if self._validates and isinstance(exception, KeyboardInterrupt | SIGTERMException):
            self.files.write_held()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Restore the signal handlers."""
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, handler)

    def _save(self, trainer: L.Trainer, name: str) -> None:
        self.module.check_weights()
        self._last_write = time.monotonic()
        for logger in trainer.loggers:
            logger.sync() if isinstance(logger, MetricsCsv) else logger.save()
        trainer.save_checkpoint(self.folder / f"{name}.ckpt")
        self._is_saved = name == LAST

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Mark the checkpoint if the validation at its step is not complete.

        A run that resumes from a marked checkpoint repeats the validation. The first call of this
        method also checks that the states of all callbacks can be loaded again.

        Raises:
            UserError: the state of a callback contains an object that is neither a tensor nor a
                plain Python value.
        """
        if self._validates:
            checkpoint[VALIDATES] = True
        if not self._are_states_checked:
            for name, state in checkpoint.get("callbacks", {}).items():
                _check_readable(name, state)
            self._are_states_checked = True

    def state_dict(self) -> dict[str, Any]:
        """Return the state to store in a checkpoint."""
        return {"best_val_loss": self.best_val_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the lowest validation loss from a checkpoint."""
        self.best_val_loss = state_dict["best_val_loss"]


class CallbackStates(Callback):
    """Save checkpoints again after the hooks of users' callbacks, which may change their state.

    Lightning calls callbacks in their order. `Checkpoints` comes before the users' callbacks, so
    that a checkpoint exists even if a hook of such a callback fails. This callback comes last.

    Args:
        checkpoints: the callback that saves the checkpoints.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Collect the checkpoint of this step again, if there is one."""
        if self.checkpoints.files.hold:
            self.checkpoints._save(trainer, LAST)

    def on_validation_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Replace the checkpoints that were written after this validation."""
        if self.checkpoints.is_best:
            self.checkpoints._save(trainer, BEST)
        self.checkpoints.files.is_provisional = True
        self.checkpoints._save(trainer, LAST)


def _check_readable(name: str, state: Any) -> None:
    """Raise UserError if the state of a callback contains anything but tensors and plain values.

    `read_checkpoint` would refuse a checkpoint with such a state.

    Args:
        name: name of the callback, for the error message.
        state: the state, from `state_dict` of the callback.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError:
        problem = f"the state_dict of {name} must contain only tensors and plain Python values"
        raise UserError(problem, "callbacks") from None


def _requeue() -> None:
    """Put this Slurm job back into the queue; Slurm itself only sends SIGUSR1 as a warning."""
    names = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
    array = "_".join(os.environ[name] for name in names if name in os.environ)
    job = array or os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)  # noqa: S603, S607
        log.info("Slurm job %s was put back into the queue", job)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        log.warning("Slurm job %s could not be requeued: %s", job, " ".join(str(reason).split()))
