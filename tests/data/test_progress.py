"""Progress in bytes, of our own work and of downloads by huggingface_hub."""

import logging

import pytest

from minigpt.core import progress
from minigpt.data.download import HubLines
from minigpt.data.progress import byte_progress


@pytest.mark.parametrize(
    ("total", "done", "size"), [(10_000_000, 2_000_000, "6.0/10.0 MB"), (None, 0, "4.0 MB")]
)
@pytest.mark.parametrize("of_hub", [False, True])
def test_lines_show_the_bytes_done(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    total: int | None,
    done: int,
    size: str,
    of_hub: bool,
):
    monkeypatch.setattr(progress, "SHORTEST", 0.0)
    monkeypatch.setattr(progress, "LONGEST", 0.0)
    caplog.set_level(logging.INFO, logger="minigpt")
    if of_hub:
        with HubLines(desc="stories.txt", total=total, initial=done, unit="B") as bar:
            bar.update(4_000_000)
    else:
        with byte_progress("stories.txt", total, done) as show:
            show(4_000_000)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.split(" · ")[:2] == ["stories.txt", size]
