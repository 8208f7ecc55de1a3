"""Terminal output: one console for log lines and progress bars, so that they do not overlap."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from minigpt.core.distributed import global_rank

console = Console(stderr=True, soft_wrap=True)
log = logging.getLogger("minigpt")


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), markup=False, highlight=False)


def show_log() -> None:
    """Print the package's log records of level INFO and higher, above any progress bar.

    Only the process of rank 0 prints. Characters that the encoding of stdout or stderr lacks are
    replaced with question marks.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    log.setLevel(logging.INFO)
    log.handlers = [] if global_rank() else [_ConsoleHandler()]


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Append the package's log records, with timestamps, to a file during the `with` block.

    Args:
        path: the log file; its folder must exist.
    """
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.handleError = lambda record: None  # training continues when the disk is full
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        with contextlib.suppress(OSError):  # the disk may still be full
            handler.close()
