"""Processes that Lightning starts for a run on several devices: start, watch and end them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch.distributed
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from minigpt.core.console import log
from minigpt.core.distributed import Launcher, global_rank

# Seconds in which this process should notice by itself that another process has failed.
_NOTICE_SECONDS = 10.0


class ProcessLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher, with more time for the first process to stop when another one fails.

    Lightning would kill the first process within five seconds after another process has ended with
    a nonzero exit code. When a signal stops the run, the other processes also end with a nonzero
    exit code. The first process may then still be writing its checkpoint or report. With this
    launcher, the first process has ten seconds to end its training. If it is still training after
    these ten seconds, the launcher makes it exit.

    Args:
        launcher: the launcher of the trainer.
    """

    def __init__(self, launcher: _SubprocessScriptLauncher) -> None:
        super().__init__(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)
        self.started: list[subprocess.Popen[bytes]] = []
        self._trains = False

    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Start the other processes and call `function`; if it raises, stop the other processes."""
        self._trains = True
        try:
            return super().launch(function, *args, **kwargs)
        except BaseException:
            for process in self.started:
                process.terminate()
            raise
        finally:
            self._trains = False

    def _call_children_scripts(self) -> None:
        super()._call_children_scripts()
        self.started, self.procs = self.procs, []  # Lightning watches and kills those in `procs`
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """Exit if a child process has failed and this process is still training 10 s later.

        This process may be waiting in native code for the child process that failed.
        """
        codes: list[int] = []
        while self._trains and not codes:
            time.sleep(0.5)
            codes = [code for process in self.started if (code := process.poll())]
        time.sleep(_NOTICE_SECONDS)
        if self._trains:
            log.error("another process of this run has ended with exit code %d", codes[0])
            os._exit(codes[0] if codes[0] > 0 else 128 - codes[0])


def own_launcher(trainer: L.Trainer) -> None:
    """Replace Lightning's launcher, if it starts processes, by a `ProcessLauncher`."""
    if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        trainer.strategy._launcher = ProcessLauncher(trainer.strategy.launcher)


def end_processes(trainer: L.Trainer, finished: bool) -> None:
    """End the processes that Lightning started, so that the next job of a multirun can start.

    Args:
        trainer: the trainer of the run.
        finished: whether the training is complete. If it is not, the started processes may wait
            forever, so they are killed after two seconds.
    """
    if global_rank() > 0 or Launcher.detect() is not None:
        return
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if isinstance(launcher := trainer.strategy.launcher, ProcessLauncher):
        for process in launcher.started:
            if not finished:  # the process may wait in a collective operation forever
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(2.0)  # it may be about to print why it failed
                process.kill()
            process.wait()
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK"):
        os.environ.pop(name, None)
