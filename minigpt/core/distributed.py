"""Which of a run's processes this is, and how many a launcher outside of Lightning started.

Lightning starts the processes for further devices itself, unless torchrun or Slurm's srun has
started them already.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from minigpt.core.settings import UserError


def global_rank() -> int:
    """Which of the run's processes this is: 0 for the first, or the only one."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):  # torchrun, Lightning's launcher, srun
        if name in os.environ:
            return int(os.environ[name])
    return 0


@dataclass(frozen=True)
class Launcher:
    """A program that started the processes of this run, this one among them."""

    name: str  # torchrun or srun
    devices: int  # processes on each node
    num_nodes: int

    @classmethod
    def detect(cls) -> Launcher | None:
        """The launcher that the environment tells of; None where Lightning has to be it.

        Raises:
            UserError: Slurm has several tasks for the job, but srun did not start them.
        """
        if "TORCHELASTIC_RUN_ID" in os.environ:
            n, on_each_node = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
            return cls("torchrun", on_each_node, n // on_each_node)
        # In an interactive allocation Lightning starts its own processes, and so do we.
        interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
        if "SLURM_NTASKS" not in os.environ or interactive:
            return None
        n, num_nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", 1))
        if n > 1 and "SLURM_STEP_ID" not in os.environ:
            raise UserError(f"Slurm has {n} tasks for this job: start them with srun python ...")
        if n > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:  # Lightning insists on it
            raise UserError(f"ask Slurm for --ntasks-per-node={n // num_nodes}, not for --ntasks")
        return cls("srun", n // num_nodes, num_nodes)


_may_start_processes = False


def may_start_processes() -> bool:
    """Return whether a run of several devices can have its processes.

    Lightning starts them by typing the command line of this process again, which is right for the
    command line of Mini GPT alone. torchrun and srun have started them already.
    """
    return _may_start_processes or global_rank() > 0 or Launcher.detect() is not None


def allow_starting_processes() -> None:
    """Let Lightning start processes by typing this process's command again; for cli/ alone."""
    global _may_start_processes
    _may_start_processes = True


def step_name() -> str | None:
    """Names what srun runs here, on all nodes and each time it is queued alike; None elsewhere."""
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")
    return f"{job}.{step}" if job and step else None
