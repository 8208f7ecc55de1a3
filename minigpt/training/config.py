"""The settings of a training run: each section checked by itself, then all against the budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from minigpt.core.settings import UserError, build, check, plain
from minigpt.data.config import DataConfig
from minigpt.generation.sampling import SamplingConfig
from minigpt.kernels.choice import Choice
from minigpt.model import GPTConfig

MAX_NAME_BYTES = 200  # file systems allow 255, and names of files are made of it


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
        counts = ("num_nodes", "accumulate_grad_batches", "n_validations", "log_every_n_steps")
        check(self, "must be at least 1", lambda n: n >= 1, *counts)
        if self.devices != "auto" and not (self.devices.isdigit() and int(self.devices) > 0):
            raise UserError("must be auto or a number of devices", "devices", self.devices)
        if self.accelerator not in ("auto", "cpu", "gpu", "cuda", "mps"):
            raise UserError("choose from auto, cpu, gpu, mps", "accelerator", self.accelerator)
        check(self, "leave it out: budget.tokens sets it", lambda n: n >= 1, "max_steps")
        length = "leave it out: budget.tokens, repeats counted, sets the length of a run"
        check(self, length, lambda _: False, "max_epochs")


@dataclass(frozen=True)
class OptimizerConfig:
    """Muon with AdamW, or AdamW alone; linear warm-up and a decay that follows `schedule`."""

    name: Literal["muon", "adamw"] = "muon"  # muon: on the matrices of the blocks, AdamW elsewhere
    lr: float | None = None  # of AdamW at the peak; None: `default_lr` of the width
    matrix_lr: float | None = None  # of Muon at the peak; None: `default_matrix_lr` of the width
    beta1: float = 0.9
    beta2: float = 0.999
    momentum: float = 0.95  # of Muon
    weight_decay: float = 0.1  # on matrices alone: not on biases and norms
    warmup_steps: int = 500  # linear, from lr / warmup_steps
    schedule: Literal["cosine", "linear"] | None = None  # None: linear with Muon, else cosine
    final_lr: float = 0.0  # where the decay ends, as a share of the peak
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping

    def __post_init__(self) -> None:
        if self.schedule is None:
            schedule = "linear" if self.name == "muon" else "cosine"
            object.__setattr__(self, "schedule", schedule)
        if self.name == "adamw" and self.matrix_lr is not None:
            raise UserError("is Muon's: with adamw, lr is that of all weights", "matrix_lr")
        check(self, "must be positive", lambda lr: lr > 0, "lr", "matrix_lr")
        check(self, "must be in [0, 1)", lambda x: 0 <= x < 1, "beta1", "beta2", "momentum")
        names = ("weight_decay", "warmup_steps", "grad_clip")
        check(self, "must not be negative", lambda x: x >= 0, *names)
        check(self, "is a share of the peak: 0 to 1", lambda x: 0 <= x <= 1, "final_lr")


@dataclass(frozen=True)
class LoggerConfig:
    """Where numbers go beside metrics.csv."""

    kind: Literal["csv", "wandb", "tensorboard"] = "csv"
    project: str = "mini-gpt"


@dataclass(frozen=True)
class CallbacksConfig:
    """What a run keeps and shows while it trains."""

    progress_bar: bool = True
    prompts: tuple[str, ...] = ("Once upon a time",)  # continued at each validation
    temperature: float = 0.8
    max_tokens: int = 200  # of each of these stories
    checkpoint_minutes: float = 10.0  # last.ckpt is at most this old (and written at validation)
    checkpoint_steps: int | None = None  # also every so many updates
    keep_checkpoints: int = 2  # last.ckpt and those before it; best.ckpt is kept beside them

    def __post_init__(self) -> None:
        check(self, "must be positive", lambda x: x > 0, "checkpoint_minutes")
        counts = ("checkpoint_steps", "keep_checkpoints")
        check(self, "must be at least 1", lambda n: n >= 1, *counts)
        SamplingConfig(temperature=self.temperature, max_tokens=self.max_tokens)


@dataclass(frozen=True)
class BudgetConfig:
    """How long to train."""

    tokens: int = 10_000_000  # seen, repeats counted

    def __post_init__(self) -> None:
        check(self, "must be at least 1", lambda n: n >= 1, "tokens")


@dataclass(frozen=True)
class TrainConfig:
    """All settings of one training run, validated: the recipe that `train()` follows.

    The defaults are those of the command line without a setting: the small model.
    """

    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    name: str | None = None  # of the run folder; None: size, date and time
    runs_dir: str = "runs"
    resume: str | None = None  # a run folder to continue; auto: the one called `name`
    init_from: str | None = None  # a run whose weights and tokenizer this one begins with
    seed: int = 1
    size: str | None = None  # name of the model's size; None: small, or gpt for another shape
    model_class: str | None = None  # dotted path of the model's class; None: minigpt.model.GPT
    overrides: tuple[str, ...] = field(default=(), compare=False)  # settings, as they were typed

    def __post_init__(self) -> None:
        if self.size is None:
            size = "small" if self.model == GPTConfig() else "gpt"
            object.__setattr__(self, "size", size)
        limit = 2**32 - 1
        check(self, f"must be between 0 and {limit}", lambda n: 0 <= n <= limit, "seed")
        if (name := self.name) is not None:
            fits = name.isprintable() and 0 < len(name.encode()) <= MAX_NAME_BYTES
            if not fits or Path(name).name != name or name == "..":
                message = "must be a folder's name under runs_dir, not a path: printable, at most"
                raise UserError(f"{message} {MAX_NAME_BYTES} bytes", "name", name)
        examples = {"runs_dir": "runs", "resume": "runs/<name>", "init_from": "releases/large"}
        for name, example in examples.items():
            if getattr(self, name) == "":
                raise UserError(f"is empty: leave it out, or give one such as {example}", name)
        fsdp, name = self.trainer.strategy == "fsdp", "trainer.strategy"
        if fsdp and self.callbacks.prompts:  # the first device would wait for the others' weights
            message = "writes no stories while it trains"
            raise UserError(message, name, "fsdp", {"callbacks": "quiet"})
        if fsdp and self.optimizer.name == "muon":
            message = "shares each matrix out over devices, and Muon needs whole ones"
            raise UserError(message, name, "fsdp", {"optimizer": "adamw"})

    @classmethod
    def from_dict(cls, values: dict[str, Any], model: type[GPTConfig] = GPTConfig) -> TrainConfig:
        """Return the validated config of plain values, such as a run's config.yaml.

        Args:
            values: by section, as `plain` gives them; what is left out keeps its default.
            model: class of the section `model`.

        Raises:
            UserError: a name, a type or a value is wrong; the message has its dotted name.
        """
        shape = values.get("model", {})
        if isinstance(shape, Mapping):
            shape = build(model, shape, "model")
        return build(cls, {**values, "model": shape}, "")


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Return all settings as plain values, with absolute paths: to be found from anywhere."""
    paths = {
        "train_files": tuple(str(Path(name).absolute()) for name in config.data.train_files),
        "valid_files": tuple(str(Path(name).absolute()) for name in config.data.valid_files),
        "cache_dir": str(Path(config.data.cache_dir).absolute()),
    }
    if (tokenizer := config.data.tokenizer) is not None:
        paths["tokenizer"] = str(Path(tokenizer).expanduser().absolute())
    init_from = str(Path(config.init_from).absolute()) if config.init_from else None
    data = dataclasses.replace(config.data, **paths)
    return plain(dataclasses.replace(config, data=data, init_from=init_from))


@dataclass(frozen=True)
class Schedule:
    """How the budget is spent: `n_steps` updates of `tokens_per_step` tokens."""

    n_steps: int
    tokens_per_step: int

    @classmethod
    def from_config(cls, config: TrainConfig, world_size: int) -> Schedule:
        """Return as many whole steps as the budget pays for, on `world_size` processes.

        Raises:
            UserError: budget, batch, warm-up or max_steps do not fit together.
        """
        trainer, budget = config.trainer, config.budget.tokens
        windows = config.data.windows_per_batch * trainer.accumulate_grad_batches * world_size
        per_step = windows * config.model.context_length
        n_steps, warmup = budget // per_step, config.optimizer.warmup_steps
        if n_steps < 1:
            message = f"is less than a step of {per_step:,} tokens; a smaller data.batch_size helps"
            raise UserError(message, "budget.tokens", budget, {"budget.tokens": per_step})
        length = f"{n_steps:,} steps of {per_step:,} tokens"
        if warmup >= n_steps:
            name, message = "optimizer.warmup_steps", f"does not fit the budget, which is {length}"
            raise UserError(message, name, warmup, {name: n_steps // 10})
        if (max_steps := trainer.max_steps) not in (None, n_steps):
            message = f"is not what budget.tokens={budget} pays for, which is {length}"
            fix = {"budget.tokens": max_steps * per_step}
            raise UserError(message, "trainer.max_steps", max_steps, fix)
        return cls(n_steps, per_step)
