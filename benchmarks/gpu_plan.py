"""The plan of benchmarks/gpu.py: all its parts in their order, and the sizes of two machines."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import gpu_checks as checks
from benchmarks import gpu_measures as measures
from benchmarks import gpu_trainings as trainings
from benchmarks.gpu_measures import Machine, Values
from minigpt.model import GPTConfig

PATIENCE = 3.0  # a part is stopped after this multiple of its expected time, but not before ...
LEAST = 60.0  # ... this many seconds, because a cold start of CUDA may take long


@dataclass(frozen=True)
class Part:
    """One check or measurement, and the seconds that it is expected to take on an H100.

    `needs` is the name of an earlier part, whose files this part reads. `repeats` is the name of an
    earlier part, which this part repeats if it had an error.
    """

    name: str
    seconds: float
    function: Callable[[], Values]
    needs: str | None = None
    repeats: str | None = None

    @property
    def limit(self) -> float:
        """Number of seconds after which the part is stopped."""
        return limit(self.seconds)


def limit(seconds: float) -> float:
    """Return the seconds after which a part with expected time `seconds` is stopped."""
    return max(LEAST, PATIENCE * seconds)


# ---------------------------------------------------------------------------- machines


def gpu_machine(scratch: Path) -> Machine:
    """Return the sizes of the models of the README, for one CUDA GPU."""
    widths = {"small": 128, "medium": 256, "large": 384}
    sizes = {name: GPTConfig(3000, 256, d, 5, d // 32, 2 * d, 0.0) for name, d in widths.items()}
    return Machine(
        torch.device("cuda"), scratch, sizes, batches=(128, 16), rounds=5, steps=20,
        precisions=("float32", "bfloat16", "float16"),
        overrides=("trainer.accelerator=cuda", "trainer.devices=1"),
        side=8192, sequences=(1, 256, 1024), new_tokens=128, shared=(1, 8, 4, 2), perplexity=5.87,
    )  # fmt: skip


def cpu_machine(scratch: Path) -> Machine:
    """Return tiny sizes, with which the script takes seconds on a CPU."""
    shape = GPTConfig(280, 16, d_model=16, n_layers=1, n_heads=2, d_ff=32)
    names = ("Tom", "Lily", "Max", "Anna")
    scratch.mkdir(parents=True, exist_ok=True)
    for split, ends in (("train", ("happy", "sad", "tired", "kind")), ("valid", ("good",))):
        stories = [
            f"One day, {a} met {b}. {a} was {c}." for a in names for b in names for c in ends
        ]
        text = "\n<|endoftext|>\n".join(stories)
        (scratch / f"{split}.txt").write_text(text, encoding="utf-8")
    overrides = (
        "trainer.accelerator=cpu", "data=text", f"data.train_files=[{scratch / 'train.txt'}]",
        f"data.valid_files=[{scratch / 'valid.txt'}]", f"data.cache_dir={scratch / 'cache'}",
        "data.vocab_size=280", "model.context_length=16", "model.d_model=16", "model.n_layers=1",
        "model.n_heads=2", "model.d_ff=32", "optimizer.warmup_steps=2", "callbacks=quiet",
    )  # fmt: skip
    return Machine(
        torch.device("cpu"), scratch, {"medium": shape}, batches=(4, 2), rounds=1, steps=2,
        precisions=("float32", "bfloat16"), overrides=overrides, side=64, sequences=(1, 3),
        new_tokens=6, shared=(1, 2), perplexity=1e9,
    )  # fmt: skip


# ---------------------------------------------------------------------------- the plan


class _Builder:
    """The parts of a plan so far, in their order."""

    def __init__(self, m: Machine, out: Path, left: Callable[[], float]) -> None:
        self.m, self.out, self.left = m, out, left
        machine = Part("machine", 20, lambda: measures.describe(m))
        self.parts = [
            machine,
            Part("data", 12, lambda: trainings.data_is_ready(m)),
            Part("check batches", 3, lambda: checks.check_batches(m)),
            Part("check gradients", 12, lambda: checks.check_gradients(m)),
            Part("check syncs", 12, lambda: checks.check_syncs(m)),
            Part("check generation", 4, lambda: checks.check_generation(m)),
            Part("check resume", 12, lambda: checks.check_resume(m)),
        ]
        self.machine_again = replace(machine, name="machine again", seconds=5, repeats="machine")

    def speeds(self, names: Sequence[str]) -> None:
        for batch in self.m.batches:
            for name in names:
                seconds = 12 if "compile" in name else 5
                measure = partial(measures.speed, self.m, "medium", batch, name)
                self.parts.append(Part(f"speed medium {batch}: {name}", seconds, measure))

    def training(
        self, name: str, seconds: float, *overrides: str, keep: bool = True,
        needs: str | None = None,
    ) -> None:  # fmt: skip
        def run() -> Values:
            timeout = min(self.left(), limit(seconds)) if self.m.on_gpu else self.left()
            out = self.out if keep else None
            return trainings.training(self.m, name, overrides, timeout, out)

        self.parts.append(Part(f"training {name}", seconds, run, needs))

    def generation(self, batches: Sequence[int]) -> None:
        for batch in batches:
            for name in measures.WRITERS:
                seconds = {"ours": 4, "transformers eager": 7}.get(name, 20)
                write = partial(measures.generation, self.m, "medium", batch, name)
                self.parts.append(Part(f"generation {batch}: {name}", seconds, write))

    def sharing(self, numbers: Sequence[int], overrides: list[str]) -> None:
        for n in numbers:
            share = partial(trainings.sharing, self.m, n, overrides)
            self.parts.append(
                Part(f"sharing {n}", 14 + 2 * n, lambda share=share: share(self.left()))
            )

    def kernels(self) -> None:
        for windows in self.m.batches:
            measure = partial(measures.kernels_of_a_step, self.m, "medium", windows)
            self.parts.append(Part(f"kernels medium {windows}", 10, measure))


def _overrides(m: Machine) -> dict[str, list[str]]:
    """Return the settings of each kind of training: its size, its batch and its budget."""
    many, few = ["data.batch_size=128", "optimizer.warmup_tokens=1e6"], ["data.batch_size=8"]
    as_on_cpus = ["data.batch_size=16"]
    if not m.on_gpu:
        many = few = as_on_cpus = ["data.batch_size=4"]
    kinds = {  # model size, batch, budget in tokens
        "medium": ("medium", many, 104e6), "large": ("large", many, 44e6),
        "small": ("small", many, 44e6), "precision": ("large", as_on_cpus, 10e6),
        "shared": ("small", few, 8e6),
    }  # fmt: skip
    return {
        kind: [
            *([f"model={size}"] if m.on_gpu else []),
            *batch,
            f"budget.tokens={budget if m.on_gpu else 640:.0f}",
        ]
        for kind, (size, batch, budget) in kinds.items()
    }


def plan(m: Machine, out: Path, left: Callable[[], float]) -> list[Part]:
    """Return all parts, the most valuable first."""
    add, words = _Builder(m, out, left), _overrides(m)
    teacher = f"teacher.runs=[{m.scratch / 'runs/large'}]"
    precisions = [*words["precision"], "trainer.n_validations=1"]
    add.speeds(measures.CANDIDATES)
    add.parts.append(add.machine_again)
    add.training("medium", 48, *words["medium"])
    add.training("large", 36, *words["large"])
    add.training("student", 32, *words["small"], teacher, needs="training large")
    add.training("small", 19, *words["small"])
    for precision in ("32-true", "bf16-mixed", *(["16-mixed"] if m.on_gpu else [])):
        seconds = 30 if precision == "16-mixed" else 20  # without a CUDA graph of the loss
        own = *precisions, f"trainer.precision={precision}"
        add.training(f"large-{precision}", seconds, *own, keep=False)
    add.generation(m.sequences[:2])
    add.sharing(m.shared[:2], words["shared"])
    add.generation(m.sequences[2:])
    compiled = ["trainer.compile=true"] if m.on_gpu else []
    add.training("medium-compiled", 75, *words["medium"], *compiled, keep=False)
    add.sharing(m.shared[2:], words["shared"])
    if m.on_gpu:
        own = *precisions, "trainer.precision=32-true", "seed=2"
        add.training("large-32-true-2", 20, *own, keep=False)
    add.speeds(measures.MORE_CANDIDATES)
    add.kernels()
    return add.parts


def part_names(device: str) -> list[str]:
    """Return the names of all parts."""
    with tempfile.TemporaryDirectory() as folder:
        machine = (gpu_machine if device == "cuda" else cpu_machine)(Path(folder))
        return [part.name for part in plan(machine, Path(folder), lambda: 0.0)]
