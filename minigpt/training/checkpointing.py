"""When and how a run is kept, so that a kill at any moment costs minutes and changes no number.

A checkpoint is the state between two steps. It is taken at the end of a step, and written at the
start of the next one, when the row of the step is in metrics.csv: whoever goes on from it finds
every row up to its step.
"""

from __future__ import annotations

import contextlib
import errno
import logging
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

from minigpt.core.settings import UserError
from minigpt.runs.checkpoint import write_checkpoint
from minigpt.runs.names import BEST, CHECKPOINTS, LAST
from minigpt.training.config import CallbacksConfig
from minigpt.training.module import GPTModule

log = logging.getLogger("minigpt")

# What a write fails with on a full, a limited, and a read-only disk.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

_LATE = 1  # beside the numbers of signals: the last checkpoint is old enough for another one


@contextlib.contextmanager
def full_disk_in_one_line(folder: Path) -> Iterator[None]:
    """Turn the OSError of a full disk into a UserError: no traceback helps there."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        message = (
            f"cannot write {error.filename or folder} ({error.strerror}): free some space there"
        )
        raise UserError(message, command=("train", {"resume": str(folder)})) from None


class CheckpointFiles(TorchCheckpointIO):
    """How Lightning writes checkpoints here: synced, renamed, with a checksum, `keep` last ones.

    What is saved while `hold` is set waits in memory for `write_held`.
    """

    def __init__(self, keep: int) -> None:
        self.keep, self.hold = keep, False
        self._held: tuple[dict[str, Any], Path] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write or hold. OSError: it cannot be written; the one before is still there.

        The tensors in a held checkpoint are those of the net: it is to be written before they
        change.
        """
        if self.hold:
            self._held = checkpoint, Path(path)
            return
        path = Path(path)
        try:
            path.parent.mkdir(exist_ok=True)
            write_checkpoint(path, checkpoint, self.keep if path.stem == LAST else 1)
        except OSError as error:  # of the temporary name, which says nothing to the user
            error.filename = str(path)
            raise

    def write_held(self) -> None:
        """Write what is held, if anything is."""
        if self._held is not None:
            held, self._held, self.hold = self._held, None, False
            self.save_checkpoint(*held)


class Checkpoints(Callback):
    """best.ckpt, of the lowest validation loss, and last.ckpt, of the latest state.

    Both are written at validation; last.ckpt every so many minutes and steps as well, and when
    the run is asked to stop: by ctrl-C (a second one stops at once), by SIGTERM, or under Slurm by
    SIGUSR1, after which the job is put back into the queue. A run that fails keeps what it had.

    Args:
        module: the model in training, whose weights are checked before they are written.
        folder: of the run.
        keep: how old last.ckpt gets at most, in minutes and in steps.

    The trainer needs `files` as a plugin: it writes the checkpoints.
    """

    def __init__(self, module: GPTModule, folder: Path, keep: CallbacksConfig) -> None:
        self.module, self.folder, self.keep = module, folder / CHECKPOINTS, keep
        self.files = CheckpointFiles(keep.keep_checkpoints)
        self.best_val_loss = math.inf
        self._saved = time.monotonic()
        self._asked = 0  # the signal that this process got
        self._stop = 0  # the signal that all processes of the run stop for
        self._settled = False  # last.ckpt holds the present state
        self._before: dict[int, Any] = {}  # handlers of signals

    def on_train_start(self, *_: Any, **__: Any) -> None:
        """Take the signals over from Lightning, which would act on them in the middle of a step."""
        if threading.current_thread() is not threading.main_thread():
            return
        signals = [signal.SIGINT, signal.SIGTERM]
        if "SLURM_JOB_ID" in os.environ:
            signals.append(signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._ask_to_stop) for number in signals}

    def _ask_to_stop(self, number: int, _: Any) -> None:
        again = "; ctrl-C again to stop at once" if number == signal.SIGINT else ""
        log.info("%s: stopping after this step%s", signal.Signals(number).name, again)
        self._asked = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._before[number])

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self.files.write_held()
        if self._stop and self._settled:
            if self._stop == signal.SIGINT:
                raise KeyboardInterrupt
            if self._stop == signal.SIGUSR1 and trainer.is_global_zero:
                _requeue()
            raise SIGTERMException(128 + self._stop)  # the exit code
        self._settled = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(trainer.val_check_batch, int)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # inside a step
        ends = trainer.global_step >= self.module.n_steps  # and is validated, whatever the interval
        validates_next = ends or not (batch_idx + 1) % trainer.val_check_batch
        late = time.monotonic() - self._saved > 60 * self.keep.checkpoint_minutes
        steps = self.keep.checkpoint_steps
        late |= steps is not None and trainer.global_step % steps == 0
        urgency = self._asked or (_LATE if late else 0)
        if trainer.world_size > 1:  # all stop together and save together, or none does
            asked = torch.tensor(urgency, device=trainer.strategy.root_device)
            urgency = int(trainer.strategy.reduce(asked, reduce_op="max"))
        self._stop = urgency if urgency != _LATE else 0
        if urgency and not validates_next:
            self.files.hold = True
            self._save(trainer, LAST)

    def on_validation_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        loss = float(trainer.callback_metrics["val/loss"])
        if loss < self.best_val_loss:
            self.best_val_loss = loss
            self._save(trainer, BEST)
        self._save(trainer, LAST)

    def teardown(self, *_: Any, **__: Any) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._ask_to_stop:
                signal.signal(number, handler)

    def _save(self, trainer: L.Trainer, name: str) -> None:
        self.module.check_weights()
        self._saved = time.monotonic()
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(self.folder / f"{name}.ckpt")
        self._settled = name == LAST

    def state_dict(self) -> dict[str, Any]:
        return {"best_val_loss": self.best_val_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_val_loss = state_dict["best_val_loss"]


def _requeue() -> None:
    """Put this Slurm job back into the queue, as Slurm does not by itself for a warning signal."""
    names = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
    array = "_".join(os.environ[name] for name in names if name in os.environ)
    job = array or os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)  # noqa: S603, S607
        log.info("Slurm job %s is back in the queue", job)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        log.warning("Slurm job %s could not be requeued: %s", job, " ".join(str(reason).split()))
