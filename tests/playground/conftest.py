"""A queue of trainings, with processes that only lock their jobs."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from minigpt.playground.training import LOCK, Job, TrainingQueue

TEXT = "Tom had a ball."


class Processes:
    """Stands for subprocess.Popen: the process locks its job until it is told to end."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.environments: list[dict[str, str]] = []
        self.locks: dict[str, Any] = {}

    def start(self, command: list[str], env: dict[str, str], **_: Any) -> Any:
        job = Job(Path(command[-1]))
        self.jobs.append(job)
        self.environments.append(env)
        self.locks[job.name] = FileLock(job.folder / LOCK).acquire()
        job.report(phase="training", pid=4242)
        return SimpleNamespace(poll=lambda: None)

    def end(self, job: Job, **status: Any) -> None:
        job.report(**status)
        self.locks.pop(job.name).lock.release()


@pytest.fixture
def processes(monkeypatch) -> Processes:
    processes = Processes()
    monkeypatch.setattr(subprocess, "Popen", processes.start)
    return processes


@pytest.fixture
def queue(tmp_path) -> TrainingQueue:
    return TrainingQueue(tmp_path / "jobs", tmp_path / "runs")


def add(queue: TrainingQueue, text: str | None = TEXT, **fields: Any) -> Job:
    usual: dict[str, Any] = {"files": [], "size": "small", "minutes": 1}
    return queue.add(text, **{**usual, **fields})
