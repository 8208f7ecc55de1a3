"""Rank of this process, and detection of torchrun and srun.

Without torchrun or srun, Lightning starts the processes for additional devices itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from minigpt.core.settings import UserError

log = logging.getLogger("minigpt")


# Variables from which Lightning, PyTorch or this module read the rank of a process.
_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK",
    "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_RUN_ID", "JSM_NAMESPACE_RANK", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE",
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_ID",
)  # fmt: skip
_ELASTIC = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
_SRUN = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
# Variables for the rank and the number of processes, from launchers that are not supported.
_OTHERS = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))
# Slurm job names of interactive shells; by default, such a job has the name of its shell.
_SHELLS = {"interactive", "bash", "zsh", "fish", "sh", "dash", "ksh", "csh", "tcsh"}
_STARTED = "MINIGPT_STARTED"  # set for the processes that Lightning starts


def global_rank() -> int:
    """Return the global rank of this process; 0 for the first process or the only one."""
    try:
        launcher = Launcher.detect()
    except UserError:  # `train` raises it
        return 0
    if launcher is not None:
        return launcher.rank
    return (_number("LOCAL_RANK") or 0) if _STARTED in os.environ else 0


def _number(name: str) -> int | None:
    """Return the value of an environment variable; None if it is not 1 to 9 digits."""
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


@dataclass(frozen=True)
class Launcher:
    """External program that started the processes of this run.

    Attributes:
        name: "torchrun" or "srun".
        devices: number of processes on each node.
        num_nodes: number of nodes.
        rank: global rank of this process.
    """

    name: str
    devices: int
    num_nodes: int
    rank: int

    @classmethod
    def detect(cls) -> Launcher | None:
        """Return the launcher that the environment variables show; None without a launcher.

        Raises:
            UserError: a variable of the launcher is missing or wrong; the Slurm job has several
                tasks, but srun did not start this process; the tasks were not requested with
                --ntasks-per-node; or an unsupported launcher started several processes.
        """
        if os.environ.get("TORCHELASTIC_RUN_ID"):
            rank, _, size, on_each_node, _ = _numbers("torchrun", _ELASTIC)
            if not (on_each_node and rank < size and size % on_each_node == 0):
                raise UserError(_wrong("torchrun", "RANK, WORLD_SIZE, LOCAL_WORLD_SIZE"))
            return cls("torchrun", on_each_node, size // on_each_node, rank)
        n = 0 if _in_interactive_shell() else _number("SLURM_NTASKS") or 0
        if os.environ.get("SLURM_STEP_ID") and not _in_interactive_shell():
            n, rank, *_ = _numbers("srun", _SRUN)
            num_nodes = _number("SLURM_NNODES") or 1
            if n > 1 and not _number("SLURM_NTASKS_PER_NODE"):  # Lightning requires it
                fix = f"submit the job with --ntasks-per-node={n // num_nodes}, not --ntasks"
                raise UserError(f"Lightning needs the number of tasks per node: {fix}")
            if not (rank < n and n % num_nodes == 0):
                raise UserError(_wrong("srun", "SLURM_NTASKS, SLURM_PROCID, SLURM_NNODES"))
            return cls("srun", n // num_nodes, num_nodes, rank)
        if n > 1:
            raise UserError(f"this Slurm job has {n} tasks: put srun before the command")
        pairs = (("RANK", "WORLD_SIZE"),) if _number("MASTER_PORT") else ()
        for name, total in (*pairs, *_OTHERS):
            if _number(name) is not None and (size := _number(total) or 0) > 1:
                problem = f"{total}={size}, but neither torchrun nor srun started this process"
                raise UserError(f"{problem}: start it with torchrun, or type unset {name} {total}")
        return None


def _numbers(launcher: str, names: tuple[str, ...]) -> list[int]:
    """Return the values of the variables `names`; raise UserError if one is unset or no number."""
    values = [(name, _number(name)) for name in names]
    if wrong := [name for name, value in values if value is None]:
        raise UserError(_wrong(launcher, ", ".join(wrong)))
    return [value for _, value in values if value is not None]


def _wrong(launcher: str, names: str) -> str:
    """Return the error message for missing or wrong environment variables of a launcher."""
    sign = "TORCHELASTIC_RUN_ID" if launcher == "torchrun" else "SLURM_STEP_ID"
    problem = f"{sign} is set, but variables of {launcher} are missing or contradictory: {names}"
    return f"{problem}; start the run with {launcher}, or type unset {sign}"


def _in_interactive_shell() -> bool:
    """Return whether the Slurm variables are those of an interactive shell, not of a task."""
    is_shell = os.environ.get("SLURM_JOB_NAME", "").lower() in _SHELLS
    return is_shell or "SLURM_PTY_PORT" in os.environ  # srun --pty


def forget_launcher() -> list[str]:
    """Remove the variables of launchers from the environment of this process.

    Returns:
        The names of the removed variables. A Slurm variable whose value is a whole number is
        also removed, but its name is not returned, because every shell in a Slurm job has such
        variables.
    """
    names = [name for name in _VARIABLES if name in os.environ]
    odd = [name for name in names if not (name.startswith("SLURM_") and _number(name) is not None)]
    for name in names:
        del os.environ[name]
    return odd


def forget_stale_launcher() -> None:
    """Remove the variables of launchers if no launcher started this process, and log a warning.

    Such variables may be left over from another program. The warning gives their names. With
    RANK=1, Lightning would treat this process as one that writes no files. If RANK is not a number,
    importing Lightning would fail. Nothing is removed if Lightning started this process, or if
    `Launcher.detect` returns a launcher or raises an error.
    """
    with contextlib.suppress(UserError):
        if not _is_launched() and (names := forget_launcher()):
            ignored = ", ".join(names)
            log.warning("%s ignored: neither torchrun nor srun started this process", ignored)


@contextlib.contextmanager
def stale_launcher_hidden() -> Iterator[None]:
    """Remove stale variables of launchers, also contradictory ones, and restore them at the end."""
    before = dict(os.environ)
    try:
        launched = _is_launched()
    except UserError:  # `train` raises it
        launched = False
    if not launched:
        forget_launcher()
    try:
        yield
    finally:
        for name in before.keys() - os.environ.keys():
            os.environ[name] = before[name]


def _is_launched() -> bool:
    """Return whether torchrun, srun or Lightning started this process."""
    child = _STARTED in os.environ and _number("LOCAL_RANK") is not None
    return Launcher.detect() is not None or child


_may_start_processes = False


def may_start_processes() -> bool:
    """Return whether a run on several devices can have one process per device.

    Lightning starts the other processes by running the command line of this process again. This
    works only for Mini GPT's own programs. Under torchrun and srun, all processes already run.
    """
    return _may_start_processes or global_rank() > 0 or Launcher.detect() is not None


def allow_starting_processes() -> None:
    """Allow Lightning to start processes with this process's command line; called by cli/ only.

    In a process that Lightning has started, this function also makes the process exit when the
    first process of the run has ended.
    """
    global _may_start_processes
    _may_start_processes = True
    if global_rank() and Launcher.detect() is None:
        threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()
    os.environ[_STARTED] = "1"


def _exit_with(parent: int) -> None:
    """Exit as soon as the parent process has ended; to be run in a background thread.

    Without this thread, the main thread could wait forever for a message from a parent that has
    ended.

    Args:
        parent: process id of the parent.
    """
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def in_slurm_job() -> bool:
    """Return whether this process belongs to a Slurm job, but not to an interactive shell in it."""
    return bool(os.environ.get("SLURM_JOB_ID")) and not _in_interactive_shell()


def step_name() -> str | None:
    """Return the Slurm job id and step id, such as 1234.0; None outside srun.

    The ids are the same on all nodes and after the job is requeued.
    """
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")
    return f"{job}.{step}" if in_slurm_job() and step else None
