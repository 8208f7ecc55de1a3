"""Progress of long tasks: a bar on a terminal, and lines in the log everywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from rich import progress
from rich.console import Console

from minigpt.core.console import console, log
from minigpt.core.distributed import global_rank
from minigpt.core.text import human_time

T = TypeVar("T")

# Minimum and maximum number of seconds between two log lines. Between these limits, the interval is
# a quarter of the time since the task started.
SHORTEST, LONGEST = 5.0, 60.0


class Progress(progress.Progress):
    """Progress bar on a terminal; elsewhere, log lines at growing intervals.

    The bar is removed at the end. The first log line is written after 5 s, so a shorter task logs
    nothing. A task of three minutes logs 13 lines. After four minutes, there is one line per
    minute.

    Args:
        columns: columns of the bar. Log lines omit `BarColumn` and show the time left in words.
        show: whether to show progress. A process with a rank above 0 never shows it.
        options: keyword arguments of `rich.progress.Progress`.
    """

    def __init__(
        self, *columns: str | progress.ProgressColumn, show: bool = True, **options: Any
    ) -> None:
        options = {"console": console, "transient": True} | options
        self.show = show and global_rank() == 0
        self.plain = self.show and not options["console"].is_terminal
        if self.plain:  # average over a longer time, because lines are rare
            options["speed_estimate_period"] = 300.0
        super().__init__(*columns, disable=not self.show or self.plain, **options)
        self._next_line: dict[progress.TaskID, float] = {}

    def update(self, task_id: progress.TaskID, *args: Any, **kwargs: Any) -> None:
        """Update a task as rich does.

        If the update sets the progress and a log line is due, the line is written.
        """
        super().update(task_id, *args, **kwargs)
        if "completed" in kwargs or "advance" in kwargs:
            self._write_line(task_id)

    def advance(self, task_id: progress.TaskID, advance: float = 1) -> None:
        """Advance a task as rich does, and write a log line if it is due."""
        self.update(task_id, advance=advance)

    def _write_line(self, task_id: progress.TaskID) -> None:
        task = self._tasks[task_id]
        elapsed = task.elapsed or 0.0
        if not self.plain or elapsed < self._next_line.get(task_id, SHORTEST):
            return
        self._next_line[task_id] = elapsed + min(LONGEST, max(SHORTEST, elapsed / 4))
        graphic = progress.BarColumn | progress.TimeRemainingColumn
        columns = [column for column in self.columns if not isinstance(column, graphic)]
        texts = [c.format(task=task) if isinstance(c, str) else str(c(task)) for c in columns]
        if task.time_remaining:
            texts.append(f"{human_time(task.time_remaining)} left")
        log.info("%s", " · ".join(text.strip() for text in texts if text))


def track(items: Sequence[T], title: str, console: Console | None = console) -> Iterator[T]:
    """Yield `items` and show how many have been processed, like `rich.progress.track`.

    Args:
        items: the items to process.
        title: name of the task, such as "validation split".
        console: console of the bar; None shows no progress.
    """
    columns = Progress.get_default_columns()
    with Progress(*columns, show=console is not None, console=console) as bar:
        task = bar.add_task(title, total=len(items))
        for item in items:
            yield item
            bar.advance(task)
