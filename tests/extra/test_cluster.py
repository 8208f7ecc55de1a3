"""Sweeps on a real Slurm with one node and on a local Ray, and training in several processes.

`make test-cluster` installs the requirements and runs this in some minutes, as root.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from minigpt.runs.folder import Run
from minigpt.runs.records import read_metrics, read_summary
from tests.conftest import ROOT, write_stories
from tests.extra.slurm_cluster import free_port, slurm, slurm_cluster, wait_for

pytestmark = pytest.mark.timeout(400)

SIZES = {"small-0": "small", "medium-1": "medium", "large-2": "large"}
LONG = "large-2"  # the longest job, which is killed
STEPS = 300


@pytest.fixture
def sweep_of(tmp_path: Path) -> list[str]:
    """Arguments of train.py for a sweep of the three widths, with models of one layer."""
    return [
        sys.executable, "train.py", "-m", "model=small,medium,large",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
        "data=text",
        f"data.train_files=[{write_stories(tmp_path / 'train.txt', 400, 1)}]",
        f"data.valid_files=[{write_stories(tmp_path / 'valid.txt', 40, 2)}]",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.vocab_size=300",
        "data.batch_size=4",
        "model.context_length=16",
        "model.n_layers=1",
        f"budget.tokens={64 * STEPS}",
        "optimizer.warmup_steps=2",
        "optimizer.lr=1e-3",
        "trainer.accelerator=cpu",
        "trainer.log_every_n_steps=1",
        "callbacks=quiet",
        "callbacks.checkpoint_steps=10",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    with slurm_cluster() as folder:
        yield folder


def started(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=file, stderr=file)


def finished(job: subprocess.Popen[bytes], log: Path) -> str:
    """Wait for a process that must succeed; return its output."""
    try:
        code = job.wait(timeout=300)
    finally:
        job.kill()
    output = log.read_text(encoding="utf-8")
    assert code == 0, output
    return output


def steps(folder: Path) -> list[float]:
    return [row["step"] for row in read_metrics(folder) if "train/loss" in row]


def n_starts(folder: Path) -> int:
    return (folder / "train.log").read_text(encoding="utf-8").count("precision  ")


def check_results(sweep: Path, interrupted: str) -> None:
    """Assert that each size finished, `interrupted` in two parts, and appears in scaling."""
    for name in SIZES:
        assert steps(sweep / name) == list(range(1, STEPS + 1))
        assert n_starts(sweep / name) == 1 + (name == interrupted)
        assert read_summary(sweep / name)["status"] == "finished"
    scaling = [str(Path(sys.executable).with_name("minigpt")), "scaling", str(sweep)]
    process = subprocess.run(scaling, capture_output=True, text=True, encoding="utf-8")
    assert process.returncode == 0, process.stderr
    rows = json.loads((sweep / "scaling.json").read_text(encoding="utf-8"))["runs"]
    assert [row["model"] for row in rows] == list(SIZES.values())
    assert all(row["status"] == "finished" for row in rows)


# ---------------------------------------------------------------------------- Slurm


def test_slurm_sweep_continues_a_requeued_job(cluster: Path, sweep_of: list[str], tmp_path: Path):
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    launcher = started([*sweep_of, "hydra/launcher=submitit_slurm"], log)
    wait_for(lambda: len(read_metrics(sweep / LONG)) > 30, 200, f"{LONG} to train")
    (array,) = {job.partition("_")[0] for job in slurm("squeue", "-rho", "%i").split()}
    slurm("scontrol", "requeue", f"{array}_2")
    finished(launcher, log)
    check_results(sweep, interrupted=LONG)


@pytest.mark.parametrize("submitted", ["by the launcher", "by sbatch"])
def test_slurm_job_of_two_tasks_continues_after_its_time_limit_signal(
    submitted: str, cluster: Path, sweep_of: list[str], tmp_path: Path
):
    """SIGUSR1 is the signal that Slurm sends before a job times out."""
    runs, log = tmp_path / "sweep", tmp_path / "log"
    more = ["model=small", "trainer=ddp", f"budget.tokens={128 * STEPS}"]
    if submitted == "by sbatch":
        python, script, _, _, _, *common = sweep_of
        train = shlex.join([python, script, *common, *more, "resume=auto", f"runs_dir={runs}"])
        sbatch = ["sbatch", "--wait", "--ntasks-per-node=2", "--signal=USR1@120", "--requeue"]
        command = [*sbatch, f"--output={log}.job", f"--wrap=srun --kill-on-bad-exit {train}"]
    else:
        tasks = "hydra.launcher.tasks_per_node=2"
        command = [*sweep_of, *more, "hydra/launcher=submitit_slurm", tasks]
    waiting = started(command, log)
    wait_for(lambda: any(len(steps(run)) > 30 for run in runs.glob("small-*")), 200, "training")
    (job,) = slurm("squeue", "-rho", "%i").split()
    slurm("scancel", "--signal=USR1", job)
    finished(waiting, log)
    (folder,) = runs.glob("small-*")
    assert folder.name == (f"small-{job}.0" if submitted == "by sbatch" else "small-0")
    assert steps(folder) == list(range(1, STEPS + 1))
    assert n_starts(folder) == 2
    assert "device     cpu ×2" in (folder / "train.log").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------- Ray


@pytest.fixture(scope="module")
def ray() -> Iterator[str]:
    """The address of a Ray cluster with one machine and two CPUs."""
    port, ray = free_port(), str(Path(sys.executable).with_name("ray"))
    address = ["--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2"]
    quiet = ["--include-dashboard=false", "--disable-usage-stats"]
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        head = [ray, "start", "--head", "--block", *address, *quiet, f"--temp-dir={folder}"]
        daemon = started(head, Path(folder) / "log")
        try:
            yield f"127.0.0.1:{port}"
        finally:
            daemon.terminate()  # which ends its children
            daemon.wait(timeout=60)


def test_ray_sweep_continues_a_killed_job(ray: str, sweep_of: list[str], tmp_path: Path):
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    there = f"hydra.launcher.ray.init.address={ray}"
    launcher = started([*sweep_of, "hydra/launcher=ray", there], log)
    wait_for(lambda: len(read_metrics(sweep / LONG)) > 30, 250, f"{LONG} to train")
    os.kill(process_that_has_open(sweep / LONG / "train.log"), signal.SIGKILL)
    finished(launcher, log)
    check_results(sweep, interrupted=LONG)


def process_that_has_open(path: Path) -> int:
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(file.resolve() == path for file in folder.iterdir()):
                return int(folder.parent.name)
        except OSError:  # it has just ended
            continue
    raise AssertionError(f"no process has {path} open")


# ---------------------------------------------------------------------------- processes


def test_fsdp_on_two_processes_equals_one_process_and_continues(
    sweep_of: list[str], tmp_path: Path
):
    python, script, _, _, _, *common = sweep_of
    common += [
        "optimizer=adamw",
        "trainer.precision=32-true",
        f"runs_dir={tmp_path / 'runs'}",
        "model.d_model=64",
    ]
    torchrun = [python, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    fsdp = ["trainer.strategy=fsdp", "data.batch_size=2", "name=two", "resume=auto"]
    folder, log = tmp_path / "runs/two", tmp_path / "log"
    launcher = started([*torchrun, script, *common, *fsdp], log)
    wait_for(lambda: len(read_metrics(folder)) > 30, 120, "two processes to train")
    launcher.terminate()
    launcher.wait(timeout=60)
    assert read_summary(folder)["status"] == "interrupted", log.read_text(encoding="utf-8")
    finished(started([*torchrun, script, *common, *fsdp], log), log)
    alone = tmp_path / "runs/one"
    finished(started([python, script, *common, "name=one"], log), log)
    assert n_starts(folder) == 2
    losses = [[(row["step"], row["train/loss"]) for row in read_metrics(run) if "train/loss" in row]
              for run in (folder, alone)]  # fmt: skip
    assert len(losses[0]) == STEPS
    for ours, theirs in zip(*losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)  # rounding differs, and grows as it trains
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    ends = [read_summary(run)["val/perplexity"] for run in (folder, alone)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)
    assert Run.load(folder).load_model().n_parameters == Run.load(alone).load_model().n_parameters


def test_sweep_continues_after_a_job_on_two_devices_diverges(sweep_of: list[str], tmp_path: Path):
    log = tmp_path / "log"
    two = ["model=small", "optimizer.lr=1e20,1e-3", "trainer=ddp", "trainer.devices=2"]
    launcher = started([text for text in sweep_of if "optimizer.lr" not in text] + two, log)
    assert launcher.wait(timeout=200) == 2
    assert re.search(r"error: .*\bloss\b", log.read_text(encoding="utf-8"))
    ends = [read_summary(tmp_path / "sweep" / f"small-{n}")["status"] for n in (0, 1)]
    assert ends == ["failed", "finished"]
