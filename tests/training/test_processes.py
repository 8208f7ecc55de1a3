"""Training in several processes, started by Lightning or torchrun: gloo on CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.evaluation import EvaluationConfig, StoriesConfig, evaluate
from minigpt.runs.folder import Run
from minigpt.runs.records import read_metrics, read_summary
from tests.conftest import ROOT, composed, trained_folder

pytestmark = pytest.mark.timeout(300)  # a process imports for five seconds, on a core of its own

FEW = EvaluationConfig(stories=StoriesConfig(prompts=("Once",), n=1, max_tokens=5), words=("Tom",))


def run(command: list[str]) -> str:
    """Run `command`, which must succeed, and return its stderr."""
    variables = os.environ | {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    process = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, encoding="utf-8"
    )
    assert process.returncode == 0, process.stderr
    assert "sync_dist" not in process.stderr
    return process.stderr


def check_equal(run: Path, alone: Path) -> None:
    """Check that losses, norms and learning rates of `run` equal those of `alone`."""
    columns = ("train/loss", "train/divergence", "val/loss", "grad_norm", "lr")
    rows = [
        [{name: row[name] for name in ("step", "tokens", *columns) if name in row} for row in rows]
        for rows in (read_metrics(run), read_metrics(alone))
    ]
    assert len(rows[0]) == len(rows[1]) > 10
    for ours, theirs in zip(*rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.fixture
def two(tiny: list[str]) -> list[str]:
    return [*tiny, "trainer=ddp", "trainer.precision=32-true", "trainer.n_validations=2"]


@pytest.mark.long
def test_multirun_on_two_devices_equals_one_device_with_twice_the_batch(
    two: list[str], tmp_path: Path
):
    sweep = tmp_path / "runs/a sweep"
    log = run(
        [sys.executable, "train.py", "-m", *two, "trainer.devices=2", f"hydra.sweep.dir='{sweep}'"]
    )
    assert [path.name for path in sweep.iterdir() if path.is_dir()] == ["small-0"]
    assert log.count("cpu ×2") == 1  # only rank 0 logs
    check_equal(sweep / "small-0", trained_folder([*two, "data.batch_size=8"]))
    evaluation = evaluate(Run.load(sweep / "small-0"), FEW)
    logged = read_summary(sweep / "small-0")["val/perplexity"]
    assert evaluation.perplexity == pytest.approx(logged, rel=1e-5)


@pytest.mark.long
def test_the_processes_of_torchrun_share_a_folder_a_log_and_a_wandb_run(two: list[str]):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    run([*torchrun, "train.py", *two, "logger=wandb"])
    (folder,) = Path(composed(two).runs_dir).iterdir()
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert [log.count(text) for text in ("cpu ×2", "report.html")] == [1, 1]
    check_equal(folder, trained_folder([*two, "data.batch_size=8"]))


@pytest.mark.long
def test_student_on_two_devices_equals_one_device_with_twice_the_batch(two: list[str]):
    teacher = trained_folder([*two, "model.d_model=24", "name=teacher"])
    taught = [*two, f"teacher={teacher}", "teacher.temperature=2"]
    run([sys.executable, "train.py", *taught, "trainer.devices=2", "name=student"])
    student = teacher.with_name("student")
    assert "train/divergence" in read_metrics(student)[0]
    check_equal(student, trained_folder([*taught, "data.batch_size=8"]))
