"""Progress: a bar on a terminal, lines at growing intervals elsewhere."""

import io
import logging

import pytest
from rich.console import Console

from minigpt.core import progress
from minigpt.core.progress import Progress, track


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.fixture
def file() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


@pytest.fixture(autouse=True)
def log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="minigpt")


@pytest.mark.parametrize(
    ("minutes", "fewest", "most"), [(0.07, 0, 0), (3, 10, 20), (60, 60, 80), (600, 600, 620)]
)
def test_lines_into_a_file_come_at_growing_intervals(
    caplog: pytest.LogCaptureFixture, file: Console, minutes: float, fewest: int, most: int
):
    clock, seconds = Clock(), int(60 * minutes)
    with Progress("{task.description}", console=file, get_time=clock) as bar:
        task = bar.add_task("training", total=seconds)
        for clock.now in range(1, seconds + 1):
            bar.advance(task)
    lines = lines_of(caplog)
    assert fewest <= len(lines) <= most
    assert all(line.startswith("training") and line.isprintable() for line in lines)
    if lines:
        assert lines[0] == f"training · {progress.human_time(seconds - 5)} left"
    assert isinstance(file.file, io.StringIO)
    assert file.file.getvalue() == ""  # no fragments of a bar


def test_track_writes_the_share_done_and_yields_every_item(
    caplog: pytest.LogCaptureFixture, file: Console, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(progress, "SHORTEST", 0.0)
    monkeypatch.setattr(progress, "LONGEST", 0.0)
    assert list(track("abcd", "validation split", file)) == list("abcd")
    assert [line.split(" · ")[:2] for line in lines_of(caplog)] == [
        ["validation split", f"{percent}%"] for percent in (25, 50, 75, 100)
    ]


@pytest.mark.parametrize("silent", ["console", "show", "rank"])
def test_progress_that_is_not_wanted_or_of_another_rank_is_silent(
    caplog: pytest.LogCaptureFixture, file: Console, monkeypatch: pytest.MonkeyPatch, silent: str
):
    monkeypatch.setattr(progress, "SHORTEST", 0.0)
    monkeypatch.setattr(progress, "LONGEST", 0.0)
    if silent == "rank":
        monkeypatch.setattr(progress, "global_rank", lambda: 1)
    if silent == "show":
        with Progress(console=file, show=False) as bar:
            bar.advance(bar.add_task("training", total=2))
    else:
        assert len(list(track("ab", "title", None if silent == "console" else file))) == 2
    assert not lines_of(caplog)


def test_a_terminal_gets_a_bar_and_no_lines(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(progress, "SHORTEST", 0.0)
    monkeypatch.setattr(progress, "LONGEST", 0.0)
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    assert len(list(track("abcd", "validation split", terminal))) == 4
    assert isinstance(terminal.file, io.StringIO)
    assert "validation split" in terminal.file.getvalue()
    assert not lines_of(caplog)
