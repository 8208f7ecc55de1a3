"""The terminal: one console for log lines and progress bars, so that neither tears the other."""

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
    """Print what the package logs, from INFO on, above any progress bar.

    A terminal or file that cannot show a character gets a question mark, not a traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    log.setLevel(logging.INFO)
    log.handlers = [] if global_rank() else [_ConsoleHandler()]  # one process speaks for all


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Also write what the log says to `path`."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.handleError = lambda record: None  # on a full disk a line is left out
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        with contextlib.suppress(OSError):  # what did not fit before does not fit now
            handler.close()
