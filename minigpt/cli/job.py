"""Process that runs a job of the playground: python -m minigpt.cli.job FOLDER.

A job is a training run that a visitor of the page has started. FOLDER contains the uploaded files,
the training time in minutes, and either the chosen model size or the path of the model to start
from. From these, the process composes the settings of `minigpt train`. Words that a visitor typed
are never used as settings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from minigpt.cli.exits import is_interrupt, orderly_exit
from minigpt.cli.program import Program, describe
from minigpt.core.files import DISK_FULL
from minigpt.core.settings import DiskFullError, UserError, speak
from minigpt.core.typed import typed_settings
from minigpt.playground.training import CACHE, FULL, LOCK, SIZES, SNAPSHOTS, Job

CALIBRATION_SECONDS = 4.0
_WARM_UP = 3  # updates that are not timed
MAX_UNPACKED = 1_000_000_000  # bytes of the uploads after decompression
MINUTES_BETWEEN = 3.0  # minutes between two validations of a long training
MAX_VALIDATIONS = 40
MAX_MEMORY = 4_000_000_000  # bytes of memory to decompress the uploads with
_SMALL_TEXT = 2_000_000  # bytes; for less text, docs/your-own-text.md recommends other settings
_LONG_BUDGET = 100_000_000  # tokens; more than a calibration can use
MIN_WORDS = 200  # words; fewer may have less than one window of _MIN_CONTEXT tokens
_MIN_CONTEXT = 32  # tokens; with a shorter context, a text is too short to train on
# Arguments of errors that are about the text of the visitor. An error without an argument is, too.
# data.batch_size is wrong if the text is too short for one batch.
_OF_DATA = {
    None, "data", "data.train_files", "data.source", "data.field", "data.separator", "data.holdout",
    "data.batch_size",
}  # fmt: skip
_LOCK_SECONDS = 10.0  # to wait for the page, which takes the lock briefly to see if a job runs


def main() -> None:
    """Run the job in the folder that the first command-line argument names."""
    job = Job(Path(sys.argv[1]))
    with FileLock(job.folder / LOCK, timeout=_LOCK_SECONDS):
        job.report(phase="preparing", pid=os.getpid())
        if job.settings["state"] == "stopping":
            job.report(phase="stopped")
            return
        program = Program("minigpt", ("train",), "minigpt")
        speak(program.command)
        with orderly_exit("train"):
            run_job(job, program)


def run_job(job: Job, program: Program) -> None:
    """Train, and record the outcome in status.json.

    The uploaded files are deleted at the end, unless the training can be continued.

    Args:
        job: the job.
        program: the program that the commands in messages use.
    """
    try:
        _train(job, program)
        outcome: dict[str, Any] = {"phase": "finished"}
    except (KeyboardInterrupt, SystemExit):
        outcome = {"phase": "stopped"}
    except Exception as error:
        outcome = _failure(job, error, program)
    # Decided before the report: after it, a visitor may continue the job, which needs the files.
    phase = outcome["phase"]
    is_over = phase == "finished" or (phase == "failed" and not job.has_checkpoint)
    job.report(**outcome)
    if is_over:
        job.delete_data()


def _failure(job: Job, error: Exception, program: Program) -> dict[str, Any]:
    """Return the outcome of a job that an error has ended, for status.json.

    After an interrupt or on a full disk, the job is not failed but stopped, so it can continue.
    """
    from minigpt.cli.hydra_errors import explain_failure

    if isinstance(error, DiskFullError) or getattr(error, "errno", None) in DISK_FULL:
        print(error, file=sys.stderr)  # job.log names the file
        return {"phase": "stopped", "error": FULL, "field": "start"}
    if is_interrupt(error):
        return {"phase": "stopped"}
    if not isinstance(error, UserError):
        traceback.print_exception(error)
        reason = explain_failure(error) or f"{type(error).__name__}: see {job.folder}/job.log"
        return {"phase": "failed", "error": reason, "field": "start"}
    if error.argument == "data.batch_size":  # even with the shortest context
        message = f"The text is too short to train on: add text, at least about {MIN_WORDS} words."
        return {"phase": "failed", "error": message, "field": _field(job, error)}
    message = describe(error, program)
    settings = {error.argument, *error.fix} - {None, "data.train_files", "init_from"}
    if settings or error.command is not None:
        message += " (only in a terminal: this page has no such setting)"
    for path, name in job.uploads.items():
        message = message.replace(str(path), name)
    return {"phase": "failed", "error": message, "field": _field(job, error)}


def _field(job: Job, error: UserError) -> str:
    """Return the form field at which the page shows an error: "text", "files" or "start"."""
    if error.argument not in _OF_DATA:
        return "start"
    return "text" if job.settings["pasted"] and len(job.uploads) == 1 else "files"


def _train(job: Job, program: Program) -> None:
    from minigpt.cli.compose import load_config
    from minigpt.core.process import tune_process
    from minigpt.training.loop import train

    tune_process()
    settings, cache = job.settings, job.folder / CACHE
    words = job.status.get("words")  # a job that continues does not need the model it started from
    n_bytes = check_unpacked(list(job.uploads))
    if words is None:
        words = job_words(job, n_bytes)
        job.report(words=words)
    place: dict[str, Any] = {"data.cache_dir": str(cache), "logger": "csv"}
    place["data.train_files"] = list(map(str, job.uploads))
    budget = job.status.get("budget")
    if budget is None:
        job.report(phase="calibrating")
        words, config, rate = _calibrate(words, place, job.folder / "calibration")
        job.report(words=words)
        budget = budget_words(config, settings["minutes"], rate, n_bytes)
    words |= budget
    names = {"data.train_files": list(job.uploads.values())}
    run = Path(settings["runs_dir"]) / f"{words['model']}-{job.name}"
    command = program.command("train", **{**words, **names})
    tokens = budget["budget.tokens"]
    job.report(phase="training", run=str(run), command=command, budget=budget, tokens=tokens)
    place |= {"runs_dir": str(run.parent), "name": run.name, "resume": "auto"}
    train(load_config("train", typed_settings({**words, **place})))


def _calibrate(
    words: dict[str, Any], place: dict[str, Any], folder: Path
) -> tuple[dict[str, Any], Any, float]:
    """Measure the training speed, with settings that fit the text if it is too short for `words`.

    These are a smaller batch, a shorter context or a larger share of held-out stories.

    Args:
        words: settings of the run.
        place: more settings, such as the text files.
        folder: folder for the measurement, deleted at the end.

    Returns:
        `words` with settings that fit a short text, the `TrainConfig` of a longer training run, and
        the speed in tokens per second.

    Raises:
        UserError: the settings or the data are invalid, such as a text without a single window.
    """
    from minigpt.cli.compose import load_config

    while True:
        long = {**words, **place, "budget.tokens": _LONG_BUDGET}
        config = load_config("train", typed_settings(long))
        try:
            return words, config, tokens_per_second(config, folder)
        except UserError as error:
            fix, length = dict(error.fix), config.model.context_length // 2
            if error.argument == "data.batch_size" and not fix and length >= _MIN_CONTEXT:
                fix = {"model.context_length": length}
            is_new = not fix.items() <= words.items()
            if error.argument not in ("data.batch_size", "data.holdout") or not is_new:
                raise
            words = {**words, **fix}


def job_words(job: Job, n_bytes: int) -> dict[str, Any]:
    """Return the settings of a job's run, except token budget, text files and output folders.

    Args:
        job: the job.
        n_bytes: size of the job's text in bytes.

    Returns:
        Settings of `minigpt train` by name.
    """
    settings = job.settings
    words: dict[str, Any] = {"model": settings["size"], "data": "text", "trainer.devices": "1"}
    if (start := settings["init_from"]) is not None:
        return {"experiment": "finetune", "init_from": start["path"], **words, **_shape(start)}
    if n_bytes < _SMALL_TEXT:
        words |= {"data.vocab_size": 1000, "optimizer.weight_decay": 0.4}
    return words


def budget_words(config: Any, minutes: float, rate: float, n_bytes: int) -> dict[str, Any]:
    """Return the settings that adapt a training run to a length in minutes.

    The training has at least one update. Its warm-up is at most a tenth of its updates. It writes
    snapshots. If it has at least 25 updates, it also writes at least 25 rows of metrics. A long
    training validates, and writes sample stories, about every MINUTES_BETWEEN minutes, or less
    often if the text is so long that this would take more than a tenth of the time.

    Args:
        config: settings of a longer training run, a `TrainConfig`.
        minutes: length of the training.
        rate: training speed in tokens per second.
        n_bytes: size of the text.
    """
    tokens = 60 * minutes * rate
    per_step = config.data.windows_per_batch * config.model.context_length
    n_steps = max(int(tokens) // per_step, 1)
    # A validation token takes a third of the time of a training token, and about four bytes.
    affordable = 0.3 * tokens / max(config.data.holdout * n_bytes / 4, 1)
    n_validations = int(min(minutes / MINUTES_BETWEEN, affordable, MAX_VALIDATIONS))
    more = n_validations > config.trainer.n_validations
    return {
        **({"trainer.n_validations": n_validations} if more else {}),
        "budget.tokens": n_steps * per_step,
        "optimizer.warmup_steps": min(config.optimizer.warmup_steps, n_steps // 10),
        "callbacks.snapshots": min(SNAPSHOTS, n_steps + 1),
        "trainer.log_every_n_steps": min(config.trainer.log_every_n_steps, n_steps // 50 + 1),
    }


def _shape(start: dict[str, Any]) -> dict[str, Any]:
    """Return settings that give the new model the same shape as the model to start from.

    Args:
        start: the model to start from; the path of its checkpoint is `start["path"]`.
    """
    from minigpt.cli.compose import load_config
    from minigpt.runs.folder import Run

    try:
        run = Run.load(start["path"])
        trained = dataclasses.asdict(run.load_model().config)
    except UserError as error:
        raise UserError(error.message, "init_from") from None
    size = run.config.get("size") if run.config.get("size") in SIZES else "small"
    shape = dataclasses.asdict(load_config("train", [f"model={size}"]).model)
    different = {name: value for name, value in trained.items() if shape[name] != value}
    return {"model": size, **{f"model.{name}": value for name, value in different.items()}}


def check_unpacked(paths: list[Path]) -> int:
    """Return the total size of files after decompression; it must not exceed MAX_UNPACKED bytes.

    For a Parquet file, only the texts of the stories are counted. Reading stops when the limit is
    exceeded. A compressed Parquet file is decompressed to the disk only after its decompressed size
    is known to be within the limit.

    Args:
        paths: the files.

    Raises:
        UserError: a file cannot be read, the files are too large, or a file needs more memory than
            MAX_MEMORY, such as a Parquet file in which many rows refer to one long text.
    """
    from minigpt.core.process import memory_limit

    total = 0
    for path in paths:
        try:
            with memory_limit(MAX_MEMORY):
                total = _unpacked(path, total)
        except MemoryError:
            most = f"more than {MAX_MEMORY / 1e9:g} GB of memory"
            message = f"{path} needs {most} when decompressed: write it with shorter texts"
            raise UserError(message, "data.train_files") from None
    return total


def _unpacked(path: Path, start: int) -> int:
    """Return `start` plus the size of a file after decompression, as for `check_unpacked`."""
    from minigpt.data.files import read_pieces
    from minigpt.data.formats import detect_format, unpack
    from minigpt.tokenizer import utf8_length

    file_format = detect_format(path)
    is_parquet = file_format.kind == "parquet"  # whose columns are compressed
    end = start
    if file_format.packing or not is_parquet:
        end = _sum(path, map(len, unpack(path, file_format.packing)), start)
    if is_parquet:
        end = _sum(path, (utf8_length(text) for text, _ in read_pieces(path)), start)
    return end


def _sum(path: Path, sizes: Iterable[int], start: int) -> int:
    """Return `start` plus the sum of `sizes`.

    Raises:
        UserError: the result exceeds MAX_UNPACKED. The message names `path`.
    """
    total = start
    for size in sizes:
        total += size
        if total > MAX_UNPACKED:
            limit = f"at most {MAX_UNPACKED / 1e9:g} GB are allowed; train in a terminal instead"
            message = f"{path} and the files before it are too large when decompressed: {limit}"
            raise UserError(message, "data.train_files")
    return total


def tokens_per_second(config: Any, folder: Path, seconds: float = CALIBRATION_SECONDS) -> float:
    """Return the training speed in tokens per second, measured in a short training run.

    Args:
        config: settings of the training, a `TrainConfig`.
        folder: folder for the short run, deleted at the end.
        seconds: length of the measurement.

    Raises:
        UserError: the settings or the data are invalid.
    """
    from lightning.pytorch.callbacks import Callback

    from minigpt.training.loop import train

    class Measured(Exception):  # noqa: N818 (not an error: it ends the run without a validation)
        pass

    class Clock(Callback):
        start, rate = 0.0, 0.0

        def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
            steps, now = trainer.global_step - _WARM_UP, time.monotonic()
            if steps <= 0:
                self.start = now
            elif now - self.start >= seconds:
                per_step = config.data.windows_per_batch * config.model.context_length
                self.rate = steps * per_step / (now - self.start)
                raise Measured

    quiet = dataclasses.replace(config.callbacks, prompts=(), progress_bar=False)
    trainer = dataclasses.replace(config.trainer, n_validations=1)
    config = dataclasses.replace(config, callbacks=quiet, trainer=trainer, runs_dir=str(folder))
    clock, log = Clock(), logging.getLogger("minigpt")
    handlers, log.handlers = log.handlers, []  # the log would look like that of a failed run
    try:
        with contextlib.suppress(Measured):
            train(config, callbacks=[clock])
    finally:
        log.handlers = handlers
        shutil.rmtree(folder, ignore_errors=True)
    return clock.rate


if __name__ == "__main__":
    main()
