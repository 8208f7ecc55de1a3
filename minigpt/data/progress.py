"""Progress in bytes, on a terminal or in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress

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
    size = progress.FileSizeColumn() if total is None else progress.DownloadColumn()
    left = [] if total is None else [progress.TimeRemainingColumn()]
    numbers = size, progress.TransferSpeedColumn(), *left
    with Progress("{task.description}", progress.BarColumn(), *numbers) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda n_bytes: bar.advance(task, n_bytes)
