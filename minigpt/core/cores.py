"""Number of cores that this process may use, and number of threads that follows from it.

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

    A container, a systemd unit or a batch job may have such a quota. The smallest quota of the
    process's cgroup and its ancestors counts, in version 1 and version 2 of cgroups.
    """
    quotas = [quota for folder in _cgroups() if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _cgroups() -> Iterator[Path]:
    """Yield the folders of the cgroups that may limit this process; some may not exist.

    In a container, the path in /proc may be that of the host, and only its end, or nothing of it,
    exists below the mount. Its ancestors then lead to the mount itself.
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
    """Return the quota in the files of one cgroup, in cores."""
    for names in ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"):  # version 2, then 1
        with contextlib.suppress(OSError, ValueError):  # no file of this version, or "max"
            text = " ".join((folder / name).read_text(encoding="utf-8") for name in names)
            quota, period = map(int, text.split())
            return quota / period if quota > 0 and period > 0 else None
    return None


def allowed_cores() -> int:
    """Return the number of cores in this process's CPU affinity, or of the machine."""
    affinity = getattr(os, "sched_getaffinity", None)  # missing on macOS and Windows
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def usable_cores() -> int:
    """Return the number of cores for threads: the affinity or the CPU quota, at least 1."""
    cores = allowed_cores()
    return max(1, int(min(cores, cpu_quota() or cores)))


def limit_threads() -> None:
    """Set OMP_NUM_THREADS to `usable_cores()` if a CPU quota is below the affinity.

    PyTorch reads the variable when it is imported. By default it starts a thread for each core in
    the affinity; with a smaller quota, the kernel would stop all of them for a part of the time. A
    variable that is already set is not changed.
    """
    if not os.environ.get(THREADS) and (cores := usable_cores()) < allowed_cores():
        os.environ[THREADS] = str(cores)
