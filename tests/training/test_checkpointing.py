"""Runs that are killed, stopped, started twice or fill the disk, in real processes."""

import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt.core.settings import UserError
from minigpt.runs.checkpoint import is_whole, read_checkpoint
from minigpt.runs.folder import last_checkpoints
from minigpt.runs.names import METRICS
from minigpt.runs.records import read_summary
from minigpt.training.checkpointing import Checkpoints
from tests.conftest import composed, tiny_overrides, trained_folder
from tests.killing import assert_same, kill_and_resume, rows
from tests.processes import CHECKPOINT, STEP, VALIDATION, Training
from tests.surroundings import Disk, Terminal, slow_validation
from tests.wandb_server import WandbServer

STEPS = 160


def overrides(folder: Path) -> list[str]:
    """A run of 160 short steps, with dropout and a checkpoint every four steps."""
    return [
        *tiny_overrides(folder),
        f"budget.tokens={64 * STEPS}",
        "model.dropout=0.1",
        "trainer.log_every_n_steps=3",
        "trainer.n_validations=16",
        "callbacks.checkpoint_steps=4",
    ]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an undisturbed run: runs/whole."""
    folder = tmp_path_factory.mktemp("recovery")
    whole = Training([*overrides(folder), "name=whole"], folder / "whole.txt")
    assert whole.wait() == 0, whole.output_text()
    return folder


@pytest.mark.long
def test_run_killed_ten_times_ends_with_the_weights_of_an_undisturbed_run(workspace: Path):
    killed_in = kill_and_resume(overrides(workspace), workspace, kills=10, seed=1)
    assert {STEP, VALIDATION, CHECKPOINT} <= set(killed_in)
    assert_same(workspace / "runs/killed", workspace / "runs/whole")


@pytest.mark.long
def test_run_stopped_by_a_scheduler_resumes_by_the_same_command(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    command, folder = (
        [*overrides(workspace), "name=stopped", "resume=auto"],
        workspace / "runs/stopped",
    )
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    for number, steps in ((signal.SIGTERM, 25), (signal.SIGUSR1, 25)):
        training = Training(command, workspace / "stopped.txt", slurm)
        assert training.wait_until(lambda t=training, n=steps: t.steps > n)
        training.send(number)
        assert training.wait() == 128 + number, training.output_text()
        summary = read_summary(folder)
        assert summary["status"] == "interrupted"
        last = read_checkpoint(folder / "checkpoints/last.ckpt")
        assert last["global_step"] == summary["steps"]
        assert (folder / "report.html").is_file()
        assert f"train.py resume={folder}" in training.output_text()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"  # once: after SIGTERM Slurm does it
    training = Training(command, workspace / "stopped.txt", slurm)
    assert training.wait() == 0, training.output_text()
    assert_same(folder, workspace / "runs/whole")


@pytest.mark.long
def test_run_outlives_its_terminal(workspace: Path):
    terminal = Terminal()
    command = [*overrides(workspace), "name=alone", "callbacks.progress_bar=true"]
    training = Training(command, workspace / "alone.txt", before=terminal.attach)
    assert training.wait_until(lambda: training.steps > 20)
    terminal.close()
    assert training.wait() == 0
    assert_same(workspace / "runs/alone", workspace / "runs/whole")
    log = (workspace / "runs/alone/train.log").read_text(encoding="utf-8")
    assert log.count("terminal is gone") == 1


@pytest.mark.long
def test_run_stopped_in_its_last_validation_repeats_it(workspace: Path):
    command = [*overrides(workspace), "name=last", "resume=auto"]
    before = partial(slow_validation, STEPS)
    training = Training(command, workspace / "last.txt", before=before)
    assert training.wait_until(lambda: "busy" in training.output_text())
    training.send(signal.SIGINT)
    assert training.wait() == 128 + signal.SIGINT, training.output_text()
    assert read_summary(workspace / "runs/last")["status"] == "interrupted"
    training = Training(command, workspace / "last.txt")
    assert training.wait() == 0, training.output_text()
    assert training.steps == 0
    assert {"train/loss", "val/loss"} <= read_summary(workspace / "runs/last").keys()
    assert_same(workspace / "runs/last", workspace / "runs/whole")


def test_interruption_without_sigusr1_is_no_other_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("minigpt.training.checkpointing.SIGUSR1", 0)  # as on Windows
    monkeypatch.delattr(signal, "SIGUSR1")
    assert Checkpoints._stop(None, 128 + signal.SIGINT).code == 130


def test_signal_in_a_finalizer_stops_the_validation(workspace: Path):
    command = [*overrides(workspace), "name=finalizer"]
    before = partial(interrupted_finalizer, STEPS // 2)
    training = Training(command, workspace / "finalizer.txt", before=before)
    assert training.wait() == 128 + signal.SIGINT, training.output_text()
    assert training.output_text().splitlines().count("finalizer") == 1
    last = read_checkpoint(workspace / "runs/finalizer/checkpoints/last.ckpt")
    assert last["global_step"] == STEPS // 2


def interrupted_finalizer(step: int) -> None:
    """Send SIGINT in the validation after a step while `__del__` runs, which loses exceptions."""
    from minigpt.training.module import GPTModule

    validate = GPTModule.validation_step

    class Finalizer:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def interrupted(self: Any, *arguments: Any) -> None:
        validate(self, *arguments)
        if self.global_step == step:
            print("finalizer", flush=True)
            Finalizer()

    GPTModule.validation_step = interrupted  # type: ignore[method-assign]


def test_run_lock_refuses_a_second_process(workspace: Path):
    command = [*overrides(workspace), "name=twice", "resume=auto"]
    first = Training(command, workspace / "first.txt")
    assert first.wait_until(lambda: first.steps > 5)
    second = Training(command, workspace / "second.txt")
    assert second.wait() == 2
    assert second.output_text().startswith("error: ")
    assert str(workspace / "runs/twice") in second.output_text()
    assert "name=twice" in second.output_text()
    first.send(signal.SIGKILL)
    first.wait()
    third = Training([*command, "budget.tokens=99999"], workspace / "third.txt")
    assert third.wait() == 2
    assert all(name in third.output_text() for name in ("budget.tokens=10240", "99999", "name"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.close()


@pytest.mark.long
def test_full_disk_stops_the_run_and_keeps_the_last_good_checkpoint(workspace: Path, disk: Disk):
    runs = disk.folder / "runs"
    command = [*overrides(workspace), f"runs_dir={runs}", "name=full", "resume=auto"]
    training = Training(command, workspace / "full.txt")
    assert training.wait_until(lambda: training.steps > 20)
    disk.fill(training, runs / "full/checkpoints/last-1.ckpt")
    assert training.wait() == 1, training.output_text()
    (error,) = [line for line in training.output_text().splitlines() if line.startswith("error: ")]
    assert (
        error.count(str(runs / "full")) >= 2
    )  # the file that could not be written, and the command to continue
    assert f"train.py resume={runs / 'full'}" in error
    assert "Traceback" not in training.output_text()
    assert all(map(is_whole, last_checkpoints(runs / "full")))
    assert read_checkpoint(last_checkpoints(runs / "full")[0])["global_step"] >= 16
    assert not list(runs.rglob("*.tmp"))
    disk.clear()
    training = Training(command, workspace / "full.txt")
    assert training.wait() == 0, training.output_text()
    assert_same(runs / "full", workspace / "runs/whole")


@pytest.mark.long
@pytest.mark.parametrize("damage", ["cut short", "one bit"])
def test_damaged_last_checkpoint_is_reported_and_the_previous_one_used(
    damage: str, tiny: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    tiny = [*tiny, "callbacks.checkpoint_steps=3"]
    whole = trained_folder([*tiny, "name=whole"])

    def fail(self, batch, batch_idx) -> None:
        if self.global_step == 17:
            raise RuntimeError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr("minigpt.training.module.GPTModule.on_train_batch_start", fail)
        with pytest.raises(RuntimeError, match="interrupted"):
            trained_folder([*tiny, "name=killed"])
    killed = whole.parent / "killed"
    last = killed / "checkpoints/last.ckpt"
    assert read_checkpoint(last)["global_step"] == 15
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 8
    last.write_bytes(content[:-1000] if damage == "cut short" else content)
    trained_folder([f"resume={killed}"])
    assert str(last) in caplog.text
    assert f"{last.with_name('last-1.ckpt')}" in (killed / "train.log").read_text(encoding="utf-8")
    assert_same(killed, whole)


def test_checkpoint_is_not_written_with_nan_weights_after_an_update(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
):
    def poison(self, optimizer, *args, **kwargs) -> None:
        if self.global_step == 15:  # like an update with infinite gradients
            torch.nn.init.constant_(self.net.final_norm.weight, torch.nan)

    monkeypatch.setattr("minigpt.training.module.GPTModule.configure_gradient_clipping", poison)
    with pytest.raises(UserError, match=r"(?=.*\bnan\b)(?=.*\b16\b)(?=.*optimizer\.lr=)"):
        trained_folder([*tiny, "callbacks.checkpoint_steps=1", "name=nan"])
    folder = Path(composed(tiny).runs_dir) / "nan"
    checkpoints = [read_checkpoint(path) for path in last_checkpoints(folder)]
    assert [content["global_step"] for content in checkpoints] == [15, 14]
    assert all(
        w.isfinite().all() for content in checkpoints for w in content["state_dict"].values()
    )


def online(server: WandbServer) -> dict[str, str]:
    """The environment in which runs are sent to `server`."""
    return {
        "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "NO_PROXY": "*",
        "WANDB_ERROR_REPORTING": "false", "WANDB_FINISH_TIMEOUT": "3",
        "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.1",
    }  # fmt: skip


@pytest.mark.wandb
def test_resumed_run_keeps_its_wandb_id(workspace: Path):
    command = [*overrides(workspace), "logger=wandb", "name=sent", "resume=auto"]
    with WandbServer() as server:
        variables = online(server) | {"WANDB_FINISH_TIMEOUT": "60"}
        first = Training(command, workspace / "sent.txt", variables)
        assert first.wait_until(lambda: first.steps > 20)
        first.send(signal.SIGTERM)
        assert first.wait() == 128 + signal.SIGTERM, first.output_text()
        second = Training(command, workspace / "sent.txt", variables)
        assert second.wait() == 0, second.output_text()
    ((name, run),) = server.runs.items()
    assert name == (workspace / "runs/sent/wandb-id.txt").read_text(encoding="utf-8").strip()
    assert run.exit_code == 0
    steps = [row["trainer/global_step"] for row in run.history if "lr" in row]
    assert steps == [int(row["step"]) for row in rows(workspace / "runs/whole") if row["lr"]]


@pytest.mark.wandb
def test_run_resumed_without_a_wandb_server_logs_offline(workspace: Path):
    with WandbServer() as server:
        variables = online(server)
    folder = workspace / "runs/away"
    folder.mkdir()
    (folder / "wandb-id.txt").write_text("abcd1234\n")
    command = [
        *overrides(workspace),
        "logger=wandb",
        "name=away",
        "resume=auto",
        "budget.tokens=640",
    ]
    training = Training(command, workspace / "away.txt", variables)
    assert training.wait() == 0, training.output_text()
    assert server.url in training.output_text()
    assert list((folder / "wandb").glob("offline-run-*-abcd1234"))


@pytest.mark.wandb
@pytest.mark.parametrize("trouble", ["error", "silence"])
def test_wandb_server_that_fails_during_a_run_loses_no_metric_and_delays_no_longer_than_the_timeout(
    trouble, workspace: Path
):
    with WandbServer(trouble=trouble) as server:
        command = [*overrides(workspace), "logger=wandb", f"name={trouble}"]
        training = Training(command, workspace / f"{trouble}.txt", online(server))
        assert training.wait() == 0, training.output_text()
        assert server.n_troubled > 0
    folder = workspace / "runs" / trouble
    assert rows(folder) == rows(workspace / "runs/whole")
    (offline,) = (folder / "wandb").glob("run-*")
    assert f"wandb sync {offline}" in training.output_text()
    assert (folder / METRICS).is_file()
