"""The terminal: one console for log lines and progress bars, so that neither tears the other."""

from __future__ import annotations

import io
import logging
import os
import sys

from rich.console import Console

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
    first = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"
    log.handlers = [_ConsoleHandler()] if first else []  # one process speaks for all
