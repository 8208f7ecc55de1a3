"""Callbacks: throughput, progress lines, and the summary of a run."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

import minigpt
from minigpt.core.hardware import Hardware, gpu_memory_for
from minigpt.core.settings import UserError
from minigpt.runs.records import read_metrics, read_summary
from tests.conftest import ROOT, composed, trained_folder
from tests.training.test_loop import fail_at_step

RUN = (  # train.py, with a line for each step
    "import sys, minigpt.core.progress as progress\n"
    "progress.SHORTEST = progress.LONGEST = 0.0\n"
    "sys.argv[0] = 'train.py'\n"
    "from minigpt.cli.train import main; main()"
)


@pytest.mark.long
def test_a_run_into_a_file_writes_lines_of_each_stage(tiny: list[str], tmp_path: Path):
    output = tmp_path / "output.txt"
    with output.open("wb") as file:
        command = [sys.executable, "-c", RUN, *tiny]
        command += ["callbacks.progress_bar=true", "trainer.log_every_n_steps=4"]
        subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=True)
    text = output.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert all(line.isprintable() for line in lines)  # no fragments of a bar
    for stage in ("training the tokenizer", "encoding the train split", "validating"):
        assert any(line.startswith(f"{stage} · ") for line in lines), text
    training = [line for line in lines if line.startswith("training · step ")]
    assert len(training) == 20
    pattern = r"step 9/20 · 576/1\.28k tokens · loss (\d\.\d+) · ppl (\d+\.\d+) · [\d,]+ tok/s"
    assert re.search(pattern, training[8]), training[8]
    assert " left" in training[8]
    # The loss is the latest one in metrics.csv, and is repeated until there is another.
    matches = [re.search(r"loss ([\d.]+)", line) for line in training]
    losses = [match and match[1] for match in matches]
    (folder,) = (tmp_path / "runs").iterdir()
    rows = {row["step"]: row["train/loss"] for row in read_metrics(folder) if "train/loss" in row}
    assert list(rows) == [4, 8, 12, 16, 20]
    expected = [rows.get(4 * (step // 4)) for step in range(1, 21)]
    assert losses == [loss and f"{loss:.3f}" for loss in expected]


@pytest.mark.parametrize(("peak", "again"), [(1.0, 1e30), (1e30, None)])
def test_a_peak_that_a_run_beats_is_measured_again_once(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, peak: float, again: float | None
):
    peaks, calls = iter([peak, again]), list[bool]()

    def measure(hardware: Hardware, cache_dir: Path, measure_again: bool) -> float | None:
        calls.append(measure_again)
        return next(peaks)

    monkeypatch.setattr("minigpt.training.assembly.matmul_peak", measure)
    folder = trained_folder(tiny)
    assert calls == ([False] if again is None else [False, True])
    assert read_summary(folder)["peak_flops"] == 1e30
    assert max(row.get("mfu", 0.0) for row in read_metrics(folder)) < 1
    assert f"{peak:.3g} FLOP/s" in (folder / "train.log").read_text(encoding="utf-8")


def test_a_long_validation_is_announced_with_its_windows(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("minigpt.training.callbacks._LONG_VALIDATION", 0.0)
    folder = trained_folder([*tiny, "model.context_length=1", "budget.tokens=40"])
    log = (folder / "train.log").read_text(encoding="utf-8").splitlines()
    pattern = r" validation +([\d,]+) windows in ([\d,]+) batches"
    ((n_windows, n_batches),) = re.findall(pattern, "\n".join(log))
    assert int(n_windows.replace(",", "")) > 500
    announced = [line for line in log if "validating" in line]
    assert len(announced) == 2
    assert all(f" {n_windows} " in line and f" {n_batches} " in line for line in announced)


def test_progress_bar_counts_updates_of_accumulated_batches(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("minigpt.core.progress.SHORTEST", 0.0)
    more = ["trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=4"]
    summary = read_summary(trained_folder([*tiny, *more, "callbacks.progress_bar=true"]))
    assert (summary["status"], summary["steps"]) == ("finished", 10)
    assert "/10 · " in caplog.text


def test_resumed_run_that_cannot_start_keeps_its_summary(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
):
    command = [*tiny, "name=broken", "resume=auto", "callbacks.checkpoint_steps=5"]
    with monkeypatch.context() as patch:
        patch.setattr("minigpt.training.module.GPTModule.on_train_batch_start", fail_at_step(13))
        with pytest.raises(RuntimeError, match="interrupted"):
            trained_folder(command)
    folder = Path(composed(command).runs_dir, "broken")
    before = read_summary(folder)

    class Broken(Callback):
        def on_fit_start(self, trainer, pl_module) -> None:
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        trained_folder(command, callbacks=[Broken()])
    assert read_summary(folder) == before
    assert before["steps"] == 13


def test_run_stays_finished_if_a_callback_fails_after_it(tiny: list[str], tmp_path: Path):
    class FailAtTheEnd(Callback):
        def on_train_end(self, trainer, pl_module) -> None:
            raise RuntimeError("upload failed")

    with pytest.raises(RuntimeError, match="upload failed"):
        minigpt.train(composed([*tiny, "name=whole"]), callbacks=[FailAtTheEnd()])
    assert read_summary(tmp_path / "runs/whole")["status"] == "finished"


def test_out_of_memory_in_a_sample_story_names_the_batch(tiny: list[str], monkeypatch):
    def generate(*_: Any, **__: Any) -> None:
        with gpu_memory_for("n", 1):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("minigpt.training.callbacks.generate_stories", generate)
    with pytest.raises(UserError) as error:
        trained_folder([*tiny, "callbacks.prompts=[Tom]", "name=full"])
    assert error.value.argument == "data.batch_size"
