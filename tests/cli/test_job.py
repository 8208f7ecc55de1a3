"""The process of a training from the page, run in this process."""

import errno
import gzip
import shlex
import signal
import sys
from itertools import islice
from typing import Any

import pytest

from minigpt.cli import job as job_module
from minigpt.cli.compose import load_config
from minigpt.cli.job import budget_words, check_unpacked, job_words, run_job, tokens_per_second
from minigpt.cli.program import Program
from minigpt.core.settings import DiskFullError, UserError
from minigpt.data.sources import bundled_sample
from minigpt.playground import training
from minigpt.playground.training import SIZES, Job, TrainingQueue
from minigpt.runs.folder import Run
from minigpt.runs.names import CHECKPOINTS
from minigpt.training import assembly, loop
from tests.conftest import ROOT, composed, naming, tiny_overrides

PROGRAM = Program("minigpt", ("train",), "minigpt")


@pytest.fixture
def queue(tmp_path, monkeypatch) -> TrainingQueue:
    monkeypatch.chdir(tmp_path)
    return TrainingQueue(tmp_path / "jobs", tmp_path / "runs")


@pytest.fixture(autouse=True)
def no_benchmark(monkeypatch) -> None:
    monkeypatch.setattr(assembly, "matmul_peak", lambda *_: 1e9)


def run_started(job: Job) -> None:
    """Train a job that the queue has started."""
    job._request(state="started")
    run_job(job, PROGRAM)


def stories(n: int) -> str:
    return "\n<|endoftext|>\n".join(islice(bundled_sample().stories("train"), n))


def test_every_size_of_the_page_is_a_model_size():
    for size in SIZES:
        assert (ROOT / f"conf/model/{size}.yaml").is_file()


def test_text_becomes_a_run_that_its_command_repeats(queue, monkeypatch):
    monkeypatch.setattr(job_module, "tokens_per_second", lambda *_: 700.0)
    monkeypatch.setitem(training.SIZES, "w32", "the smallest")
    job = queue.add(stories(60), [], "w32", 0.1)
    run_started(job)
    assert (job.state, job.error) == ("finished", None)
    assert not any(path.exists() for path in job.uploads)  # the text and what was prepared from it
    assert not (job.folder / training.CACHE).exists()
    assert job.run is not None
    run = Run.load(job.run)
    assert run.folder.parent == queue.runs_dir
    assert run.summary["tokens"] == job.status["tokens"] == 4096
    assert len(run.snapshots) == 3
    words = shlex.split(job.status["command"])
    same = load_config("train", words[words.index("train") + 1 :])
    assert (same.model.d_model, same.budget.tokens) == (32, 4096)
    assert same.data.train_files == ("text.txt",)


@pytest.mark.parametrize(
    ("text", "context", "batch", "holdout"),
    [
        (stories(9).replace("<|endoftext|>", "")[:4500], 256, 3, 0.05),
        (stories(9).replace("<|endoftext|>", "")[:2000], 128, 2, 0.05),
        (stories(7)[:4500], 256, 3, 0.14),
    ],
    ids=["batch", "context", "stories"],
)
def test_short_text_is_trained_from_a_release_with_settings_that_fit_it(
    queue, monkeypatch, text, context, batch, holdout
):
    measure = tokens_per_second
    monkeypatch.setattr(job_module, "tokens_per_second", lambda *a: min(200, measure(*a, 0)))
    start = {"path": str(ROOT / "releases/w64"), "name": "w64"}
    job = queue.add(text, [], "small", 0.1, start)
    run_started(job)
    assert (job.state, job.error) == ("finished", None)
    words = shlex.split(job.status["command"])
    repeated = load_config("train", words[words.index("train") + 1 :])
    assert job.run is not None
    run = Run.load(job.run)
    assert run.load_model().config.context_length == repeated.model.context_length == context
    assert (repeated.data.batch_size, repeated.data.holdout) == (batch, holdout)
    assert run.summary["tokens"] == repeated.budget.tokens >= batch * context


def test_stopped_job_continues_with_the_same_settings(queue, monkeypatch):
    configs: list[Any] = []

    def train(config: Any) -> None:
        configs.append(config)
        if len(configs) == 1:
            raise SystemExit(128 + signal.SIGTERM)

    monkeypatch.setattr(job_module, "tokens_per_second", lambda *_: 5000.0)
    monkeypatch.setattr(loop, "train", train)
    job = queue.add(stories(20), [], "small", 10)
    run_started(job)
    assert (job.state, job.can_continue) == ("stopped", True)
    assert all(path.exists() for path in job.uploads)
    monkeypatch.setattr(job_module, "tokens_per_second", lambda *_: pytest.fail("measured again"))
    run_started(job)
    assert job.state == "finished"
    assert configs[0] == configs[1]
    assert (configs[0].resume, configs[0].logger.kind) == ("auto", "csv")
    assert configs[0].budget.tokens == 10 * 60 * 5000 // 2048 * 2048


@pytest.mark.parametrize(
    ("name", "content", "names"),
    [
        ("a.txt", b"one story", [str(job_module.MIN_WORDS)]),
        ("a.txt", b"\xff\xfe\x00\x00", ["a.txt"]),
        ("a.png", b"\x89PNG\r\n", ["a.png"]),
        ("a.csv", b"x,y\n1", ["a.csv"]),
        ("a.txt.gz", b"no gzip", ["a.txt.gz"]),
    ],
    ids=["short", "binary", "image", "table", "damaged"],
)
def test_error_of_the_data_names_the_upload_and_its_field(queue, tmp_path, name, content, names):
    path = tmp_path / name
    path.write_bytes(content)
    job = queue.add(None, [path], "w64", 1)
    run_started(job)
    assert (job.state, job.status["field"]) == ("failed", "files")
    assert job.error is not None
    assert "\n" not in job.error
    assert str(tmp_path) not in job.error
    for part in names:
        assert part in job.error
    assert not any(path.exists() for path in job.uploads)


def test_uploads_are_limited_after_decompression(tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "MAX_UNPACKED", 1000)
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.gz"
    plain.write_bytes(b"x" * 500)
    packed.write_bytes(gzip.compress(b"x" * 501))
    assert check_unpacked([plain]) == 500
    with pytest.raises(UserError, match=naming("b.txt.gz")) as error:
        check_unpacked([plain, packed])
    assert error.value.argument == "data.train_files"


def test_compressed_parquet_is_limited_by_what_is_stored_and_by_its_text(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    plain, packed = tmp_path / "a.parquet", tmp_path / "b.parquet.gz"
    parquet.write_table(pa.table({"text": ["x" * 100] * 30}), plain)
    packed.write_bytes(gzip.compress(plain.read_bytes() + b"\0" * 100_000))
    monkeypatch.setattr(job_module, "MAX_UNPACKED", 3000)
    assert check_unpacked([plain]) == 3000  # one byte for each ASCII character
    stored: list[object] = []
    monkeypatch.setattr("tempfile.TemporaryFile", lambda *a: stored.append(a))
    with pytest.raises(UserError, match=naming("b.parquet.gz")):
        check_unpacked([packed])
    assert stored == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits memory")
def test_small_parquet_with_one_long_text_in_many_rows_is_refused_before_it_fills_the_memory(
    tmp_path, monkeypatch
):
    import resource

    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int32()), ["x" * 20_000_000])
    parquet.write_table(pa.table({"text": column}), path, store_schema=False)
    assert path.stat().st_size < 10_000_000
    monkeypatch.setattr(job_module, "MAX_MEMORY", 1_000_000_000)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError, match=naming("a.parquet")) as error:
        check_unpacked([path])
    assert error.value.argument == "data.train_files"
    assert "\n" not in str(error.value)
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2_500_000  # KiB


def test_error_of_a_setting_says_that_the_page_lacks_it(queue, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("id,body\n1,a story\n2,another story\n")
    job = queue.add(None, [path], "w64", 1)
    run_started(job)
    assert job.error is not None
    assert "data.field=" in job.error
    assert "terminal" in job.error


def test_training_from_a_run_has_its_size_and_its_vocabulary(queue):
    release = ROOT / "releases/medium"
    job = queue.add("text", [], "w64", 1, {"path": str(release), "name": "medium"})
    words = job_words(job, 4)
    assert (words["model"], words["init_from"]) == ("medium", str(release))
    assert "data.vocab_size" not in words


def test_speed_is_measured_without_leaving_a_run(tmp_path):
    config = composed([*tiny_overrides(tmp_path), "budget.tokens=1e6"])
    assert tokens_per_second(config, tmp_path / "calibration", seconds=0) > 0
    assert not (tmp_path / "calibration").exists()
    words = budget_words(config, 30.5 / 60, 64, 1000)
    assert words["budget.tokens"] == 64 * 30
    assert words["optimizer.warmup_steps"] == 2
    assert budget_words(config, 0, 64, 1000)["callbacks.snapshots"] == 2


@pytest.mark.parametrize(
    ("minutes", "megabytes", "n"), [(1, 1, None), (60, 1, 20), (1440, 1, 40), (60, 100, 11)]
)
def test_long_training_validates_more_often_unless_its_text_is_long(minutes, megabytes, n):
    config = load_config("train", ["data=text", "data.train_files=[a.txt]"])
    words = budget_words(config, minutes, 13_000, megabytes * 10**6)
    assert words.get("trainer.n_validations") == n


def interrupted() -> RuntimeError:
    """An error that a library raises because a KeyboardInterrupt has stopped it halfway."""
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("halfway") from None
    except RuntimeError as error:
        return error


def ended_by(queue: TrainingQueue, monkeypatch, error: BaseException | None) -> Job:
    """A job whose training ended with `error`; None means that it finished."""

    def train(*_: object) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(job_module, "_train", train)
    job = queue.add("text", [], "w64", 1)
    run_started(job)
    return job


@pytest.mark.parametrize(
    "error",
    [DiskFullError("cannot write last.ckpt"), OSError(errno.ENOSPC, "No space left", "train.bin")],
    ids=["known", "other"],
)
def test_full_disk_stops_a_job_and_keeps_its_uploads(queue, monkeypatch, error):
    job = ended_by(queue, monkeypatch, error)
    assert (job.state, job.can_continue, job.status["field"]) == ("stopped", True, "start")
    assert job.error is not None
    assert "full" in job.error
    assert all(path.exists() for path in job.uploads)
    queue.resume(job.name)
    assert job.error is None
    queue.stop(job.name)
    assert (job.state, job.error) == ("stopped", None)


def test_error_that_follows_an_interrupt_stops_a_job(queue, monkeypatch):
    job = ended_by(queue, monkeypatch, interrupted())
    assert (job.state, job.error, job.can_continue) == ("stopped", None, True)
    assert all(path.exists() for path in job.uploads)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DiskFullError("full"), interrupted()])
def test_job_that_continues_at_once_keeps_its_uploads(queue, monkeypatch, error):
    report = Job.report

    def report_and_continue(job: Job, **values: Any) -> None:
        report(job, **values)
        job._request(state="waiting")  # as if a visitor pressed Continue now
        report(job, phase="finished")

    monkeypatch.setattr(Job, "report", report_and_continue)
    job = ended_by(queue, monkeypatch, error)
    assert job.state == "waiting"
    assert all(path.exists() for path in job.uploads)


@pytest.mark.parametrize("error", [UserError("wrong"), RuntimeError("wrong"), None])
@pytest.mark.parametrize("saved", [True, False])
def test_uploads_are_kept_after_a_failure_only_with_a_checkpoint(
    queue, monkeypatch, tmp_path, error, saved
):
    folder = tmp_path / "runs/saved" / CHECKPOINTS
    folder.mkdir(parents=True)
    if saved:
        (folder / "last.ckpt").touch()
    monkeypatch.setattr(Job, "run", folder.parent)
    job = ended_by(queue, monkeypatch, error)
    assert job.state == ("finished" if error is None else "failed")
    kept = saved and error is not None
    assert [path.exists() for path in job.uploads] == [kept]


@pytest.mark.parametrize(
    ("argument", "field"),
    [
        (None, "text"),
        ("data", "text"),
        ("data.holdout", "text"),
        ("data.batch_size", "text"),
        ("data.cache_dir", "start"),
        ("data.vocab_size", "start"),
        ("database", "start"),
        ("runs_dir", "start"),
    ],
)
def test_only_errors_of_the_data_appear_at_the_text(queue, monkeypatch, argument, field):
    job = ended_by(queue, monkeypatch, UserError("wrong", argument))
    assert (job.state, job.status["field"]) == ("failed", field)
