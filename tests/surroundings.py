"""Surroundings of a process that can fail: a terminal, a pipe, a full disk."""

import contextlib
import os
import resource
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.processes import Training


class Terminal:
    """A terminal that a process can have as its own: `before=terminal.attach` of `Training`."""

    def __init__(self) -> None:
        self.master, self._slave = os.openpty()
        self.attach = partial(_attach, os.ttyname(self._slave))
        self._pieces: list[bytes] = []
        self._is_closed = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while not self._is_closed:
                # A call of `read` that waits would keep the terminal open.
                if select.select([self.master], [], [], 0.02)[0]:
                    self._pieces.append(os.read(self.master, 4096))

    def text(self) -> str:
        """Return what was printed so far."""
        return b"".join(self._pieces).decode(errors="replace")

    def press_ctrl_c(self) -> None:
        os.write(self.master, b"\x03")

    def close(self) -> None:
        """Close the terminal: the kernel sends SIGHUP, and every later write fails with EIO."""
        if not self._is_closed:
            self._is_closed = True
            self._reader.join()
            os.close(self._slave)
            os.close(self.master)


def _attach(name: str) -> None:
    os.setsid()  # a session leader gets the first terminal that it opens
    terminal = os.open(name, os.O_RDWR)
    for number in range(3):
        os.dup2(terminal, number)


class Disk:
    """A folder that can be filled up: a small tmpfs, or, without the right to mount one, a limit
    on the size of files that the training process may write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.filler = folder, folder / "filler"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
        self.mounted = False
        with contextlib.suppress(FileNotFoundError):
            self.mounted = subprocess.run(mount, capture_output=True).returncode == 0

    def fill(self, training: Training, checkpoint: Path) -> None:
        if not self.mounted:
            assert training.process.pid is not None
            limit = checkpoint.stat().st_size // 2
            resource.prlimit(training.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
            return
        with self.filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass

    def clear(self) -> None:
        self.filler.unlink(missing_ok=True)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)


def close_descriptors() -> None:
    for number in range(3):
        os.close(number)


def write_into_full_disk() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    os.dup2(full, 2)


def write_into_broken_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, 2)


def slow_validation(step: int) -> None:
    """Make the validation after a step take a minute."""
    from minigpt.training.module import GPTModule

    validate = GPTModule.validation_step

    def slow(self: Any, *arguments: Any) -> None:
        validate(self, *arguments)
        if self.global_step == step:
            print("busy", flush=True)
            time.sleep(60)

    GPTModule.validation_step = slow  # type: ignore[method-assign]


def ignore_sighup() -> None:
    """Do what nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


LOST_OUTPUTS: dict[str, Callable[[], None]] = {
    "closed": close_descriptors,
    "full disk": write_into_full_disk,
    "broken pipe": write_into_broken_pipe,
}


def seconds_until_end(process: Training) -> float:
    """Return how long a process that was sent a signal takes to end; at most 60 s."""
    start = time.monotonic()
    process.process.join(60)
    assert not process.process.is_alive()
    return time.monotonic() - start


def has_lines(path: Path, n: int) -> bool:
    """Return whether a file exists and has at least `n` lines."""
    return path.is_file() and len(path.read_bytes().splitlines()) >= n
