"""The checks of benchmarks/gpu.py: is everything that a GPU computes right?"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from benchmarks.gpu_measures import DTYPES, Machine, Values, training_loss
from benchmarks.gpu_trainings import run_in_process
from minigpt.cli.compose import load_config
from minigpt.data.device import DeviceBatches
from minigpt.data.windows import BudgetSampler, StoryWindows, TrainingBatches
from minigpt.generation.sampling import SamplingConfig, generate
from minigpt.kernels.choice import kernels_for
from minigpt.model import GPT
from minigpt.runs.records import read_metrics
from minigpt.training.loop import train
from tests.syncs import SyncCounter


def check_gradients(m: Machine) -> Values:
    """Compare loss and gradients of each size and precision with float32 on the CPU."""
    rows, ok = [], True
    for name, shape in m.sizes.items():
        torch.manual_seed(0)
        reference = GPT(shape)
        ids, targets = torch.randint(0, shape.vocab_size, (2, 2, shape.context_length)).unbind()
        expected = _gradients(reference, reference.loss, ids, targets, None)
        model = GPT(shape).to(m.device).use(kernels_for("cuda"))
        model.load_state_dict(reference.state_dict())
        for precision in m.precisions:
            loss = training_loss(model, precision != "float16")
            actual = _gradients(model, loss, ids.to(m.device), targets.to(m.device), precision)
            errors = {k: _distance(actual[k], expected[k]) for k in ("loss", "gradients")}
            limits = (1e-4, 3e-3) if precision == "float32" else (5e-3, 5e-2)
            good = errors["loss"] < limits[0] and errors["gradients"] < limits[1]
            rows.append({"size": name, "precision": precision, **errors, "ok": good})
            ok = ok and good
    return {"ok": ok, "rows": rows}


def _gradients(
    model: GPT, loss: Any, ids: Tensor, targets: Tensor, precision: str | None
) -> dict[str, Tensor]:
    dtype = DTYPES[precision or "float32"]
    scale = 1024.0 if dtype == torch.float16 else 1.0
    with torch.autocast(ids.device.type, dtype, dtype is not None):
        value = loss(ids, targets)
    gradients = torch.autograd.grad(value * scale, list(model.parameters()))
    flat = torch.cat([g.float().flatten() for g in gradients]).cpu() / scale
    return {"loss": value.detach().float().cpu(), "gradients": flat}


def _distance(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the norm; infinity for NaN."""
    return float(((actual - expected).norm() / expected.norm()).nan_to_num(torch.inf))


def check_batches(m: Machine) -> Values:
    """Compare the batches that the device gathers with those of the host, bit for bit."""
    shape, tokens = next(iter(m.sizes.values())), m.tokens(20_000)
    order = BudgetSampler(
        len(tokens), shape.context_length, 4, 100, 1, random_offset=True, stories=True
    )
    windows = StoryWindows(tokens, shape.context_length, 1)
    batches = TrainingBatches(windows, order, 0.2, shape.vocab_size)
    on_device = DeviceBatches(batches, m.device)
    same = all(
        torch.equal(a.cpu(), b)
        for step in range(100)
        for a, b in zip(on_device[step], batches[step], strict=True)
    )
    return {"ok": same, "steps": 100}


def check_generation(m: Machine) -> Values:
    """Compare the tokens of a seed with those of the CPU, and count the waits for the device."""
    shape = next(iter(m.sizes.values()))
    model = GPT(shape).eval().requires_grad_(False)
    sampling = SamplingConfig(0.8, max_tokens=40, seed=1, backend="torch")

    def tokens() -> Tensor:
        prompts = torch.arange(1, 7, device=model.embedding.weight.device).view(6, 1)
        steps = generate(model, prompts, sampling, end_of_text=-1)
        return torch.stack([step.ids for step in steps])

    expected, precision = tokens(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 would change some tokens
    try:
        model.to(m.device)
        syncs = _Syncs(m.on_gpu)
        with syncs.names() as names:
            syncs.watch(True)
            try:
                actual = tokens()
            finally:
                syncs.watch(False)
    finally:
        torch.set_float32_matmul_precision(precision)
    # Sums of probabilities are rounded differently, which may change a token, and what follows it.
    same = int((actual.cpu() == expected).all(dim=0).sum())
    waits = {"waits, with those of the start": len(names)}
    return {"ok": same >= 5, "equal sequences of 6": same, "steps": len(actual), **waits}


class _Syncs(Callback):
    """Count the waits for the device in steps without a row in metrics.csv."""

    def __init__(self, on_gpu: bool) -> None:
        self.counter, self.on_gpu, self.active, self.steps = SyncCounter(), on_gpu, False, 0
        self.counter.active = False

    def watch(self, active: bool) -> None:
        if self.on_gpu:
            torch.cuda.set_sync_debug_mode("warn" if active else "default")
        self.counter.active = active

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
        # The first steps allocate, record the graph and load libraries.
        active = trainer.global_step >= 5 and not pl_module.has_row(trainer.global_step + 1)
        self.steps += active
        self.watch(active)

    def on_validation_start(self, *_: Any, **__: Any) -> None:
        self.watch(False)

    on_train_end = on_exception = on_validation_start  # type: ignore[assignment]

    @contextlib.contextmanager
    def names(self) -> Iterator[list[str]]:
        """Collect the names of operations, or on a GPU the warnings of PyTorch."""
        names = self.counter.names
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with contextlib.nullcontext() if self.on_gpu else self.counter:
                yield names
        names += [
            str(w.message) for w in caught if "synchronizing CUDA operation" in str(w.message)
        ]


def check_syncs(m: Machine) -> Values:
    """Count the waits for the device in short trainings with noise, in bfloat16 and float32."""
    kernels = [] if m.on_gpu else ["trainer.kernels=torch"]
    length = next(iter(m.sizes.values())).context_length
    budget = [f"budget.tokens={40 * 4 * length}", "data.batch_size=4", "data.noise=0.1"]
    budget.append("optimizer.warmup_steps=2")
    rows = ["trainer.log_every_n_steps=10", "trainer.n_validations=2"]
    names: dict[str, list[str]] = {}
    steps = 0
    for precision in ("bf16-mixed", "32-true"):
        syncs, words = (
            _Syncs(m.on_gpu),
            [f"trainer.precision={precision}", *kernels, *budget, *rows],
        )
        with syncs.names() as names[precision]:
            run_in_process(m, f"syncs-{precision}", words, [syncs])
        steps += syncs.steps
    counts = {precision: len(found) for precision, found in names.items()}
    every = [name for found in names.values() for name in found]
    return {
        "ok": not every, "syncs": len(every), "syncs by precision": counts, "steps": steps,
        "names": every[:5],
    }  # fmt: skip


def check_resume(m: Machine) -> Values:
    """Compare a run that was stopped and resumed with one that was not."""
    length = next(iter(m.sizes.values())).context_length
    short = [
        f"budget.tokens={20 * 4 * length}", "data.batch_size=4", "trainer.n_validations=1",
        "optimizer.warmup_steps=2", "trainer.log_every_n_steps=1",
    ]  # fmt: skip
    whole = run_in_process(m, "whole", short)
    stopped = m.scratch / "runs/stopped"
    with contextlib.suppress(_StopError):
        run_in_process(
            m, "stopped", [*short, "callbacks.checkpoint_steps=8"], [_StopAt(12)]
        )  # fmt: skip
    train(load_config("train", [f"resume={stopped}"]))
    a, b = (_losses(folder) for folder in (whole, stopped))
    difference = max(abs(a[step] - b[step]) for step in a) if a.keys() == b.keys() else None
    ok = difference is not None and difference < 0.01
    return {"ok": ok, "steps": len(a), "largest difference of the loss": difference}


class _StopError(Exception):
    pass


class _StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step:
            raise _StopError


def _losses(folder: Path) -> dict[int, float]:
    rows = read_metrics(folder)
    return {int(row["step"]): row["train/loss"] for row in rows if "train/loss" in row}
