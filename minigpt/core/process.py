"""Process-wide state: `tune_process` speeds up programs, `preserved_process` restores state."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import logging
import os
import platform
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

_tuned = False


def tune_process() -> None:
    """Make glibc keep freed memory for the rest of the process, which speeds up CPU training.

    By default, glibc returns the memory of each freed large tensor to the kernel. The kernel then
    clears every page again at the next allocation, so training on a CPU takes up to twice as long.
    The change cannot be undone, so only programs call this function, never the library.
    With other C libraries, the function has no effect.
    """
    global _tuned
    _tuned = True
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: allocate large blocks on the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
        libc.mallopt(-8, 1)  # M_ARENA_MAX: use a single heap


def is_tuned() -> bool:
    """Return whether `tune_process` has been called, or would have no effect on this machine."""
    return _tuned or platform.libc_ver()[0] != "glibc"


@contextlib.contextmanager
def memory_limit(n_bytes: int) -> Iterator[None]:
    """Limit the memory that this process allocates in a `with` block; only Linux has this limit.

    An allocation above the limit raises MemoryError. Other threads are limited, too.

    Args:
        n_bytes: limit of the address space in addition to what the process has reserved already.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limits = soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + n_bytes
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@contextlib.contextmanager
def preserved_process() -> Iterator[None]:
    """Restore the state of the process at the end of the `with` block, even after an exception.

    The state consists of the warning filters, the levels and handlers of loggers (root, Mini GPT
    and Lightning), the signal handlers, the float32 matmul precision, the number of threads, the
    random states (Python, NumPy, and PyTorch on the CPU, CUDA GPUs and MPS), the size limit of the
    fields of CSV files and the environment variables. Signal handlers are restored only in the main
    thread.

    This function does not initialise CUDA. If CUDA was not initialised at the beginning, the GPUs
    had no random state yet. At the end, they get the seed of the random numbers on the CPU, which
    `torch.manual_seed` also sets for GPUs.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    signals = {n: signal.getsignal(n) for n in signal.valid_signals()} if main_thread else {}
    names = ("", "minigpt", "lightning", "lightning.pytorch", "lightning.fabric")
    levels = [(log, log.level, list(log.handlers)) for log in map(logging.getLogger, names)]
    environment = dict(os.environ)
    matmul, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    field_size = csv.field_size_limit()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = torch.initial_seed()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        with warnings.catch_warnings():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        else:  # until CUDA is initialised, PyTorch only remembers the seed
            torch.cuda.manual_seed_all(seed)
        if mps is not None:
            torch.mps.set_rng_state(mps)
        csv.field_size_limit(field_size)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(matmul)
        os.environ.clear()
        os.environ.update(environment)
        for logger, level, handlers in levels:
            logger.setLevel(level)
            logger.handlers = handlers
        for number, handler in signals.items():
            if signal.getsignal(number) is not handler and handler is not None:
                signal.signal(number, handler)
