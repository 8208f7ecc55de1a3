"""The terminal: one console for log lines and progress bars, so that neither tears the other."""

from __future__ import annotations

import logging

from rich.console import Console

console = Console(stderr=True, soft_wrap=True)


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), markup=False, highlight=False)


def show_log() -> None:
    """Print what the package logs, from INFO on, above any progress bar."""
    log = logging.getLogger("minigpt")
    log.setLevel(logging.INFO)
    log.handlers = [_ConsoleHandler()]
