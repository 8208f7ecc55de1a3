"""Between two rows of metrics.csv, no operation would make the host wait for a GPU.

The runs are on a CPU, with the kernels and the batches of a GPU.
"""

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from minigpt.data import datamodule
from minigpt.kernels.choice import kernels_for
from minigpt.kernels.cuda_graph import graphed_loss
from minigpt.runs.records import read_metrics
from minigpt.training import assembly, loop
from minigpt.training.module import GPTModule
from tests.conftest import tiny_overrides, trained_folder
from tests.syncs import SyncCounter


class StepsWithoutRow(Callback):
    """Count syncs from the start of a batch until the next one, if the step has no row."""

    def __init__(self) -> None:
        self.counter, self.n_batches = SyncCounter(), 0
        self.counter.active = False

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        assert isinstance(pl_module, GPTModule)
        self.counter.active = not pl_module.has_row(trainer.global_step + 1)
        self.n_batches += self.counter.active

    def on_validation_start(self, *_: Any, **__: Any) -> None:
        self.counter.active = False

    on_train_end = on_validation_start  # type: ignore[assignment]


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Return a function that trains with the code of a GPU and returns the callback."""
    memory = SimpleNamespace(total_memory=1 << 30)

    def data_loader(self):
        trainer = self.trainer
        try:
            self.trainer = SimpleNamespace(
                strategy=SimpleNamespace(root_device=torch.device("cuda")),
                global_rank=0, world_size=1,
            )  # fmt: skip
            return original(self)
        finally:
            self.trainer = trainer

    original = datamodule.DataModule.train_dataloader
    device_batches = datamodule.DeviceBatches
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    monkeypatch.setattr(
        datamodule, "DeviceBatches", lambda b, _: device_batches(b, torch.device("cpu"))
    )
    monkeypatch.setattr(datamodule.DataModule, "train_dataloader", data_loader)
    monkeypatch.setattr(loop, "kernels_for", lambda *_: kernels_for("cuda"))
    monkeypatch.setattr(
        "minigpt.kernels.cross_entropy.may_have_padding", lambda _: True
    )  # as on a GPU
    monkeypatch.setattr("minigpt.kernels.distillation.may_have_padding", lambda _: True)

    def train(*overrides: str) -> StepsWithoutRow:
        steps = StepsWithoutRow()
        with steps.counter:
            settings = ["trainer.log_every_n_steps=5", "trainer.precision=32-true", *overrides]
            trained_folder([*tiny_overrides(tmp_path), *settings], callbacks=[steps])
        return steps

    return train


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optimizer=adamw", "data.shuffle=windows", "data.noise=0.2"],
        ["trainer.accumulate_grad_batches=2", "trainer.precision=bf16-mixed"],
        ["callbacks.progress_bar=true", "optimizer.normalize_rows=after", "optimizer.cycles=1"],
    ],
    ids=" ".join,
)
def test_steps_without_a_row_do_not_wait_for_the_device(counted, overrides):
    steps = counted(*overrides)
    assert steps.n_batches >= 15
    assert steps.counter.names == []


def test_steps_with_teachers_and_a_graph_do_not_wait_for_the_device(counted, tmp_path, monkeypatch):
    teacher = trained_folder([*tiny_overrides(tmp_path), "name=teacher", "budget.tokens=320"])
    monkeypatch.setattr(assembly, "_records_graphs", lambda *_: True)
    graphs = []
    monkeypatch.setattr(assembly, "graphed_loss", lambda *a: graphs.append(a) or graphed_loss(*a))
    steps = counted(f"teacher.runs=[{teacher}]")
    assert len(graphs) == 2
    assert steps.n_batches >= 15
    assert steps.counter.names == []


@pytest.mark.parametrize(
    ("name", "wait"),
    [
        ("_local_scalar_dense", lambda x: x.sum().item()),
        ("_local_scalar_dense", lambda x: bool(x.sum() > 0)),
        ("nonzero", lambda x: x.nonzero()),
        ("masked_select", lambda x: x.masked_select(x > 0)),
        ("index with a mask", lambda x: x[x > 0]),
        ("index_put_ with a mask", lambda x: x.clone().__setitem__(x > 0, torch.ones(2))),
        ("_unique2", lambda x: x.unique()),
        ("tolist", lambda x: x.tolist()),
        ("numpy", lambda x: x.numpy()),
        ("cpu", lambda x: x.cpu()),
        ("to cpu", lambda x: x.to("cpu")),
        ("to cpu", lambda x: x.to(device="cpu", dtype=torch.float64)),
        # "meta" stands for a device with a memory of its own.
        ("_to_copy", lambda x: x.to("meta")),
        ("copy_", lambda x: torch.empty(2, device="meta").copy_(x)),
    ],
)
def test_each_operation_that_waits_is_counted(name, wait):
    with SyncCounter() as counter:
        wait(torch.ones(2))
    assert name in counter.names


def test_operations_on_the_device_are_not_counted():
    with SyncCounter() as counter:
        x = torch.ones(2).to(torch.device("cpu")).to(torch.float64)
        torch.where(x > 0, x, 0 * x)[torch.tensor([1])].copy_(x[:1]).to(x)
    assert counter.names == []


class ErrorsOnAGpu(StepsWithoutRow):
    """Make PyTorch raise an error if a step without a row waits for the GPU."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_start(trainer, *args, **kwargs)
        warm = trainer.global_step >= 5  # before, graphs are recorded and libraries loaded
        torch.cuda.set_sync_debug_mode("error" if self.counter.active and warm else "default")

    def on_validation_start(self, *_: Any, **__: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    on_train_end = on_exception = on_validation_start  # type: ignore[assignment]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_steps_on_a_gpu_do_not_wait_for_it(precision, tmp_path):
    steps = ErrorsOnAGpu()
    gpu = ["trainer.accelerator=cuda", "trainer.devices=1", f"trainer.precision={precision}"]
    rows = ["trainer.log_every_n_steps=5", "optimizer.cycles=1"]
    trained_folder([*tiny_overrides(tmp_path), *gpu, *rows], callbacks=[steps])
    assert steps.n_batches >= 10


@pytest.mark.parametrize(
    "wait", [lambda loss: loss.item(), lambda loss: loss.cpu(), lambda loss: loss[loss > 0]]
)
def test_a_step_that_waits_for_the_device_is_counted(counted, monkeypatch, wait):
    step = GPTModule.training_step

    def waiting(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        wait(loss.detach())
        return loss

    monkeypatch.setattr(GPTModule, "training_step", waiting)
    steps = counted()
    assert len(steps.counter.names) == steps.n_batches


def test_diverged_loss_ends_the_run_at_the_next_row(tmp_path, monkeypatch):
    def poison(self, batch, batch_idx) -> None:
        if self.global_step == 3:
            torch.nn.init.constant_(self.net.final_norm.weight, torch.inf)

    monkeypatch.setattr("minigpt.training.module.GPTModule.on_train_batch_start", poison)
    overrides = [*tiny_overrides(tmp_path), "trainer.log_every_n_steps=6", "name=diverged"]
    with pytest.raises(Exception, match=r"(?=.*\bnan\b)(?=.*\b5\b)(?=.*optimizer\.lr=)"):
        trained_folder(overrides)
    assert read_metrics(tmp_path / "runs/diverged") == []
    assert not (tmp_path / "runs/diverged/checkpoints").exists()
