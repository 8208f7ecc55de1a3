"""How a program ends: at a signal, at a system error, or when its output cannot be written."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator

from minigpt.cli.program import leave
from minigpt.core.console import log, outputs, show_log
from minigpt.core.distributed import global_rank
from minigpt.core.files import DISK_FULL
from minigpt.core.gpu_memory import is_out_of_memory
from minigpt.core.signals import watch

# Verbs that stop when their terminal is closed. All other verbs write files, so they continue.
INTERACTIVE = ("generate", "playground", "doctor")
_NO_GPU_MEMORY = (
    "the GPU does not have enough memory: end other programs that use it, or put "
    "CUDA_VISIBLE_DEVICES= before the command to use the CPU"
)


@contextlib.contextmanager
def orderly_exit(verb: str) -> Iterator[None]:
    """Print the log during the `with` block, and exit with one line at a signal or a file error.

    A program that stops at Ctrl-C, SIGTERM or SIGHUP has the exit code 128 plus the number of the
    signal. After an OSError with a file name, the exit code is 1 if the disk is full or read-only,
    else 2. If a GPU has too little memory, it is 1. All other exceptions are raised again.

    Args:
        verb: the verb that runs, such as train.
    """
    show_log()
    with watch.running(outlives_terminal=verb not in INTERACTIVE):
        try:
            try:
                yield
            finally:
                _flush_result()
        except (KeyboardInterrupt, Exception) as error:
            if is_interrupt(error):
                number = watch.number or signal.SIGINT
                if global_rank() == 0:
                    print(f"stopped by {signal.Signals(number).name}", file=sys.stderr)
                end_output()
                if watch.number:
                    watch.exit()
                sys.exit(128 + number)
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                leave(_NO_GPU_MEMORY, 1)
            if (problem := explain_file_error(error)) is None:
                raise
            leave(problem, exit_code(error))
        finally:
            end_output()
            _leave_processes(sys.exc_info()[1])


def explain_file_error(error: BaseException) -> str | None:
    """Return one line about an OSError that has the name of a file; None for other errors."""
    if not isinstance(error, OSError) or error.filename is None:
        return None
    return f"cannot read or write {error.filename}: {error.strerror}; give another path"


def exit_code(error: BaseException) -> int:
    """Return the exit code after an error of a library: 1 if the disk is full, else 2."""
    return 1 if isinstance(error, OSError) and error.errno in DISK_FULL else 2


def is_interrupt(error: BaseException | None) -> bool:
    """Return whether an error is a KeyboardInterrupt, or was raised while one was being handled.

    A KeyboardInterrupt can stop a library halfway. The library may then raise another error.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _leave_processes(error: BaseException | None) -> None:
    """Exit at once if this process fails and is one of several processes of a run.

    A normal exit would first wait for collective operations that the other processes never join.

    Args:
        error: the exception that ends this process; None if there is none.
    """
    distributed = sys.modules.get("torch.distributed")
    if error is None or distributed is None or not distributed.is_initialized():
        return
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    code = error.code if isinstance(error, SystemExit) else 1
    end_output()
    if code:
        os._exit(code if isinstance(code, int) else 1)


def result_on_stdout() -> None:
    """Make a failed write to stdout stop the program.

    Verbs call this function if the text on stdout is their only result.
    """
    for output in outputs():
        output.is_result = output.name == "<stdout>"


def _flush_result() -> None:
    """Flush stdout if `result_on_stdout` was called; raise OSError if the disk is full."""
    if any(output.is_result for output in outputs()):
        try:
            sys.stdout.flush()
        except OSError as error:
            if error.errno in DISK_FULL:  # not if a reader such as head has ended
                raise


def end_output() -> None:
    """Flush stdout, and log a warning if a part of the output is lost because the disk is full.

    If `result_on_stdout` was called, no warning is needed: a failed write has already stopped the
    program with an error.
    """
    for output in outputs():
        has_failed = output.is_result  # failed writes so far have been reported
        output.is_result = False
        if output.name == "<stdout>":
            sys.stdout.flush()
            if output.error and output.error.errno in DISK_FULL and not has_failed:
                log.warning("stdout could not be written: %s", output.error.strerror)
