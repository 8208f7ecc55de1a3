"""Training jobs of the playground: their folders, their queue and their processes.

A job is a training run that a visitor started. Its folder contains the uploaded files and two JSON
files. Only the server writes job.json. While the process of the training runs, only that process
writes status.json. The state of a job is read from these files, so the page finds a training run
again after a reload or a restart of the server. A training run continues when the page is closed.
One job runs at a time.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from minigpt.core.files import read_json, write_json, write_text
from minigpt.core.settings import UserError, one_line

JOBS = "playground"  # folder of the jobs, in the cache folder
JOB, STATUS, LOCK, LOG, UPLOADS, CACHE = (
    "job.json", "status.json", "lock", "job.log", "uploads", "cache",
)  # fmt: skip
PROGRAM = "minigpt.cli.job"  # the module that trains; it reads settings as the command line does
SIZES = {"w64": "0.4M parameters", "small": "1M", "medium": "3.4M", "large": "7M"}
MINUTES = (0.1, 24 * 60.0)  # shortest and longest training
MAX_UPLOAD = 200_000_000  # bytes of text and files in one job
MAX_FILES = 100
SNAPSHOTS = 8  # of a training run, for the slider "Age" of the page
MAX_WAITING = 4  # maximum number of waiting jobs
MAX_JOBS = 20  # older jobs are removed; if so many can be continued, no other can be added
TEXT = "text.txt"  # name of the pasted text
FULL = "The disk is full: free some space, then continue."  # error of a stopped job
_START_SECONDS = 30.0  # a new process must lock its job within this time
_LONGEST_NAME = 60  # characters of the name of a stored upload
_LOCK_SECONDS = 10.0  # time to wait for another server that changes the queue

State = Literal["waiting", "running", "stopped", "failed", "finished"]
_FINAL = ("stopped", "failed", "finished")
_PROBE = threading.Lock()
# Variables that the process of a training run inherits. All others, such as HF_TOKEN and
# WANDB_API_KEY, are left out.
_INHERITED = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LC_\w+|TZ|TMPDIR|TEMP|TMP|SYSTEMROOT|VIRTUAL_ENV|PYTHON\w+"
    r"|LD_LIBRARY_PATH|XDG_CACHE_HOME|CC|CUDA_\w+|NVIDIA_\w+|OMP_\w+|MKL_\w+|KMP_\w+|GOMP_\w+",
    re.IGNORECASE,
)
_SECRET = re.compile("token|key|secret|passw|credential", re.IGNORECASE)


@dataclass(frozen=True)
class Job:
    """A training run that was started from the page.

    Args:
        folder: folder of the job.
    """

    folder: Path

    @property
    def name(self) -> str:
        """Name of the job. The name begins with the time at which the job was added."""
        return self.folder.name

    @property
    def settings(self) -> dict[str, Any]:
        """Content of job.json, such as size, minutes, init_from, state and the upload names."""
        return _read(self.folder / JOB)

    @property
    def status(self) -> dict[str, Any]:
        """Content of status.json, such as phase, pid, tokens, run, command, error and field."""
        return _read(self.folder / STATUS)

    @property
    def uploads(self) -> dict[Path, str]:
        """Original names of the uploaded files, by the path at which each file is stored."""
        names = self.settings.get("names", [])
        return {self.folder / UPLOADS / _stored(i, name): name for i, name in enumerate(names)}

    @property
    def run(self) -> Path | None:
        """Folder of the run; None if the run has not started."""
        run = self.status.get("run")
        return None if run is None else Path(run)

    @property
    def state(self) -> State:
        """State of the job. If its process was killed, the state is "stopped"."""
        settings, status = self.settings, self.status
        if settings.get("state") == "waiting":
            return "waiting"
        phase = status.get("phase")
        if phase in _FINAL:
            return phase
        is_new = phase == "starting" and time.time() - settings["started"] < _START_SECONDS
        return "running" if is_new or self._is_locked() else "stopped"

    @property
    def error(self) -> str | None:
        """Error message if the job failed or did not end as its visitor wanted; None otherwise."""
        state, status = self.state, self.status
        if state in _FINAL and status.get("phase") in _FINAL:
            return status.get("error")
        if state != "stopped" or self.settings.get("state") == "stopping":
            return None
        if shutil.disk_usage(self.folder).free < 1 << 20:
            return FULL
        return f"The process ended unexpectedly: see {self.folder / LOG}, or continue."

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run has a checkpoint from which the job can continue."""
        from minigpt.runs.folder import last_checkpoints  # imports torch, which is slow

        return self.run is not None and bool(last_checkpoints(self.run))

    @property
    def can_continue(self) -> bool:
        """Whether the job can continue: it has failed and has a checkpoint, or it is stopped."""
        state = self.state
        return state == "stopped" or (state == "failed" and self.has_checkpoint)

    def report(self, **values: Any) -> None:
        """Replace `values` in status.json, and keep its other values."""
        write_json(self.folder / STATUS, {**self.status, **values})

    def delete_data(self) -> None:
        """Delete the uploaded files and everything that was prepared from them."""
        for name in (UPLOADS, CACHE):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _is_locked(self) -> bool:
        try:  # a probe holds the lock for a moment, which must not look like a running job
            with _PROBE, FileLock(self.folder / LOCK).acquire(timeout=0):
                return False
        except Timeout:
            return True
        except (OSError, NotImplementedError) as error:
            raise _storage_error(self.folder, error, "job") from None

    def _request(self, **values: Any) -> None:
        """Write `values` to job.json, and keep the other values in the file."""
        write_json(self.folder / JOB, {**self.settings, **values})


class TrainingQueue:
    """Queue of the training jobs in a folder. One job runs at a time.

    Several servers may use the same folder.

    Args:
        folder: folder of the jobs, created if missing.
        runs_dir: folder in which the runs are created.
    """

    def __init__(self, folder: Path, runs_dir: Path) -> None:
        self.folder, self.runs_dir = folder.absolute(), runs_dir.absolute()
        self.problem: str | None = None  # why `advance` has just failed; None if it has not
        self._processes: list[subprocess.Popen[bytes]] = []
        self.folder.mkdir(parents=True, exist_ok=True)

    def jobs(self) -> list[Job]:
        """Return all jobs, newest first."""
        paths = self.folder.glob(f"[!.]*/{JOB}")
        return sorted((Job(path.parent) for path in paths), key=lambda j: j.name, reverse=True)

    def job(self, name: str | None) -> Job:
        """Return the job called `name`.

        Raises:
            UserError: there is no such job.
        """
        for job in self.jobs():
            if job.name == name:
                return job
        raise UserError("This training run no longer exists: choose another one.", "job")

    def add(
        self, text: str | None, files: Sequence[Path], size: str, minutes: float | None,
        init_from: Mapping[str, Any] | None = None,
    ) -> Job:  # fmt: skip
        """Add a job to the end of the queue.

        Args:
            text: pasted text.
            files: uploaded files, which are moved into the folder of the job.
            size: name of the model size, one of SIZES; it has no effect with `init_from`.
            minutes: length of the training in minutes.
            init_from: dict with two keys: "path" for the path of the checkpoint to start from, and
                "name" for the name that the page shows for the model in this checkpoint. None means
                random weights.

        Returns:
            The job.

        Raises:
            UserError: an input is missing or out of range, too many jobs are waiting or can be
                continued, or the folder of the queue cannot be used. The `argument` of the error is
                the name of a field of the form.
        """
        _check(text, files, size, minutes)
        with self._lock("start"):
            jobs = self.jobs()
            self._check_capacity(jobs)
            if sum(job.can_continue for job in jobs) >= MAX_JOBS:  # they keep their uploads
                message = f"{MAX_JOBS} training runs can still continue: remove one of them."
                raise UserError(message, "start")
            name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
            new = Job(self.folder / f".{name}")
            try:
                self._write(new, text, files, {
                    "size": size, "minutes": minutes, "init_from": init_from,
                    "runs_dir": str(self.runs_dir), "state": "waiting", "queued": time.time(),
                })  # fmt: skip
                new.folder.replace(self.folder / name)
            finally:
                shutil.rmtree(new.folder, ignore_errors=True)  # if it was not renamed
            for path in files:
                with contextlib.suppress(OSError):
                    path.unlink()
            for old in jobs[MAX_JOBS - 1 :]:
                if old.state in ("finished", "failed") and not old.can_continue:
                    shutil.rmtree(old.folder)
            return Job(self.folder / name)

    @staticmethod
    def _write(job: Job, text: str | None, files: Sequence[Path], settings: dict[str, Any]) -> None:
        """Write the folder of a new job: job.json, the pasted text and the uploaded files."""
        pasted = bool(text and text.strip())
        names: list[str] = []
        renamed: dict[str, str] = {}
        for name in [*([TEXT] if pasted else []), *(path.name for path in files)]:
            names.append(f"{len(names) + 1}-{name}" if name in names else name)  # no two are equal
            if names[-1] != name:
                renamed[names[-1]] = name
        (job.folder / UPLOADS).mkdir(parents=True)
        settings = {**settings, "names": names, "renamed": renamed, "pasted": pasted}
        write_json(job.folder / JOB, settings)
        targets = list(job.uploads)
        for target in targets:
            target.parent.mkdir()
        if pasted:
            write_text(targets.pop(0), text or "")
        for path, target in zip(files, targets, strict=True):  # after an error, all files remain
            try:
                os.link(path, target)
            except OSError:  # another file system, or one without links
                shutil.copyfile(path, target)

    def stop(self, name: str) -> None:
        """Stop a waiting or running job.

        A running job that has made an update writes a checkpoint before it stops.

        Args:
            name: name of the job.

        Raises:
            UserError: there is no such job, or the folder of the queue cannot be used.
        """
        with self._lock("job"):
            job = self.job(name)
            state = job.state
            if state == "waiting":
                job.report(phase="stopped", error=None)
            if state in ("waiting", "running"):
                job._request(state="stopping")
            pid = job.status.get("pid")
            if state == "running" and pid is not None and job._is_locked():
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, signal.SIGTERM)

    def resume(self, name: str) -> None:
        """Add a stopped or failed job to the queue again.

        The job continues from its last checkpoint. A stopped job without a checkpoint starts again.

        Args:
            name: name of the job.

        Raises:
            UserError: there is no such job, it cannot be continued, too many jobs are waiting, or
                the folder of the queue cannot be used.
        """
        with self._lock("job"):
            job = self.job(name)
            if not job.can_continue:
                problem = (
                    "Only a stopped training run, or a failed one with a checkpoint, can continue."
                )
                raise UserError(problem, "job")
            self._check_capacity(self.jobs())
            job._request(state="waiting", queued=time.time())

    def remove(self, name: str) -> None:
        """Remove a job and its uploaded files; its run folder stays.

        Args:
            name: name of the job.

        Raises:
            UserError: there is no such job, the job is running, or the folder of the queue cannot
                be used.
        """
        with self._lock("job"):
            job = self.job(name)
            if job.state == "running":
                raise UserError("This training run is running: stop it first.", "job")
            shutil.rmtree(job.folder)

    def advance(self) -> None:
        """Start the process of the next waiting job, if no job is running.

        Raises:
            UserError: the folder of the queue cannot be used.
        """
        try:
            self._advance()
            self.problem = None
        except Exception as error:
            self.problem = one_line(str(error))
            raise

    def _advance(self) -> None:
        self._processes = [process for process in self._processes if process.poll() is None]
        with self._lock("start"):
            jobs = self.jobs()
            states = {job.name: job.state for job in jobs}
            if "running" in states.values():
                return
            waiting = [job for job in jobs if states[job.name] == "waiting"]
            if waiting:
                self._start(min(waiting, key=lambda job: job.settings["queued"]))

    def _start(self, job: Job) -> None:
        job.report(phase="starting", pid=None, error=None, field=None)
        job._request(state="started", started=time.time())
        command = [sys.executable, "-m", PROGRAM, str(job.folder)]
        with (job.folder / LOG).open("ab") as output:
            process = subprocess.Popen(  # noqa: S603 (arguments of our own)
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=training_environment(os.environ), start_new_session=True,
            )  # fmt: skip
        self._processes.append(process)

    def _check_capacity(self, jobs: Sequence[Job]) -> None:
        if sum(job.state == "waiting" for job in jobs) >= MAX_WAITING:
            message = (
                f"{MAX_WAITING} training runs are waiting already: wait, or remove one of them."
            )
            raise UserError(message, "start")

    @contextlib.contextmanager
    def _lock(self, field: str) -> Iterator[None]:
        """Lock the queue for a `with` block.

        If another server keeps the lock, or the folder of the queue cannot be used, raise UserError
        for `field`.
        """
        try:
            with FileLock(self.folder / ".lock", timeout=_LOCK_SECONDS):
                yield
        except Timeout:
            message = "Another server is changing the list of training runs: try again."
            raise UserError(message, field) from None
        except (OSError, NotImplementedError) as error:  # NotImplementedError: no file locks
            raise _storage_error(self.folder, error, field) from None


def training_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables for the process of a training run, without any secret.

    Args:
        variables: environment of the server.
    """
    inherited = {
        name: value
        for name, value in variables.items()
        if _INHERITED.fullmatch(name) and not _SECRET.search(name)
    }
    return inherited | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}


def too_large(megabytes: str) -> str:
    """Return the error message for texts above MAX_UPLOAD."""
    limit = f"The text has {megabytes} MB: at most {MAX_UPLOAD / 1e6:.0f} MB are allowed."
    command = "minigpt train data=text 'data.train_files=[stories/*.txt]'"
    return f"{limit} Train in a terminal instead: {command}"


def _check(text: str | None, files: Sequence[Path], size: str, minutes: float | None) -> None:
    """Raise UserError if a field of a new job is missing or not allowed."""
    if not (text and text.strip()) and not files:
        raise UserError("The text is empty: paste a text, or add files.", "text")
    try:
        n_bytes = len((text or "").encode())
    except UnicodeEncodeError:
        message = "The text contains half of a character (a surrogate): remove it."
        raise UserError(message, "text") from None
    if len(files) > MAX_FILES:
        message = f"There are {len(files)} files: add at most {MAX_FILES}, or join some."
        raise UserError(message, "files")
    try:
        n_bytes += sum(path.stat().st_size for path in files)
    except OSError:  # such as an upload that was deleted after an hour
        message = "An uploaded file is no longer there: add the files again."
        raise UserError(message, "files") from None
    if n_bytes > MAX_UPLOAD:
        message = too_large(str(math.ceil(n_bytes / 1e6)))
        raise UserError(message, "files" if files else "text")
    if size not in SIZES:
        raise UserError(f"Choose a size: {', '.join(SIZES)}.", "size")
    low, high = MINUTES
    if minutes is None or not low <= minutes <= high:  # NaN is rejected too
        raise UserError(f"Choose from {low:g} to {high:g} minutes.", "minutes")


def _stored(index: int, name: str) -> str:
    """Return the path of a stored upload: a folder with its number, and a harmless form of `name`.

    The model card of the run names the file, so its name should be the one that the visitor knows.
    """
    harmless = re.sub(r"[^\w.-]", "_", name).lstrip(".-")[-_LONGEST_NAME:]
    return f"{index:03d}/{harmless or TEXT}"


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{path} is damaged: remove the folder {path.parent}.", "job") from None


def _storage_error(folder: Path, error: OSError | NotImplementedError, field: str) -> UserError:
    """Return a UserError for `field`: the folder of jobs cannot be used because of `error`."""
    code = getattr(error, "errno", None)
    if code in (errno.ENOSPC, errno.EDQUOT):
        return UserError("The disk is full: free some space, then try again.", field)
    reason = getattr(error, "strerror", None) or error
    problem = f"The folder of the training runs, {folder}, cannot be used ({reason})"
    return UserError(f"{problem}: check its owner, its permissions and its file system.", field)
