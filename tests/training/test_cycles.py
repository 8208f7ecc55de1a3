"""Cycles of the learning rate at the end of a run, and the mean of the weights at their ends."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.testing import assert_close

from minigpt.evaluation import evaluate
from minigpt.exporting import ExportConfig, export
from minigpt.runs.checkpoint import read_checkpoint, read_safetensors
from minigpt.runs.folder import Run
from minigpt.runs.records import read_metrics, read_summary, series
from minigpt.scaling.results import read_run
from minigpt.training.config import OptimizerConfig
from minigpt.training.optim import lr_factor
from tests.conftest import tiny_overrides, trained_folder
from tests.training.test_loop import FEW, fail_at_step
from tests.training.test_snapshots import metadata

CYCLES = ["optimizer.cycles=2", "optimizer.cycle_share=0.2"]  # of 20 steps: 12, then 4 and 4
ENDS = [12, 16, 20]
SETTINGS = [*CYCLES, "callbacks.snapshots=12", "callbacks.keep_checkpoints=3", "model.dropout=0.1"]


class Weights(Callback):
    """Copies of the weights directly after the updates in `steps`."""

    def __init__(self, steps: list[int]) -> None:
        self.steps, self.step, self.copies = steps, 0, []

    def on_train_start(self, trainer, module) -> None:
        def copy(*_) -> None:
            self.step += 1
            if self.step in self.steps:
                self.copies.append({n: w.detach().clone() for n, w in module.named_parameters()})

        trainer.optimizers[0].register_step_post_hook(copy)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    """An uninterrupted run with two cycles, and its weights at the ends of the decays."""
    tiny, ends = tiny_overrides(tmp_path_factory.mktemp("cycles")), Weights(ENDS)
    return trained_folder([*tiny, *SETTINGS, "name=whole"], callbacks=[ends]), ends


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / "checkpoints/last.ckpt")["state_dict"]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_lr_factor_of_a_cycle_is_a_shorter_decay_from_cycle_lr(schedule: str):
    ends = OptimizerConfig(cycles=2, cycle_share=0.2).decay_ends(100)
    assert ends == [60, 80, 100]
    curve = [lr_factor(s, 60, 10, 0.1, schedule, ends[1:], 0.5) for s in range(101)]
    assert curve[:60] == [lr_factor(step, 60, 10, 0.1, schedule) for step in range(60)]
    assert curve[60:80] == curve[80:100]
    alone = [lr_factor(step, 20, 0, 0.2, schedule) / 2 for step in range(20)]
    assert curve[60:80] == pytest.approx(alone)
    assert curve[100] == pytest.approx(0.1)
    assert 0.1 < curve[59] < curve[60] == 0.5


def test_final_weights_are_the_mean_of_the_ends_of_all_decays(
    whole: tuple[Path, Weights], tmp_path: Path
):
    folder, ends = whole
    last = weights(folder)
    first, second, third = ends.copies
    for name, weight in first.items():
        assert torch.equal(last[name], (weight + second[name] + third[name]) / 3), name
    assert not torch.equal(last["net.embedding.weight"], third["net.embedding.weight"])
    _, lrs = series(read_metrics(folder), "lr")
    (half,) = {lrs[12], lrs[16]}
    assert half == pytest.approx(max(lrs) / 2)
    assert min(lrs) > 0

    run = Run.load(folder / "checkpoints/last.ckpt")
    assert (run.summary["cycles"], read_summary(folder)["cycles"]) == (2, 2)
    assert read_checkpoint(run.checkpoint)["callbacks"]["CycleMean"] == {"n": 3, "sums": {}}
    assert "2 cycles" in read_run(folder).group
    export(run, tmp_path / "out", ExportConfig("safetensors"))
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert re.search(r"\| weights \|.* mean .*\boptimizer\.cycles=2\b.*\|", card)

    earlier = Run.load(folder / "checkpoints/last-1.ckpt")
    assert earlier.summary["steps"] == 10
    assert "cycles" not in earlier.summary


def test_last_validation_and_last_snapshot_are_those_of_the_mean(whole: tuple[Path, Weights]):
    folder, _ = whole
    run = Run.load(folder / "checkpoints/last.ckpt")
    result = evaluate(run, FEW)
    assert result.nats_per_token == pytest.approx(read_summary(folder)["val/loss"], rel=1e-4)
    last = run.load_model().state_dict()
    for name, weight in read_safetensors(run.snapshots[-1]).items():
        assert torch.equal(weight, last[name].to(torch.bfloat16)), name


def test_mean_of_cycles_with_accumulated_batches_counts_each_end_once(tiny: list[str]):
    ends = Weights(ENDS)
    more = ["trainer.accumulate_grad_batches=2", "budget.tokens=2560"]
    last = weights(trained_folder([*tiny, *CYCLES, *more], callbacks=[ends]))
    for name, weight in ends.copies[0].items():
        assert torch.equal(last[name], (weight + ends.copies[1][name] + ends.copies[2][name]) / 3)


def test_run_with_cycles_and_snapshots_resumes_bit_exactly(
    whole: tuple[Path, Weights], monkeypatch: pytest.MonkeyPatch
):
    folder, _ = whole
    run = [*tiny_overrides(folder.parent.parent), *SETTINGS, "name=broken", "resume=auto"]
    run += ["callbacks.checkpoint_steps=2"]
    broken, times = folder.parent / "broken", {}
    for step in (14, 16):  # within a cycle, and exactly at the end of one
        with monkeypatch.context() as patch:
            hook = "minigpt.training.module.GPTModule.on_train_batch_start"
            patch.setattr(hook, fail_at_step(step + 1))
            with pytest.raises(RuntimeError, match="interrupted"):
                trained_folder(run)
        assert read_checkpoint(broken / "checkpoints/last.ckpt")["global_step"] == step
        times = {path: path.stat().st_mtime_ns for path in Run.load(broken).snapshots} | times
    assert len(times) == 11  # after steps 0 to 8, 11 and 15, which the second part repeated
    trained_folder(run)
    last = weights(folder)
    assert all(torch.equal(weight, last[name]) for name, weight in weights(broken).items())
    snapshots = Run.load(broken).snapshots
    assert len(snapshots) == 12
    for path, expected in zip(snapshots, Run.load(folder).snapshots, strict=True):
        assert path.name == expected.name
        assert metadata(path) == metadata(expected)
        assert_close(read_safetensors(path), read_safetensors(expected), rtol=0, atol=0)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
