"""The queue of trainings."""

import errno
import os
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from minigpt.core.settings import UserError
from minigpt.playground import training
from minigpt.playground.training import TrainingQueue, training_environment
from tests.conftest import naming
from tests.playground.conftest import TEXT, add


def test_jobs_run_one_at_a_time_in_their_order(queue, processes):
    first, second = add(queue), add(queue)
    for _ in range(3):
        queue.advance()
    assert [job.name for job in processes.jobs] == [first.name]
    assert (first.state, second.state) == ("running", "waiting")
    TrainingQueue(queue.folder, queue.runs_dir).advance()  # another server
    assert len(processes.jobs) == 1
    processes.end(first, phase="finished")
    queue.advance()
    assert (first.state, second.state) == ("finished", "running")
    with pytest.raises(UserError) as error:
        queue.remove(second.name)
    assert error.value.argument == "job"
    queue.remove(first.name)
    assert [job.name for job in queue.jobs()] == [second.name]


def test_stopped_job_continues_at_the_end_of_the_queue(queue, processes, monkeypatch):
    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *sent: signals.append(sent))
    first, second = add(queue), add(queue)
    queue.stop(second.name)  # it never ran
    assert (second.state, second.can_continue) == ("stopped", True)
    queue.advance()
    with pytest.raises(UserError, match="stopped"):
        queue.resume(first.name)
    queue.stop(first.name)
    assert signals == [(4242, signal.SIGTERM)]
    assert first.state == "running"  # until it has written its checkpoint
    processes.end(first, phase="stopped")
    assert (first.state, first.error) == ("stopped", None)
    queue.resume(second.name)
    queue.resume(first.name)
    queue.advance()
    assert (first.state, second.state) == ("waiting", "running")


def test_killed_job_says_so_and_can_continue(queue, processes, monkeypatch):
    job = add(queue)
    queue.advance()
    processes.end(job)
    assert (job.state, job.can_continue) == ("stopped", True)
    assert "job.log" in str(job.error)
    full = SimpleNamespace(free=0)
    monkeypatch.setattr(training.shutil, "disk_usage", lambda path: full)
    assert "full" in str(job.error)


def test_process_that_has_not_locked_its_job_yet_counts_as_running(queue, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: SimpleNamespace(poll=lambda: None))
    job = add(queue)
    queue.advance()
    assert job.state == "running"
    monkeypatch.setattr(training.time, "time", lambda: 1e12)
    assert job.state == "stopped"


def test_uploads_are_moved_and_get_harmless_names(queue, tmp_path):
    names = ["stories.csv.gz", "..\\x y.TXT", "$(rm -rf).md", "none"]
    files = [tmp_path / name for name in names]
    for path in files:
        path.write_text(path.name)
    job = add(queue, files=files)
    assert not any(path.exists() for path in files)
    stored = {f"{path.parent.name}/{path.name}": path.read_text() for path in job.uploads}
    assert stored == {"000/text.txt": TEXT, "001/stories.csv.gz": names[0],
                      "002/_x_y.TXT": names[1], "003/__rm_-rf_.md": names[2],
                      "004/none": names[3]}  # fmt: skip
    assert list(job.uploads.values()) == ["text.txt", *names]
    job.delete_data()
    assert not any(path.exists() for path in job.uploads)


def test_full_disk_at_the_second_upload_keeps_all_uploads(queue, tmp_path, monkeypatch):
    files = [tmp_path / name for name in "ab"]
    for path in files:
        path.write_text(path.name)

    def no_link(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def fail(path: Path, target: Path) -> None:
        if path == files[1]:
            raise OSError(errno.ENOSPC, "No space left on device")
        target.write_bytes(path.read_bytes())

    monkeypatch.setattr(os, "link", no_link)
    with monkeypatch.context() as patch:
        patch.setattr(training.shutil, "copyfile", fail)
        with pytest.raises(UserError) as error:
            add(queue, files=files)
    assert error.value.argument == "start"
    assert [path.read_text() for path in files] == ["a", "b"]
    assert list(queue.folder.glob(".*-*")) == queue.jobs() == []
    job = add(queue, text=None, files=files)  # the disk has space again
    assert [path.read_text() for path in job.uploads] == ["a", "b"]
    assert not any(path.exists() for path in files)


def test_uploads_of_one_name_get_different_names(queue, tmp_path):
    files = [tmp_path / folder / "text.txt" for folder in ("a", "b")]
    for path in files:
        path.parent.mkdir()
        path.write_text(str(path))
    assert list(add(queue, files=files).uploads.values()) == [
        "text.txt", "2-text.txt", "3-text.txt",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"text": None}, "text"),
        ({"text": " \n\t"}, "text"),
        ({"text": "\ud800"}, "text"),
        ({"text": "x" * 100}, "text"),
        ({"files": [64]}, "files"),
        ({"files": [1] * 4}, "files"),
        ({"size": "huge"}, "size"),
        ({"size": "../../etc/passwd"}, "size"),
        ({"minutes": None}, "minutes"),
        ({"minutes": 0}, "minutes"),
        ({"minutes": float("nan")}, "minutes"),
        ({"minutes": 1e9}, "minutes"),
    ],
)
def test_invalid_field_is_an_error_of_that_field_and_nothing_is_stored(
    queue, tmp_path, monkeypatch, fields, name
):
    monkeypatch.setattr(training, "MAX_UPLOAD", 70)
    monkeypatch.setattr(training, "MAX_FILES", 3)
    files = []
    for i, size in enumerate(fields.pop("files", [])):
        files.append(tmp_path / f"{i}.txt")
        files[-1].write_bytes(b"x" * size)
    with pytest.raises(UserError) as error:
        add(queue, files=files, **fields)
    assert error.value.argument == name
    assert queue.jobs() == []
    assert all(path.exists() for path in files)


def test_flood_of_starts_is_refused(queue):
    for _ in range(training.MAX_WAITING):
        add(queue)
    with pytest.raises(UserError, match=naming(str(training.MAX_WAITING))) as error:
        add(queue)
    assert error.value.argument == "start"
    assert len(queue.jobs()) == training.MAX_WAITING


def test_full_disk_is_an_error_and_leaves_no_job(queue, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(training, "write_json", full)
    with pytest.raises(UserError, match="full") as error:
        add(queue)
    assert error.value.argument == "start"
    assert list(queue.folder.glob(".*-*")) == queue.jobs() == []


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"),
                                   NotImplementedError("no locks")])  # fmt: skip
def test_folder_that_cannot_be_locked_is_one_line_at_the_field(queue, monkeypatch, error):
    job = add(queue)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", fail)
    actions = {
        "start": [lambda: add(queue), queue.advance],
        "job": [partial(act, job.name) for act in (queue.stop, queue.resume, queue.remove)],
    }
    for field, calls in actions.items():
        for call in calls:
            with pytest.raises(UserError, match=naming(str(queue.folder))) as caught:
                call()
            assert caught.value.argument == field
            assert "\n" not in str(caught.value)
    job._request(state="started")
    with pytest.raises(UserError, match=naming(str(job.folder))) as caught:
        _ = job.state
    assert caught.value.argument == "job"


def test_queue_that_another_server_locks_is_one_line_at_the_field(queue, monkeypatch):
    monkeypatch.setattr(training, "_LOCK_SECONDS", 0)
    with FileLock(queue.folder / ".lock"), pytest.raises(UserError, match="again") as caught:
        add(queue)
    assert caught.value.argument == "start"


def test_upload_that_is_gone_is_an_error_of_the_files(queue, tmp_path):
    with pytest.raises(UserError) as caught:
        add(queue, files=[tmp_path / "gone.txt"])
    assert caught.value.argument == "files"


def test_damaged_job_does_not_end_the_watch(queue, monkeypatch, caplog):
    from minigpt.playground.access import Access
    from minigpt.playground.answers import Playground
    from minigpt.playground.server import Training

    job = add(queue)
    (job.folder / "job.json").write_text("{")
    ended = threading.Event()
    monkeypatch.setattr("minigpt.playground.server.WATCH_SECONDS", 0.01)
    watch = threading.Thread(target=Training(queue, Access()).watch, args=(Playground([]), ended))
    watch.start()
    deadline = time.monotonic() + 10
    while job.name not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.02)
    assert watch.is_alive()
    ended.set()
    watch.join()
    assert sum(job.name in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("name", ["", "..", "../../runs/other", "none", None])
def test_only_jobs_of_the_queue_can_be_changed(queue, tmp_path, name):
    other = tmp_path / "runs/other"
    other.mkdir(parents=True)
    (other / "job.json").write_text("{}")
    for act in (queue.stop, queue.resume, queue.remove):
        with pytest.raises(UserError) as error:
            act(name)
        assert error.value.argument == "job"
    assert (other / "job.json").exists()


def test_old_finished_jobs_leave_the_list(queue, monkeypatch):
    monkeypatch.setattr(training, "MAX_JOBS", 2)
    jobs = [add(queue) for _ in range(3)]
    for job in jobs:
        job.report(phase="finished")
        job._request(state="started")
    add(queue)
    assert len(queue.jobs()) == 2


def test_old_failed_jobs_leave_the_list_and_stopped_ones_stay(queue, monkeypatch):
    monkeypatch.setattr(training, "MAX_JOBS", 2)
    numbers = iter("1234")  # in the order of the jobs, also within a second
    monkeypatch.setattr(training.secrets, "token_hex", lambda _: next(numbers))
    jobs = [add(queue) for _ in range(3)]
    for job, phase in zip(jobs, ("failed", "stopped", "failed"), strict=True):
        job.report(phase=phase)
        job._request(state="started")
    new = add(queue)
    assert {job.name for job in queue.jobs()} == {jobs[1].name, jobs[2].name, new.name}


def test_environment_of_a_training_has_no_secrets():
    secrets = {
        "HF_TOKEN": "x", "WANDB_API_KEY": "x", "WANDB_PROJECT": "x", "AWS_SECRET_ACCESS_KEY": "x",
        "GITHUB_TOKEN": "x", "MINIGPT_LOCAL": "x", "LC_TOKEN": "x", "MY_PATH": "x",
    }  # fmt: skip
    needed = {"PATH": "/bin", "HOME": "/root", "PYTHONPATH": "/a", "OMP_NUM_THREADS": "1"}
    environment = training_environment({**secrets, **needed})
    assert environment.items() >= needed.items()
    assert not secrets.keys() & environment.keys()


def test_error_of_a_stopped_job_is_shown_at_its_field(queue):
    from minigpt.playground.training_page import _field_error

    job = add(queue)
    job._request(state="started")
    job.report(phase="stopped", error=training.FULL, field="start")
    assert _field_error(job) == {"start": training.FULL}


def test_start_is_refused_while_too_many_stopped_jobs_keep_their_uploads(queue, monkeypatch):
    monkeypatch.setattr(training, "MAX_JOBS", 2)
    jobs = [add(queue), add(queue)]
    for job in jobs:
        queue.stop(job.name)
    with pytest.raises(UserError, match=naming("2", "remove")) as error:
        add(queue)
    assert error.value.argument == "start"
    assert "\n" not in str(error.value)
    assert {job.name for job in queue.jobs()} == {job.name for job in jobs}
    queue.resume(jobs[0].name)  # those can still continue
    queue.stop(jobs[0].name)
    queue.remove(jobs[1].name)
    assert add(queue).state == "waiting"


def test_finished_model_is_added_again_after_an_error_that_passes(queue, monkeypatch):
    from minigpt.playground.access import Access
    from minigpt.playground.server import Training
    from minigpt.runs.folder import Run

    jobs = [add(queue) for _ in range(3)]
    errors: dict[str, list[Exception]] = {
        jobs[0].name: [MemoryError("memory")], jobs[1].name: [UserError("damaged")] * 9,
        jobs[2].name: [],
    }  # fmt: skip
    for job in jobs:
        job._request(state="started")
        job.report(phase="finished", run=str(queue.runs_dir / job.name))
    added: list[str] = []

    def add_model(name: str) -> None:
        if errors[name]:
            raise errors[name].pop()
        added.append(name)

    monkeypatch.setattr(Run, "load", lambda path: path.name)
    page: Any = SimpleNamespace(add=add_model)
    watched, seen = Training(queue, Access()), set()
    with pytest.raises((MemoryError, UserError)):
        watched._add_models(page, seen)
    assert added == [jobs[2].name]  # an error does not keep the other models out
    watched._add_models(page, seen)
    assert added == [jobs[2].name, jobs[0].name]
    assert len(errors[jobs[1].name]) == 8  # a damaged run is read once
