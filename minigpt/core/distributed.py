"""Rank of this process, and detection of torchrun and srun.

Without torchrun or srun, Lightning starts the processes for additional devices itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from minigpt.core.settings import UserError


def global_rank() -> int:
    """Return the global rank of this process, which is 0 for the first or only process."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):  # torchrun, Lightning's launcher, srun
        if name in os.environ:
            return int(os.environ[name])
    return 0


@dataclass(frozen=True)
class Launcher:
    """External program that started the processes of this run.

    Attributes:
        name: "torchrun" or "srun".
        devices: number of processes on each node.
        num_nodes: number of nodes.
    """

    name: str
    devices: int
    num_nodes: int

    @classmethod
    def detect(cls) -> Launcher | None:
        """Return the launcher, according to the environment variables; None without a launcher.

        Raises:
            UserError: the job has several Slurm tasks that srun did not start, or that were not
                requested with --ntasks-per-node.
        """
        if "TORCHELASTIC_RUN_ID" in os.environ:
            n, on_each_node = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
            return cls("torchrun", on_each_node, n // on_each_node)
        # Like Lightning, do not count an interactive allocation: srun starts nothing there.
        interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
        if "SLURM_NTASKS" not in os.environ or interactive:
            return None
        n, num_nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", 1))
        if n > 1 and "SLURM_STEP_ID" not in os.environ:
            raise UserError(f"Slurm has {n} tasks for this job: start them with srun python ...")
        if n > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:  # Lightning requires it
            fix = f"submit with --ntasks-per-node={n // num_nodes}, not --ntasks"
            raise UserError(f"Lightning needs the number of tasks per node: {fix}")
        return cls("srun", n // num_nodes, num_nodes)


_may_start_processes = False


def may_start_processes() -> bool:
    """Return whether a run on several devices can have one process per device.

    Lightning starts the other processes by running the command line of this process again. This
    works only for Mini GPT's own programs. Under torchrun and srun, all processes already run.
    """
    return _may_start_processes or global_rank() > 0 or Launcher.detect() is not None


def allow_starting_processes() -> None:
    """Allow Lightning to start processes with this process's command line; called by cli/ only."""
    global _may_start_processes
    _may_start_processes = True


def step_name() -> str | None:
    """Return the Slurm job id and step id, such as 1234.0; None outside srun.

    The ids are the same on all nodes and after the job is requeued.
    """
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")
    return f"{job}.{step}" if job and step else None
