"""The settings of a training run: each section checked by itself, then all against the budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minigpt.core.settings import UserError
from minigpt.data.preparation import DataConfig
from minigpt.kernels.choice import Choice
from minigpt.model import GPTConfig
from minigpt.training.callbacks import CallbacksConfig
from minigpt.training.loggers import LoggerConfig
from minigpt.training.optim import OptimizerConfig

LONGEST_NAME = 200  # bytes; file systems allow 255, and names of files are made of it


@dataclass(frozen=True)
class TrainerConfig:
    """Where and how precisely a run computes, and how often it validates and logs."""

    accelerator: str = "auto"
    devices: str = "auto"  # a number, or auto: one CPU process, or every GPU
    num_nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    accumulate_grad_batches: int = 1
    n_validations: int = 5
    log_every_n_steps: int = 10
    compile: bool = False
    kernels: Choice = "auto"
    """What computes attention and loss: `cpu` is this package's kernels for CPUs, which also take
    batches in parts, one thread per core; `torch` is plain PyTorch; `auto` chooses by device."""
    max_steps: int | None = None
    max_epochs: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_nodes", "accumulate_grad_batches", "n_validations", "log_every_n_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.devices != "auto" and not (self.devices.isdigit() and int(self.devices) > 0):
            raise ValueError(f"devices {self.devices} must be auto or a number of devices")
        if self.accelerator not in ("auto", "cpu", "gpu", "cuda", "mps"):
            raise ValueError(f"accelerator {self.accelerator}: choose from auto, cpu, gpu, mps")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps {self.max_steps}: leave it out, budget.tokens sets them")


@dataclass(frozen=True)
class BudgetConfig:
    """How long to train."""

    tokens: int = 10_000_000  # seen, repeats counted

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens {self.tokens} must be at least 1")


@dataclass(frozen=True)
class Job:
    """All settings of one training run, validated."""

    model: GPTConfig
    data: DataConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    logger: LoggerConfig
    callbacks: CallbacksConfig
    budget: BudgetConfig
    name: str | None = None  # of the run folder
    runs_dir: str = "runs"
    resume: str | None = None
    init_from: str | None = None  # a run whose weights and tokenizer this one begins with
    seed: int = 1
    size: str = "gpt"  # what the model config is called: small, medium, large

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed} must be between 0 and {2**32 - 1}")
        if self.name is not None:
            _check_name(self.name)
        if self.runs_dir == "":
            raise ValueError("runs_dir is empty: leave it out for runs")
        if self.resume == "":
            raise ValueError("resume is empty: type resume=runs/<name>, or leave it out")
        if self.init_from == "":
            raise ValueError("init_from is empty: type init_from=releases/large, or leave it out")
        if self.trainer.strategy == "fsdp" and self.callbacks.prompts:
            raise ValueError(  # the first device alone would wait for the weights of the others
                "trainer.strategy=fsdp writes no stories while it trains: add callbacks=quiet"
            )
        if self.trainer.strategy == "fsdp" and self.optimizer.name == "muon":
            raise ValueError(  # which needs whole matrices
                "trainer.strategy=fsdp shares each matrix out over devices: add optimizer=adamw"
            )


def _check_name(name: str) -> None:
    if Path(name).name != name or name == "..":
        raise ValueError(f"name {name!r} is a folder's name under runs_dir, not a path")
    if not (name and name.isprintable() and len(name.encode()) <= LONGEST_NAME):
        raise ValueError(
            f"name {name!r} must be a folder's name: printable, at most {LONGEST_NAME} bytes"
        )


@dataclass(frozen=True)
class Plan:
    """How the budget is spent: `n_steps` updates of `tokens_per_step` tokens."""

    n_steps: int
    tokens_per_step: int

    @classmethod
    def of(cls, job: Job, world_size: int) -> Plan:
        """As many whole steps as the budget pays for. UserError: what does not fit together."""
        c, budget = job.trainer, job.budget.tokens
        per_step = job.data.batch_size * job.model.context_length * c.accumulate_grad_batches
        per_step *= world_size
        n_steps = budget // per_step
        if n_steps < 1:
            raise UserError(
                f"budget.tokens={budget:,} is less than one step of {per_step:,} tokens: type "
                f"budget.tokens={per_step} or more, or a smaller data.batch_size"
            )
        if job.optimizer.warmup_steps >= n_steps:
            raise UserError(
                f"a warm-up of {job.optimizer.warmup_steps:,} steps does not fit the budget, which "
                f"is {n_steps:,} steps of {per_step:,} tokens: type "
                f"optimizer.warmup_steps={n_steps // 10} or a larger budget.tokens"
            )
        if c.max_steps not in (None, n_steps):
            raise UserError(
                f"trainer.max_steps={c.max_steps} is not what budget.tokens={budget:,} pays for, "
                f"which is {n_steps:,} steps of {per_step:,} tokens: type "
                f"budget.tokens={c.max_steps * per_step} instead"
            )
        if c.max_epochs is not None:
            raise UserError(
                f"trainer.max_epochs={c.max_epochs}: the length of a run is set in tokens, repeats "
                "counted: type budget.tokens=<epochs × tokens of the training split> instead"
            )
        return cls(n_steps, per_step)
