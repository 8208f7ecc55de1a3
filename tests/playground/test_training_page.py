"""The tab Train: what its events show."""

import errno
import time
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from minigpt.core.settings import UserError
from tests.conftest import ROOT
from tests.playground.conftest import TEXT, add


def test_tab_shows_a_folder_that_cannot_be_used_at_its_field(queue, monkeypatch):
    from minigpt.playground import training_page
    from minigpt.playground.access import Access
    from minigpt.playground.answers import Playground
    from minigpt.playground.server import Training

    access, fields = Access(), training_page.FIELDS
    events = training_page._Events(Playground([]), Training(queue, access))
    request: Any = SimpleNamespace(cookies={access.cookie: access.token})
    job = add(queue)
    job._request(state="started")

    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", fail)
    shown = events.poll(job.name, {}, {}, request)[training_page.N_VIEWS :]
    assert [bool(error) for error in shown[:-1]] == [field == "job" for field in fields]
    stopped = events.stop(job.name, request)
    assert [bool(error) for error in stopped[: len(fields)]] == [field == "job" for field in fields]
    added = events.add(TEXT, None, "small", training_page.RANDOM, 1, request)
    assert [bool(error) for error in added[: len(fields)]] == [field == "start" for field in fields]
    assert len(added) == len(fields) + training_page.N_VIEWS + 1
    request.cookies.clear()
    assert "token" in events.stop(job.name, request)[fields.index("start")]


def test_file_that_was_added_twice_is_used_once(queue, tmp_path, monkeypatch):
    from minigpt.playground import training_page
    from minigpt.playground.access import Access
    from minigpt.playground.answers import Playground
    from minigpt.playground.server import Training

    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    monkeypatch.setattr(training_page, "get_upload_folder", lambda: str(tmp_path))
    access = Access()
    events = training_page._Events(Playground([]), Training(queue, access))
    request: Any = SimpleNamespace(cookies={access.cookie: access.token})
    added = events.add("", [str(path)] * 2, "small", training_page.RANDOM, 1, request)
    assert not any(added[: len(training_page.FIELDS)])
    (job,) = queue.jobs()
    assert list(job.uploads.values()) == ["a.txt"]


def test_view_of_a_running_job_is_renewed_only_as_often_as_its_cost_allows(queue, monkeypatch):
    from minigpt.playground import training_page
    from minigpt.playground.access import Access
    from minigpt.playground.answers import Playground
    from minigpt.playground.server import Training

    made: list[str] = []
    monkeypatch.setattr(training_page, "job_html", lambda *_: f"{len(made)}{made.append('')}")
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(time, "perf_counter", lambda: float(len(made)))  # a view takes 1 s
    events = training_page._Events(Playground([]), Training(queue, Access()))
    job = add(queue)
    views = [events._html(job, 0), events._html(job, 0)]
    clock.now = 1 / training_page.VIEW_SHARE
    views.append(events._html(job, 0))
    views.append(events._html(job, 1))  # another state is shown at once
    assert [view[0] for view in views] == ["0", "0", "1", "2"]


def test_poll_sends_only_what_has_changed(queue):
    import gradio as gr

    from minigpt.playground import training_page
    from minigpt.playground.access import Access
    from minigpt.playground.answers import Playground
    from minigpt.playground.server import Training

    events = training_page._Events(Playground([]), Training(queue, Access()))
    job = add(queue)
    first = events._views(None, {}, None)
    again = events._views(job.name, first[1], job.name)
    skipped = gr.skip()
    assert [update == skipped for update in first] == [False] * training_page.N_VIEWS
    assert [update == skipped for update in again] == [True, False, True, True, True, True]
    queue.stop(job.name)
    stopped = events._views(job.name, again[1], job.name)
    assert [update == skipped for update in stopped] == [False] * training_page.N_VIEWS


def test_page_shows_why_a_waiting_training_cannot_start(queue, processes, monkeypatch):
    from minigpt.playground import training, training_page
    from minigpt.playground.access import Access
    from minigpt.playground.answers import Playground
    from minigpt.playground.server import Training

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    access, start = Access(), training_page.FIELDS.index("start")
    events = training_page._Events(Playground([]), Training(queue, access))
    request: Any = SimpleNamespace(cookies={access.cookie: access.token})
    job = add(queue)
    with monkeypatch.context() as patch:
        patch.setattr(training, "write_json", full)
        with pytest.raises(UserError):
            queue.advance()
    *_, shown = poll = events.poll(job.name, {}, {}, request)
    assert (job.state, list(shown)) == ("waiting", ["start"])
    assert poll[training_page.N_VIEWS + start]
    queue.advance()
    *_, shown = poll = events.poll(job.name, {}, shown, request)
    assert (job.state, shown) == ("running", {})
    assert not poll[training_page.N_VIEWS + start]


def test_unknown_model_to_start_from_is_an_error_and_starts_nothing(queue):
    from minigpt.playground import training_page
    from minigpt.playground.access import Access
    from minigpt.playground.answers import Playground
    from minigpt.playground.server import Training

    access, fields = Access(), training_page.FIELDS
    events = training_page._Events(Playground([]), Training(queue, access))
    request: Any = SimpleNamespace(cookies={access.cookie: access.token})
    added = events.add(TEXT, None, "small", "removed", 1, request)
    assert "removed" in added[fields.index("start")]
    assert queue.jobs() == []


def test_training_can_start_from_a_release_that_the_page_has_not_loaded(queue):
    from minigpt.playground import training_page
    from minigpt.playground.access import Access
    from minigpt.playground.answers import Playground
    from minigpt.playground.server import Training
    from minigpt.playground.training import SIZES
    from minigpt.runs.folder import Run

    playground = Playground.load([Run.load(ROOT / "releases/w64")])
    (loaded,) = playground.models
    choices = [f"releases/{name}" for name in SIZES if name != "w64"]
    assert training_page.start_choices(playground) == [training_page.RANDOM, loaded, *choices]
    access = Access()
    events = training_page._Events(playground, Training(queue, access))
    request: Any = SimpleNamespace(cookies={access.cookie: access.token})
    added = events.add(TEXT, None, "w64", "releases/medium", 1, request)
    assert not any(added[: len(training_page.FIELDS)])
    (job,) = queue.jobs()
    assert job.settings["init_from"] == {
        "path": str((ROOT / "releases/medium").resolve()), "name": "releases/medium",
    }  # fmt: skip
    for unknown in ("releases/w64", "releases/../runs", str(ROOT / "releases/medium"), "medium"):
        added = events.add(TEXT, None, "w64", unknown, 1, request)
        assert added[training_page.FIELDS.index("start")]
    assert queue.jobs() == [job]
