"""Number of cores that this process may use, and the number of threads to use on them.

This module does not import torch, so that a program can set OMP_NUM_THREADS before torch reads it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

THREADS = "OMP_NUM_THREADS"
_MOUNT = "/sys/fs/cgroup"
_PROCESS = "/proc/self/cgroup"


def cpu_quota() -> float | None:
    """Return the number of cores that the cgroups of this process allow; None without a limit.

    A container, a systemd unit or a batch job may have such a limit, called a CPU quota. The result
    is the smallest quota of the process's own cgroup and all cgroups that contain it. Versions 1
    and 2 of cgroups are supported.
    """
    quotas = [quota for folder in _cgroups() if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _cgroups() -> Iterator[Path]:
    """Yield the folders of the cgroups that may limit this process.

    These are the folder of the process's own cgroup and its parent folders, up to the root folder
    of the cgroups. Some of these folders may not exist. For example, /proc in a container may give
    the path that the cgroup has on the host, but the container has only the root folder.
    """
    try:
        lines = Path(_PROCESS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError):  # not Linux
        lines = []
    paths = {"": "/", "cpu": "/"}
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers or "cpu" in controllers.split(","):
            paths["cpu" if controllers else ""] = path
    for controller, path in paths.items():
        relative = PurePosixPath(path.lstrip("/"))
        for ancestor in (relative, *relative.parents):
            yield Path(_MOUNT, controller, ancestor)


def _quota(folder: Path) -> float | None:
    """Return the CPU quota of the cgroup with this folder, in cores; None without a quota."""
    for names in ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"):  # version 2, then 1
        with contextlib.suppress(OSError, ValueError):  # no file of this version, or "max"
            text = " ".join((folder / name).read_text(encoding="utf-8") for name in names)
            quota, period = map(int, text.split())
            return quota / period if quota > 0 and period > 0 else None
    return None


def allowed_cores() -> int:
    """Return the number of cores in the CPU affinity of this process.

    On systems without CPU affinity, such as macOS, return the number of cores of the machine.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # missing on macOS and Windows
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def usable_cores() -> int:
    """Return the number of cores on which this process may run threads, at least 1.

    It is the number of cores in the CPU affinity or in the CPU quota, whichever is smaller.
    """
    cores = allowed_cores()
    return max(1, int(min(cores, cpu_quota() or cores)))


def limit_threads() -> None:
    """Set OMP_NUM_THREADS to `usable_cores()` if a CPU quota allows fewer cores than the affinity.

    PyTorch reads the variable at import. If it is not set, PyTorch starts one thread for each core
    in the CPU affinity. With more threads than the quota allows, the operating system stops all of
    them for a part of the time. If OMP_NUM_THREADS is already set, it is not changed.
    """
    if not os.environ.get(THREADS) and (cores := usable_cores()) < allowed_cores():
        os.environ[THREADS] = str(cores)
