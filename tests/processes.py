"""Run our programs in processes that start at once, forked from a server that has imported them.

Each process writes its current phase to a small shared file, so that a test can kill it there.
"""

import functools
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.commands import CONTEXT, MAINS
from tests.conftest import ROOT

STARTING, STEP, VALIDATION, CHECKPOINT, BETWEEN = range(5)  # phases of a process
_PHASE, _STEPS = 0, 1  # indices in the shared file


class Training:
    """A running `python train.py <arguments>`, or another of our programs.

    Args:
        arguments: settings, as typed.
        output: file for stdout and stderr; the shared file is beside it.
        variables: additional environment variables.
        before: function to call in the new process before training, to break something there.
        program: the program, as in `commands.MAINS`.
    """

    def __init__(
        self,
        arguments: list[str],
        output: Path,
        variables: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
        program: str = "train.py",
    ) -> None:
        self.output = output
        shared = output.with_suffix(".shared")
        self._shared = np.memmap(shared, np.int32, "w+", shape=2)
        parameters = arguments, output, shared, variables or {}, before, program
        self.process = CONTEXT.Process(target=_train, args=parameters, daemon=True)
        self.process.start()

    @property
    def phase(self) -> int:
        """The current phase, or the last one of a dead process."""
        return int(self._shared[_PHASE])

    @property
    def steps(self) -> int:
        """Number of steps that have begun."""
        return int(self._shared[_STEPS])

    def wait_until(self, reached: Callable[[], bool]) -> bool:
        """Poll `reached`; return False if the process ends before it is true."""
        while not reached():
            if not self.process.is_alive():
                return False
            time.sleep(0)
        return True

    def send(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        """Return the exit code, negative for a signal; the test's own timeout applies."""
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode

    def output_text(self) -> str:
        """Return what the process printed."""
        return self.output.read_text(encoding="utf-8") if self.output.exists() else ""


def _train(
    arguments: list[str],
    output: Path,
    shared: Path,
    variables: dict[str, str],
    before: Callable[[], None] | None,
    program: str,
) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(ROOT)
    os.environ.update(variables)
    from minigpt.training import checkpointing
    from minigpt.training.module import GPTModule

    memory = np.memmap(shared, np.int32, "r+", shape=2)
    _mark(memory, GPTModule, "optimizer_step", STEP)
    _mark(memory, GPTModule, "validation_step", VALIDATION)
    _mark(memory, checkpointing, "write_checkpoint", CHECKPOINT)
    # A suite that was started in the background or under nohup ignores these signals.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if before is not None:
        before()
    sys.argv = [program, *arguments]
    if program == "minigpt":
        MAINS[program]()
    else:
        runpy.run_path(str(ROOT / program), run_name="__main__")


def _mark(memory: np.ndarray, owner: Any, name: str, phase: int) -> None:
    function = getattr(owner, name)

    @functools.wraps(function)
    def marked(*arguments: Any, **named: Any) -> Any:
        memory[_PHASE] = phase
        memory[_STEPS] += phase == STEP
        try:
            return function(*arguments, **named)
        finally:
            memory[_PHASE] = BETWEEN

    setattr(owner, name, marked)
