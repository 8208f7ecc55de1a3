"""A progress bar that counts bytes, on the console of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress

from minigpt.core.console import console


@contextmanager
def byte_progress(
    title: str, total: int | None = None, done: int = 0
) -> Iterator[Callable[[int], None]]:
    """Show a progress bar while the block runs, on a terminal only, and remove it at the end.

    Args:
        title: what is being done.
        total: bytes there are; None where nobody knows.
        done: bytes of them that were done before.

    Yields:
        A function to call with the number of bytes done since its last call.
    """
    amount = progress.DownloadColumn(), progress.TransferSpeedColumn()
    remaining = [] if total is None else [progress.TimeRemainingColumn()]
    columns = "{task.description}", progress.BarColumn(), *amount, *remaining
    disable = not console.is_terminal
    with progress.Progress(*columns, console=console, transient=True, disable=disable) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda n_bytes: bar.advance(task, n_bytes)
