"""Progress in bytes, on a terminal or in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    DownloadColumn,
    FileSizeColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from minigpt.core.progress import Progress


@contextmanager
def byte_progress(
    title: str, total: int | None = None, done: int = 0
) -> Iterator[Callable[[int], None]]:
    """Show progress while the `with` block runs: a bar on a terminal, otherwise log lines.

    Args:
        title: description of the work, such as "downloading".
        total: total number of bytes; None if unknown.
        done: number of bytes that were already processed.

    Yields:
        A function to call with the number of bytes processed since its last call.
    """
    size = FileSizeColumn() if total is None else DownloadColumn()
    left = [] if total is None else [TimeRemainingColumn()]
    columns = "{task.description}", BarColumn(), size, TransferSpeedColumn(), *left
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda n_bytes: bar.advance(task, n_bytes)
