"""The terminal: one console for log lines and progress bars, so that neither tears the other."""

from __future__ import annotations

import io
import logging
import sys

from rich.console import Console

from minigpt.core.distributed import global_rank

console = Console(stderr=True, soft_wrap=True)


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
    log = logging.getLogger("minigpt")
    log.setLevel(logging.INFO)
    log.handlers = [] if global_rank() else [_ConsoleHandler()]  # one process speaks for all
