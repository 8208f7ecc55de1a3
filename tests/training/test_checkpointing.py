"""Runs that are killed, stopped, started twice and run out of room, in real processes."""

import contextlib
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minigpt.core.settings import UserError
from minigpt.runs.checkpoint import is_whole, read_checkpoint
from minigpt.runs.folder import last_checkpoints
from minigpt.runs.names import METRICS
from minigpt.runs.records import read_metrics, read_summary
from tests.conftest import composed, naming, tiny_overrides, trained_folder
from tests.killing import assert_same, kill_and_resume, rows
from tests.processes import CHECKPOINT, STEP, VALIDATION, Training
from tests.wandb_server import WandbServer

STEPS = 160


def overrides(folder: Path) -> list[str]:
    """A run of 160 short steps, with dropout, that is kept every four."""
    return [
        *tiny_overrides(folder),
        f"budget.tokens={64 * STEPS}",
        "model.dropout=0.1",
        "trainer.log_every_n_steps=3",
        "trainer.n_validations=16",
        "callbacks.checkpoint_steps=4",
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run that nothing happened to: runs/whole."""
    folder = tmp_path_factory.mktemp("recovery")
    whole = Training([*overrides(folder), "name=whole"], folder / "whole.txt")
    assert whole.wait() == 0, whole.output_text()
    return folder


def test_a_run_that_is_killed_ten_times_ends_as_one_that_never_was(place: Path):
    killed_in = kill_and_resume(overrides(place), place, kills=10, seed=1)
    assert {STEP, VALIDATION, CHECKPOINT} <= set(killed_in)
    assert_same(place / "runs/killed", place / "runs/whole")


def test_a_run_that_a_scheduler_stops_goes_on_by_the_same_command(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    command, folder = [*overrides(place), "name=stopped", "resume=auto"], place / "runs/stopped"
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    for number, steps in ((signal.SIGTERM, 25), (signal.SIGUSR1, 25)):
        training = Training(command, place / "stopped.txt", slurm)
        assert training.wait_until(lambda t=training, n=steps: t.steps > n)
        training.send(number)
        assert training.wait() == 128 + number, training.output_text()
        summary = read_summary(folder)
        assert summary["status"] == "interrupted"
        last = read_checkpoint(folder / "checkpoints/last.ckpt")
        assert last["global_step"] == summary["steps"]
        assert (folder / "report.html").is_file()
        assert f"python train.py resume={folder}" in training.output_text()
    assert (tmp_path / "asked").read_text() == "requeue 7\n"  # once: after SIGTERM Slurm does it
    training = Training(command, place / "stopped.txt", slurm)
    assert training.wait() == 0, training.output_text()
    assert_same(folder, place / "runs/whole")


def test_a_run_that_is_started_twice_is_trained_once(place: Path):
    command = [*overrides(place), "name=twice", "resume=auto"]
    first = Training(command, place / "first.txt")
    assert first.wait_until(lambda: first.steps > 5)
    second = Training(command, place / "second.txt")
    assert second.wait() == 2
    assert second.output_text().startswith("error: ")
    assert str(place / "runs/twice") in second.output_text()
    assert "name=twice" in second.output_text()
    first.send(signal.SIGKILL)
    first.wait()
    third = Training([*command, "budget.tokens=99999"], place / "third.txt")
    assert third.wait() == 2
    assert all(name in third.output_text() for name in ("budget.tokens=10240", "99999", "name"))


class Disk:
    """A folder that can be filled up: a small tmpfs, or, without the right to mount one, a limit
    on the size of files that the training process may write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.filler = folder, folder / "filler"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
        with contextlib.suppress(FileNotFoundError):
            done = subprocess.run(mount, capture_output=True)
        self.mounted = done.returncode == 0

    def fill(self, training: Training, checkpoint: Path) -> None:
        if not self.mounted:
            assert training.process.pid is not None
            room = checkpoint.stat().st_size // 2
            resource.prlimit(training.process.pid, resource.RLIMIT_FSIZE, (room, room))
            return
        with self.filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass

    def make_room(self) -> None:
        self.filler.unlink(missing_ok=True)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    yield made
    made.close()


def test_a_full_disk_stops_the_run_and_keeps_the_last_good_checkpoint(place: Path, disk: Disk):
    runs = disk.folder / "runs"
    command = [*overrides(place), f"runs_dir={runs}", "name=full", "resume=auto"]
    training = Training(command, place / "full.txt")
    assert training.wait_until(lambda: training.steps > 20)
    disk.fill(training, runs / "full/checkpoints/last-1.ckpt")
    assert training.wait() == 2, training.output_text()
    (error,) = [line for line in training.output_text().splitlines() if line.startswith("error: ")]
    assert error.count(str(runs / "full")) >= 2  # what it could not write, and how to go on:
    assert f"python train.py resume={runs / 'full'}" in error
    assert "Traceback" not in training.output_text()
    assert all(map(is_whole, last_checkpoints(runs / "full")))
    assert read_checkpoint(last_checkpoints(runs / "full")[0])["global_step"] >= 16
    assert not list(runs.rglob("*.tmp"))
    disk.make_room()
    training = Training(command, place / "full.txt")
    assert training.wait() == 0, training.output_text()
    assert_same(runs / "full", place / "runs/whole")


@pytest.mark.parametrize("damage", ["cut short", "one bit"])
def test_a_damaged_last_checkpoint_is_named_and_the_one_before_it_used(
    damage: str, tiny: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    tiny = [*tiny, "callbacks.checkpoint_steps=3"]
    whole = trained_folder([*tiny, "name=whole"])

    def fail(self, batch, batch_idx) -> None:
        if self.global_step == 17:
            raise RuntimeError("the power is gone")

    with monkeypatch.context() as patch:
        patch.setattr("minigpt.training.module.GPTModule.on_train_batch_start", fail)
        with pytest.raises(RuntimeError, match="the power is gone"):
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


def test_weights_that_an_update_ruined_are_not_kept(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
):
    def poison(self, optimizer, *args, **kwargs) -> None:
        if self.global_step == 15:  # as gradients that are not finite do
            torch.nn.init.constant_(self.net.final_norm.weight, torch.nan)

    monkeypatch.setattr("minigpt.training.module.GPTModule.configure_gradient_clipping", poison)
    with pytest.raises(UserError, match=r"(?=.*\bnan\b)(?=.*\b16\b)(?=.*optimizer\.lr=)"):
        trained_folder([*tiny, "callbacks.checkpoint_steps=1", "name=ruined"])
    folder = Path(composed(tiny).runs_dir) / "ruined"
    kept = [read_checkpoint(path) for path in last_checkpoints(folder)]
    assert [content["global_step"] for content in kept] == [15, 14]
    assert all(w.isfinite().all() for content in kept for w in content["state_dict"].values())


@pytest.mark.parametrize("steps", [0, 7])
def test_auto_goes_on_with_the_run_of_that_name_or_begins_it(
    steps: int, tiny: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Step 0: it was killed before its first checkpoint."""
    command = [*tiny, "name=mine", "resume=auto", "callbacks.checkpoint_steps=2"]

    def fail(self, batch, batch_idx) -> None:
        if self.global_step == steps:
            raise RuntimeError("the power is gone")

    with monkeypatch.context() as patch:
        patch.setattr("minigpt.training.module.GPTModule.on_train_batch_start", fail)
        with pytest.raises(RuntimeError, match="the power is gone"):
            trained_folder(command)
    begun: list[int] = []
    monkeypatch.setattr(
        "minigpt.training.module.GPTModule.on_train_batch_start",
        lambda self, *_: begun.append(self.global_step),
    )
    folder = trained_folder(command)
    assert folder.name == "mine"
    assert begun == list(range(max(0, steps - 1), 20))
    assert [row["step"] for row in read_metrics(folder) if "lr" in row] == list(range(1, 21))
    assert trained_folder(command) == folder  # nothing is left to do


def test_auto_needs_a_name_to_look_for(tiny: list[str]):
    with pytest.raises(UserError, match=naming("resume", "name")):
        trained_folder([*tiny, "resume=auto"])


def online(server: WandbServer) -> dict[str, str]:
    """The environment in which runs are sent to `server`."""
    return {
        "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "NO_PROXY": "*",
        "WANDB_ERROR_REPORTING": "false", "WANDB_FINISH_TIMEOUT": "3",
        "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.1",
    }  # fmt: skip


def test_a_resumed_run_goes_on_as_the_same_run_at_wandb(place: Path):
    command = [*overrides(place), "logger=wandb", "name=sent", "resume=auto"]
    with WandbServer() as server:
        variables = online(server) | {"WANDB_FINISH_TIMEOUT": "60"}
        first = Training(command, place / "sent.txt", variables)
        assert first.wait_until(lambda: first.steps > 20)
        first.send(signal.SIGTERM)
        assert first.wait() == 128 + signal.SIGTERM, first.output_text()
        second = Training(command, place / "sent.txt", variables)
        assert second.wait() == 0, second.output_text()
    ((name, run),) = server.runs.items()
    assert name == (place / "runs/sent/wandb-id.txt").read_text(encoding="utf-8").strip()
    assert run.exit_code == 0
    steps = [row["trainer/global_step"] for row in run.history if "lr" in row]
    assert steps == [int(row["step"]) for row in rows(place / "runs/whole") if row["lr"]]


def test_a_run_that_is_resumed_while_wandb_is_away_goes_on_offline(place: Path):
    with WandbServer() as server:
        variables = online(server)
    folder = place / "runs/away"
    folder.mkdir()
    (folder / "wandb-id.txt").write_text("abcd1234\n")
    command = [*overrides(place), "logger=wandb", "name=away", "resume=auto", "budget.tokens=640"]
    training = Training(command, place / "away.txt", variables)
    assert training.wait() == 0, training.output_text()
    assert server.url in training.output_text()
    assert list((folder / "wandb").glob("offline-run-*-abcd1234"))


@pytest.mark.parametrize("trouble", ["error", "silence"])
def test_a_wandb_server_that_fails_in_mid_run_costs_no_number_and_no_more_than_its_time(
    trouble, place: Path
):
    with WandbServer(trouble=trouble) as server:
        command = [*overrides(place), "logger=wandb", f"name={trouble}"]
        training = Training(command, place / f"{trouble}.txt", online(server))
        assert training.wait() == 0, training.output_text()
        assert server.n_troubled > 0
    folder = place / "runs" / trouble
    assert rows(folder) == rows(place / "runs/whole")
    (offline,) = (folder / "wandb").glob("run-*")
    assert f"wandb sync {offline}" in training.output_text()
    assert (folder / METRICS).is_file()
