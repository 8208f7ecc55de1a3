"""Snapshots: the weights at steps on a logarithmic scale, and commands that read them."""

import itertools
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from minigpt.core.settings import UserError
from minigpt.exporting import ExportConfig, export
from minigpt.runs.checkpoint import read_checkpoint
from minigpt.runs.folder import Run
from minigpt.runs.records import read_metrics, read_summary
from minigpt.training.config import CallbacksConfig
from minigpt.training.snapshots import snapshot_steps
from tests.cli.test_app import run_main
from tests.conftest import naming, tiny_overrides, trained_folder

STEPS = [0, 1, 2, 5, 10, 20]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps with six snapshots."""
    folder = tmp_path_factory.mktemp("snapshots")
    return trained_folder([*tiny_overrides(folder), "callbacks.snapshots=6", "name=tiny"])


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("n_steps", [1, 2, 20, 4882])
def test_snapshot_steps_are_distinct_and_spaced_on_a_logarithmic_scale(n_steps: int):
    for n in range(2, min(n_steps, 40) + 2):
        steps = snapshot_steps(n, n_steps)
        assert (steps[0], steps[-1], len(set(steps))) == (0, n_steps, n)
        assert steps == sorted(steps)


def test_snapshot_steps_grow_by_a_constant_factor():
    steps = snapshot_steps(12, 4882)
    factors = [later / earlier for earlier, later in itertools.pairwise(steps[6:])]
    assert max(factors) / min(factors) < 1.02


def test_snapshots_hold_weights_step_tokens_and_training_loss(run_folder: Path):
    run = Run.load(run_folder)
    assert [path.name for path in run.snapshots] == [f"step-{s:06d}.safetensors" for s in STEPS]
    losses = {row["step"]: row["train/loss"] for row in read_metrics(run_folder)
              if "train/loss" in row}  # fmt: skip
    for step, path in zip(STEPS, run.snapshots, strict=True):
        values = metadata(path)
        assert (values["step"], values["tokens"]) == (str(step), str(64 * step))
        expected = losses.get(step, math.nan)
        assert float(values["train_loss"]) == pytest.approx(expected, rel=1e-6, nan_ok=True)
    last = read_checkpoint(run_folder / "checkpoints/last.ckpt")["state_dict"]
    for name, weight in load_file(run.snapshots[-1]).items():
        assert torch.equal(weight, last[f"net.{name}"].to(torch.bfloat16)), name


def test_run_without_snapshots_has_the_same_weights_and_no_folder(run_folder: Path):
    plain = trained_folder([*tiny_overrides(run_folder.parent.parent), "name=plain"])
    assert not (plain / "snapshots").exists()
    assert Run.load(plain).snapshots == []
    first, second = (
        read_checkpoint(folder / "checkpoints/last.ckpt")["state_dict"]
        for folder in (run_folder, plain)
    )
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_snapshot_is_loaded_generated_from_and_exported(
    run_folder: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    path = Run.load(run_folder).snapshots[3]
    run = Run.load(path)
    assert (run.folder, run.is_export, run.output_dir) == (run_folder, False, run_folder)
    assert (run.summary["steps"], run.summary["tokens"]) == (5, 5 * 64)
    assert "seconds" not in run.summary
    model = run.load_model()
    for name, weight in load_file(path).items():
        assert torch.equal(model.state_dict()[name], weight.float())

    assert (
        run_main(monkeypatch, "generate", str(path), "--prompt", "Once", "--max-tokens", "5") == 0
    )
    assert "Once" in capsys.readouterr().out

    for format in ("hf", "safetensors"):
        files = export(run, tmp_path / format, ExportConfig(format))
        assert not [file for file in files if "snapshots" in file.name or file.is_dir()]
        card = (tmp_path / format / "README.md").read_text(encoding="utf-8")
        assert "| 320 |" in card
    exported = Run.load(tmp_path / "safetensors")
    assert exported.is_export
    assert exported.summary["tokens"] == 320
    assert all(
        torch.equal(weight, model.state_dict()[name])
        for name, weight in exported.load_model().state_dict().items()
    )


def test_snapshot_is_a_parent_with_its_own_number_of_tokens(run_folder: Path):
    tiny = tiny_overrides(run_folder.parent.parent)
    path = Run.load(run_folder).snapshots[3]
    typed = [f"init_from={path}", f"data.tokenizer={path}", "name=child"]
    child = trained_folder([*tiny, *typed])
    assert read_summary(child)["init_from"]["tokens"] == 320


def test_new_run_removes_the_snapshots_of_one_that_was_killed_early(
    tiny: list[str], tmp_path: Path
):
    stale = tmp_path / "runs/early/snapshots/step-000007.safetensors"
    stale.parent.mkdir(parents=True)
    (stale.parent / "step-000000.safetensors").write_bytes(b"")
    (stale.parent / "step-000001.safetensors.17.tmp").write_bytes(b"")
    stale.write_bytes(b"")
    (stale.parents[1] / "summary.json").write_text('{"steps": 7}')
    profile = stale.parents[1] / "profile/operators.txt"
    profile.parent.mkdir()
    profile.write_text("")
    folder = trained_folder([*tiny, "name=early", "resume=auto", "callbacks.snapshots=2"])
    assert not profile.exists()
    names = [f"step-{step:06d}.safetensors" for step in (0, 20)]
    assert sorted(os.listdir(folder / "snapshots")) == names
    assert metadata(folder / "snapshots" / names[0])["step"] == "0"


def test_full_disk_at_a_snapshot_is_one_line_that_names_the_file(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if "step-000001" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    folder = tmp_path / "runs/full"
    with pytest.raises(UserError, match=naming(f"{folder}/snapshots/step-000001.safetensors")):
        trained_folder([*tiny, "name=full", "callbacks.snapshots=6"])
    assert os.listdir(folder / "snapshots") == ["step-000000.safetensors"]


def test_more_snapshots_than_steps_are_refused_before_anything_is_written(
    tiny: list[str], tmp_path: Path
):
    with pytest.raises(UserError) as error:
        trained_folder([*tiny, "callbacks.snapshots=22"])
    assert (error.value.argument, error.value.fix) == (
        "callbacks.snapshots", {"callbacks.snapshots": 21},
    )  # fmt: skip
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="snapshots"):
        CallbacksConfig(snapshots=1)


def test_invalid_snapshots_and_links_are_refused(tiny: list[str]):
    folder = trained_folder([*tiny, "callbacks.snapshots=2"])
    path = folder / "snapshots/step-000020.safetensors"
    with pytest.raises(UserError, match=naming("step-000020.safetensors", ".ckpt")):
        trained_folder([f"resume={path}"])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=naming("step-000020.safetensors")):
        Run.load(path).load_model()
    outside = folder.parent.parent / "outside.safetensors"
    outside.write_bytes(content)
    path.unlink()
    path.symlink_to(outside)
    for target in (path, folder):
        with pytest.raises(UserError, match=naming("step-000020.safetensors")):
            Run.load(target)
