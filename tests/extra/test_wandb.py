"""W&B sweeps and runs, with the installed wandb programs and a mock of their server."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from minigpt.runs.folder import Run
from minigpt.runs.records import read_samples
from tests.conftest import ROOT, write_stories
from tests.wandb_server import WandbServer

SWEEP = ROOT / "sweeps" / "scaling.yaml"
PARAMETERS = {"w32": 138_784, "w64": 359_488, "w96": 662_112}  # the first of the grid
DIVERGING = 1e20  # a learning rate

# The agent polls its job every five seconds: four jobs take forty to sixty seconds.
pytestmark = pytest.mark.timeout(300)


def run(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `python <arguments>` in the project, with W&B's settings and credentials in `folder`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "NETRC": str(folder / "netrc"),
        "NO_PROXY": "*",
        "PYTHONUTF8": "1",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_DIR": str(folder),
    }
    environment |= {f"WANDB_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "CACHE", "DATA")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**environment, **variables},
        capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip


@dataclass
class Sweep:
    """The server after three jobs of the sweep and a fourth, which diverges."""

    server: WandbServer
    agent: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    folder = tmp_path_factory.mktemp("sweep")
    two_steps = {
        "data": "text",
        "data.train_files": write_stories(folder / "train.txt", 400, seed=1).as_posix(),
        "data.valid_files": write_stories(folder / "valid.txt", 40, seed=2).as_posix(),
        "data.tokenizer": (ROOT / "releases/small").as_posix(),  # its 3,000 tokens
        "data.cache_dir": (folder / "cache").as_posix(),
        "data.batch_size": 1,
        "runs_dir": (folder / "runs").as_posix(),
        "budget.tokens": 512,
        "optimizer.warmup_steps": 0,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.n_validations": 1,
        "trainer.log_every_n_steps": 1,
    }
    diverging = {"model": "small", "optimizer.lr": DIVERGING}
    with WandbServer(fixed=two_steps, more_jobs=[diverging], at_most=3) as server:
        wandb = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
        created = run("-m", "wandb", "sweep", str(SWEEP), folder=folder, **wandb)
        assert created.returncode == 0, created.stderr
        name = created.stderr.rpartition("wandb agent ")[2].split()[0]
        stop = ("--max-consecutive-failed-runs", "1")
        agent = run("-m", "wandb", "agent", *stop, name, folder=folder, **wandb)
        yield Sweep(server, agent)


def test_the_sweep_is_created_from_our_file(sweep: Sweep):
    assert sweep.server.sweep == yaml.safe_load(SWEEP.read_text(encoding="utf-8"))
    assert sweep.server.sweep["metric"] == {"name": "val/perplexity", "goal": "minimize"}


def test_the_agent_trains_each_size_to_its_end(sweep: Sweep):
    runs = list(sweep.server.runs.values())[:3]
    assert [run.sweep_settings["model"] for run in runs] == list(PARAMETERS)
    for run in runs:
        assert run.exit_code == 0, sweep.agent.stdout + sweep.agent.stderr
        assert run.config["model"] == run.sweep_settings["model"]
        assert run.config["parameters"] == PARAMETERS[run.sweep_settings["model"]]
        assert [row["tokens"] for row in run.history if "train/loss" in row] == [256, 512]
        (validation,) = [row for row in run.history if "val/perplexity" in row]
        assert validation["trainer/global_step"] == 2
        assert run.summary["val/perplexity"] == validation["val/perplexity"] > 1


def test_a_job_that_fails_is_reported_to_the_agent_and_to_the_server(sweep: Sweep):
    *_, failed = sweep.server.runs.values()
    assert len(sweep.server.runs) == 4
    assert failed.exit_code == 1
    assert "val/perplexity" not in failed.summary
    assert re.search(r"error: .*\bloss\b", sweep.agent.stderr)
    # Only an exit code above zero makes the agent count a failure, and this is the first.
    assert "Detected 1 consecutive failed runs, shutting down" in sweep.agent.stderr


def test_stories_are_tables_and_the_model_is_an_export(tiny: list[str], tmp_path: Path):
    with WandbServer() as server:
        address = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
        words = ("logger=wandb", "logger.log_model=true", "name=ours", *tiny)
        result = run("train.py", *words, folder=tmp_path, **address)
        assert result.returncode == 0, result.stderr
    (wandb_run,) = server.runs.values()
    folder = tmp_path / "runs" / "ours"
    rows = [row for row in wandb_run.history if "samples" in row]
    for row, sample in zip(rows, read_samples(folder), strict=True):
        table = json.loads(wandb_run.files[row["samples"]["path"]])
        assert table["columns"] == ["step", "tokens", "prompt", "temperature", "text"]
        assert table["data"] == [[sample[column] for column in table["columns"]]]
        assert row["trainer/global_step"] == sample["step"]

    (artifact,) = [a for a in server.artifacts.values() if a.kind == "model"]
    assert artifact.is_committed
    out = tmp_path / "artifact"
    out.mkdir()
    artifact.files.pop("manifest")  # written by wandb, which records its own temporary files there
    for name, content in artifact.files.items():
        assert not name.endswith(".ckpt")
        assert os.fsencode(tmp_path) not in content, name
        assert os.fsencode(ROOT) not in content, name
        (out / name).write_bytes(content)
    assert (out / "README.md").is_file()
    weights = Run.load(out).load_model().state_dict()
    for name, weight in Run.load(folder).load_model().state_dict().items():
        assert torch.equal(weights[name], weight.bfloat16().float())


def test_without_a_key_each_job_has_an_offline_run_that_can_be_synced(
    tiny: list[str], tmp_path: Path
):
    with WandbServer() as server:
        rates = f"optimizer.lr={DIVERGING},1e-3"
        address = {"WANDB_BASE_URL": server.url}
        jobs = run("train.py", "-m", rates, "logger=wandb", *tiny, folder=tmp_path, **address)
        assert jobs.returncode == 2, jobs.stderr
        assert server.n_requests == 0
        patterns = [
            line.split("wandb sync ")[1] for line in jobs.stderr.splitlines() if "offline:" in line
        ]
        folders = [sorted(Path(pattern).parent.glob(Path(pattern).name)) for pattern in patterns]
        assert [len(matches) for matches in folders] == [1, 1]
        for (offline,) in folders:
            synced = run(
                "-m", "wandb", "sync", str(offline),
                folder=tmp_path, WANDB_API_KEY="0" * 40, **address,
            )  # fmt: skip
            assert synced.returncode == 0, synced.stderr
        diverged, finished = server.runs.values()
        assert (diverged.exit_code, finished.exit_code) == (1, 0)
        assert finished.history[-1]["trainer/global_step"] == 20
