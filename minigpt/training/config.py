"""Validated dataclasses for the settings of a training run, and the class `Schedule`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from minigpt.core.fields import documented
from minigpt.core.files import expand_paths
from minigpt.core.settings import UserError, build, check, make_tuples, plain
from minigpt.data.config import DataConfig
from minigpt.generation.sampling import SamplingConfig
from minigpt.kernels.choice import Choice
from minigpt.model import GPTConfig

LARGE_BATCH = 8192  # tokens of an update, up to which the default recipe was tuned
MAX_NAME_BYTES = 200  # file systems allow 255; some file names are the run name plus a suffix


@dataclass(frozen=True)
class TrainerConfig:
    """Devices, precision and kernels of a run, and the intervals of validation and logging."""

    accelerator: str = "auto"
    """Kind of device: auto, cpu, gpu, cuda or mps; auto uses a GPU if there is one."""
    devices: str = "auto"
    """Number of devices on each node; auto means all CUDA GPUs, or 1 device if the accelerator is
    not CUDA."""
    num_nodes: int = 1
    """Number of machines that train together."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several devices share the work: ddp copies the model to each device, fsdp splits the
    weights over the devices; auto means ddp."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """Numeric precision, with Lightning's names; auto chooses the precision for the device."""
    accumulate_grad_batches: int = 1
    """Number of batches whose gradients are averaged for one update."""
    n_validations: int = 5
    """Number of evenly spaced validations, the last one at the end of the run; a run of few updates
    may have fewer."""
    log_every_n_steps: int = 10
    """Number of updates between two rows of training metrics in metrics.csv."""
    compile: bool = False
    """Whether to compile the loss with torch.compile; compilation takes a minute and pays off on
    GPUs."""
    profile: bool = False
    """Whether to profile up to ten updates near the start of the run. The profile consists of
    profile/trace.json, which chrome://tracing shows, and profile/operators.txt, a table of the
    operators and kernels that take the most time."""
    cuda_graph: bool = True
    """Whether a CUDA GPU replays the forward and backward pass, and a part of Muon's update, as
    recorded CUDA graphs. With fsdp, nothing is recorded. With dropout, 16-mixed or a custom model
    class, the passes are not recorded."""
    kernels: Choice = "auto"
    """Implementation of attention and loss: `cpu` means this package's CPU kernels, `torch` means
    PyTorch's own operators, and `auto` means `cpu` on a CPU and `torch` on other devices. With
    `cpu`, each thread computes its own part of a batch. With dropout, compile or fsdp, and for a
    batch with fewer windows than threads, the threads compute the whole batch together."""
    threads: int | None = None
    """Number of CPU threads of each process, from 1 to 1024; None means the value of the
    environment variable OMP_NUM_THREADS. If this variable is not set, None means PyTorch's default
    number, but at most the process's share of the usable cores. The CPU affinity and a container's
    CPU quota limit the number of usable cores."""
    max_steps: int | None = None
    """Expected number of updates. It is an error if budget.tokens allows a different number. None
    disables this check."""
    max_epochs: int | None = None
    """Must be None, because budget.tokens sets the length of a run."""

    def __post_init__(self) -> None:
        counts = ("num_nodes", "accumulate_grad_batches", "n_validations", "log_every_n_steps")
        check(self, "must be at least 1", lambda n: n >= 1, *counts)
        check(self, "must be from 1 to 1024", lambda n: 1 <= n <= 1024, "threads")
        if self.devices != "auto" and not (self.devices.isdigit() and int(self.devices) > 0):
            raise UserError("must be auto or a number of devices", "devices", self.devices)
        if self.accelerator not in ("auto", "cpu", "gpu", "cuda", "mps"):
            raise UserError("must be auto, cpu, gpu, cuda or mps", "accelerator", self.accelerator)
        check(self, "leave it out; budget.tokens sets it", lambda n: n >= 1, "max_steps")
        length = "leave it out; budget.tokens sets the length of a run, over all epochs"
        check(self, length, lambda _: False, "max_epochs")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning rates and their schedule: a linear warm-up, then a decay."""

    name: Literal["muon", "adamw"] = "muon"
    """Optimizer: `muon` means Muon for the matrices of the blocks and AdamW for all other weights;
    `adamw` means AdamW for all weights."""
    lr: float | None = None
    """Peak learning rate of AdamW; None means the default for the model's width (`default_lr`)."""
    matrix_lr: float | None = None
    """Peak learning rate of Muon; None means the default for the model's width
    (`default_matrix_lr`)."""
    beta1: float = 0.9
    """Decay of AdamW's running mean of the gradients, from 0 to below 1."""
    beta2: float = 0.999
    """Decay of AdamW's running mean of the squared gradients, from 0 to below 1."""
    momentum: float = 0.95
    """Decay of Muon's running mean of the gradients, from 0 to below 1."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings; biases and norms are not decayed."""
    final_weight_decay: float | None = None
    """Weight decay in the last update. The weight decay changes linearly from `weight_decay` in the
    first update to this value; None keeps it constant."""
    normalize_rows: Literal["before", "after"] | None = None
    """Point at which Muon scales the rows of a matrix to equal norms. `before` scales the rows of
    the momentum before orthogonalisation; `after` scales the rows of the orthogonalised update, but
    keeps the total norm of the update; None scales no rows."""
    warmup_steps: int = 500
    """Number of updates in which the learning rate rises linearly, from 1 / warmup_steps of the
    peak learning rate to the peak learning rate. With `follow_batch`, larger batches have fewer."""
    warmup_tokens: int | None = None
    """Length of the warm-up in training tokens, rounded up to whole updates; with larger batches,
    the warm-up has fewer updates. A value replaces `warmup_steps`; None means that `warmup_steps`
    applies."""
    follow_batch: bool = True
    """Whether the warm-up and the default learning rates follow the batch if an update has more
    than 8,192 tokens (32 windows of 256): `warmup_steps` updates of 8,192 tokens then give the
    length of the warm-up, and the default learning rates are multiplied by the square root of the
    ratio."""
    schedule: Literal["cosine", "linear"] | None = None
    """Shape of the decay after the warm-up; None means linear with Muon and cosine with AdamW."""
    final_lr: float = 0.0
    """Learning rate at the end of the decay, as a fraction of the peak learning rate, from 0 to 1.
    With `cycles`, each cycle ends at this learning rate, too."""
    cycles: int = 0
    """Number of cycles at the end of the run, or 0; each cycle raises the learning rate again and
    then repeats the decay. With cycles, the final weights are the mean of the weights at the end of
    the main decay and at the end of each cycle."""
    cycle_share: float = 0.1
    """Length of each cycle, as a fraction of all updates, between 0 and 1."""
    cycle_lr: float = 0.5
    """Learning rate at the start of each cycle, as a fraction of the peak learning rate: above 0,
    at least `final_lr` and at most 1."""
    grad_clip: float = 1.0
    """Maximum total norm of the gradients; gradients with a larger norm are scaled down, and 0
    disables clipping."""

    def __post_init__(self) -> None:
        if self.schedule is None:
            schedule = "linear" if self.name == "muon" else "cosine"
            object.__setattr__(self, "schedule", schedule)
        if self.name == "adamw" and self.matrix_lr is not None:
            raise UserError("leave it out; adamw uses optimizer.lr for all weights", "matrix_lr")
        if self.name == "adamw" and self.normalize_rows is not None:
            raise UserError("leave it out; only muon has it", "normalize_rows", self.normalize_rows)
        check(self, "must be positive", lambda lr: lr > 0, "lr", "matrix_lr")
        decays = "beta1", "beta2", "momentum"
        check(self, "must be at least 0 and below 1", lambda x: 0 <= x < 1, *decays)
        names = ("weight_decay", "final_weight_decay", "warmup_steps", "grad_clip")
        check(self, "must not be negative", lambda x: x >= 0, *names)
        check(self, "must not be negative", lambda n: n >= 0, "warmup_tokens")
        check(self, "must be a fraction from 0 to 1", lambda x: 0 <= x <= 1, "final_lr")
        check(self, "must not be negative", lambda n: n >= 0, "cycles")
        check(self, "must be above 0 and below 1", lambda x: 0 < x < 1, "cycle_share")
        lowest = self.final_lr if self.cycles else 0.0
        message = "must be above 0, at least final_lr, and at most 1"
        check(self, message, lambda x: x > 0 and lowest <= x <= 1, "cycle_lr")
        if self.cycles * self.cycle_share >= 1:
            fix = {"cycle_share": float(f"{0.5 / self.cycles:.1g}")}  # about half of the run
            message = f"with cycle_share={self.cycle_share}, the cycles would take the whole run"
            raise UserError(message, "cycles", self.cycles, fix)

    def n_warmup_steps(self, tokens_per_step: int) -> int:
        """Return the number of updates in the warm-up.

        Args:
            tokens_per_step: number of training tokens in one update, over all devices.
        """
        tokens = self.warmup_tokens
        if tokens is None and self.follow_batch and tokens_per_step > LARGE_BATCH:
            tokens = self.warmup_steps * LARGE_BATCH
        return self.warmup_steps if tokens is None else -(-tokens // tokens_per_step)

    def decay_ends(self, n_steps: int) -> list[int]:
        """Return the number of updates at the end of the main decay and at the end of each cycle.

        The main decay is the decay before the first cycle. The last element is `n_steps`.

        Args:
            n_steps: number of updates in the run.
        """
        length = int(self.cycle_share * n_steps)
        return [n_steps - i * length for i in range(self.cycles, -1, -1)]


@dataclass(frozen=True)
class TeacherConfig:
    """Distillation: the teachers of the model in training, and the weight of their predictions."""

    runs: tuple[str, ...] = ()
    """Run folders, checkpoints or exports of the teachers; the probabilities of several teachers
    are averaged. Without teachers, the model learns only from the text. On the command line,
    teacher=releases/large is short for teacher.runs=releases/large, and teacher=null means no
    teachers."""
    weight: float = 0.5
    """Weight w of the divergence from the teachers in the training objective, from 0 to 1; the
    cross-entropy has the weight 1 - w."""
    temperature: float = 1.0
    """Temperature of the teachers' and of the student's probabilities when the divergence between
    them is computed, from 0.01 to 100."""
    class_path: str | None = None
    """Dotted path of the teachers' model class; None means minigpt.model.GPT."""

    def __post_init__(self) -> None:
        expand_paths(self, "runs")
        check(self, "must be from 0 to 1", lambda w: 0 <= w <= 1, "weight")
        check(self, "must be from 0.01 to 100", lambda t: 0.01 <= t <= 100, "temperature")
        if "" in self.runs:
            problem = "must not contain an empty path; leave it out, or give a run"
            raise UserError(problem, "runs", fix={"runs": ["releases/large"]})
        for name in () if self.runs else ("weight", "temperature"):
            if (value := getattr(self, name)) != (default := getattr(TeacherConfig, name)):
                problem = "has no effect without teachers; name some, or keep the default"
                raise UserError(problem, name, value, {name: default})


@dataclass(frozen=True)
class LoggerConfig:
    """Logger in addition to metrics.csv, which is always written."""

    kind: Literal["csv", "wandb", "tensorboard"] = "csv"
    """Logger of the metrics: `csv` writes only metrics.csv; `wandb` and `tensorboard` log in
    addition to metrics.csv."""
    project: str | None = None
    """Name of the W&B project; None means the value of the environment variable WANDB_PROJECT, or
    mini-gpt if the variable is not set."""
    entity: str | None = None
    """User or team that owns the W&B project; None means the value of the environment
    variable WANDB_ENTITY, or the default of the W&B account if the variable is not set."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """What W&B does: `online` uploads the run, `offline` stores it locally, and `disabled` does
    nothing. Without an API key, `online` acts like `offline`. None means the value of the
    environment variable WANDB_MODE, or `online` if the variable is not set."""
    group: str | None = None
    """Group of the W&B run; None means the value of the environment variable WANDB_RUN_GROUP, or no
    group if the variable is not set."""
    log_model: bool = False
    """Whether to upload the best model to W&B at the end of the run, as an export in the format
    safetensors with bfloat16 weights; this needs logger=wandb."""

    def __post_init__(self) -> None:
        if self.log_model and self.kind != "wandb":
            raise UserError("needs the logger wandb", "log_model", True, {"kind": "wandb"})


@dataclass(frozen=True)
class CallbacksConfig:
    """Progress display, sample stories and checkpoints of a run."""

    progress_bar: bool = True
    """Whether to show progress: a bar on a terminal, elsewhere log lines at growing intervals."""
    prompts: tuple[str, ...] = ("Once upon a time",)
    """Prompts of the sample stories, which are written to samples.jsonl after each validation."""
    temperature: float = 0.8
    """Sampling temperature of the sample stories; 0 means greedy decoding."""
    max_tokens: int = 200
    """Maximum number of new tokens in each sample story."""
    checkpoint_minutes: float = 10.0
    """Minutes after which last.ckpt is written again; each validation also writes last.ckpt."""
    checkpoint_steps: int | None = None
    """last.ckpt is also written after every `checkpoint_steps` updates, independently of
    `checkpoint_minutes`; None disables these additional checkpoints."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints to keep, including last.ckpt but not best.ckpt."""
    snapshots: int | None = None
    """Number of snapshots of the weights to write to snapshots/; None disables snapshots. The first
    one is at step 0, the last one at the end of the run. Their steps are evenly spaced on the scale
    log(1 + step), except that they are at least 1 apart."""

    def __post_init__(self) -> None:
        make_tuples(self, "prompts")
        check(self, "must be positive", lambda x: x > 0, "checkpoint_minutes")
        counts = ("checkpoint_steps", "keep_checkpoints")
        check(self, "must be at least 1", lambda n: n >= 1, *counts)
        check(self, "must be at least 2", lambda n: n >= 2, "snapshots")
        SamplingConfig(temperature=self.temperature, max_tokens=self.max_tokens)


@dataclass(frozen=True)
class BudgetConfig:
    """Length of a run."""

    tokens: int = 10_000_000
    """Number of training tokens, rounded down to whole updates; repeated tokens count each time."""

    def __post_init__(self) -> None:
        check(self, "must be at least 1", lambda n: n >= 1, "tokens")


@documented
@dataclass(frozen=True)
class TrainConfig:
    """All settings of one training run, validated.

    The defaults equal those of the command line and train the small model.
    """

    model: GPTConfig = field(default_factory=GPTConfig)
    """Shape of the model; a custom model class may have its own config class."""
    data: DataConfig = field(default_factory=DataConfig)
    """Stories, tokenizer and batches."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer, learning rates and schedule."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """Teachers of the model, for distillation."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Devices, precision and kernels, and the intervals of validation and logging."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """Logger in addition to metrics.csv."""
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    """Progress display, sample stories and checkpoints."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """Length of the run."""
    name: str | None = None
    """Name of the run folder. None means a name from the model's size and the time; under srun, the
    name contains the ids of the Slurm job and step instead of the time."""
    runs_dir: str = "runs"
    """Folder in which the run folder is created."""
    resume: str | None = None
    """Run folder or checkpoint to continue; None starts a new run, and auto continues the run
    called `name` if it exists, or else starts it."""
    init_from: str | None = None
    """Run that provides the initial weights and the tokenizer; None means random weights."""
    seed: int = 1
    """Seed of all random numbers in the run, such as initial weights and data order, from 0 to
    2^32 - 1."""
    size: str | None = None
    """Name of the model's size for reports and run names; None means `small` for the default shape
    and `gpt` for any other shape."""
    model_class: str | None = None
    """Dotted path of the model's class, as recorded in the run; None means minigpt.model.GPT."""
    overrides: tuple[str, ...] = field(default=(), compare=False)
    """Settings as typed on the command line, to be recorded in config.yaml."""

    def __post_init__(self) -> None:
        if self.size is None:
            size = "small" if self.model == GPTConfig() else "gpt"
            object.__setattr__(self, "size", size)
        limit = 2**32 - 1
        check(self, f"must be from 0 to {limit}", lambda n: 0 <= n <= limit, "seed")
        if (name := self.name) is not None:
            fits = name.isprintable() and 0 < len(name.encode()) <= MAX_NAME_BYTES
            if not fits or Path(name).name != name or name == "..":
                message = f"must be 1 to {MAX_NAME_BYTES} bytes of printable text without /"
                raise UserError(f"{message}, because it names a folder in runs_dir", "name", name)
        examples = {"runs_dir": "runs", "resume": "runs/<name>", "init_from": "releases/large"}
        for name, example in examples.items():
            if getattr(self, name) == "":
                raise UserError("must not be empty", name, fix={name: example})
        expand_paths(self, *examples)
        fsdp, name = self.trainer.strategy == "fsdp", "trainer.strategy"
        if fsdp and self.callbacks.prompts:  # only rank 0 samples, and it has only its shard
            message = "cannot sample stories during training"
            raise UserError(message, name, "fsdp", {"callbacks": "quiet"})
        if fsdp and self.teacher.runs:
            message = "shards the weights of the student, but not those of teachers"
            raise UserError(message, name, "fsdp", {name: "ddp"})
        if fsdp and self.optimizer.name == "muon":
            message = "splits each matrix over the devices, but Muon needs whole matrices"
            raise UserError(message, name, "fsdp", {"optimizer": "adamw"})
        for setting, value, off in (
            ("callbacks.snapshots", self.callbacks.snapshots, None),
            ("optimizer.cycles", self.optimizer.cycles, 0),
        ):
            if fsdp and value:  # no process has all weights
                raise UserError(f"cannot be combined with {setting}", name, "fsdp", {setting: off})

    @classmethod
    def from_dict(cls, values: dict[str, Any], model: type[GPTConfig] = GPTConfig) -> TrainConfig:
        """Return a validated config from plain values, such as those in a run's config.yaml.

        Args:
            values: settings by section, as returned by `plain`. Missing settings keep their
                defaults.
            model: config class of the section `model`.

        Returns:
            The config.

        Raises:
            UserError: a name, a type or a value is wrong; the error names the setting.
        """
        shape = values.get("model", {})
        if isinstance(shape, Mapping):
            shape = build(model, shape, "model")
        return build(cls, {**values, "model": shape}, "")


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Return all settings as plain values that can be read again in any working directory.

    The paths of text files, tokenizer, cache, teachers and `init_from` are made absolute.
    """
    paths = {
        "train_files": tuple(str(Path(name).absolute()) for name in config.data.train_files),
        "valid_files": tuple(str(Path(name).absolute()) for name in config.data.valid_files),
        "cache_dir": str(Path(config.data.cache_dir).absolute()),
    }
    if (tokenizer := config.data.tokenizer) is not None:
        paths["tokenizer"] = str(Path(tokenizer).absolute())
    init_from = str(Path(config.init_from).absolute()) if config.init_from else None
    data = dataclasses.replace(config.data, **paths)
    runs = tuple(str(Path(name).absolute()) for name in config.teacher.runs)
    teacher = dataclasses.replace(config.teacher, runs=runs)
    return plain(dataclasses.replace(config, data=data, teacher=teacher, init_from=init_from))


@dataclass(frozen=True)
class Schedule:
    """Number of updates in a run, and number of training tokens per update, over all devices."""

    n_steps: int
    tokens_per_step: int

    @classmethod
    def from_config(cls, config: TrainConfig, world_size: int) -> Schedule:
        """Return the schedule with as many whole updates as the budget allows.

        Args:
            config: all settings.
            world_size: number of processes; each process has its own batches.

        Raises:
            UserError: the budget is less than one update, the warm-up is not shorter than the part
                of the run before the learning-rate cycles, a cycle is shorter than one update,
                there are more snapshots than updates plus one, or max_steps contradicts the budget.
        """
        trainer, budget = config.trainer, config.budget.tokens
        windows = config.data.windows_per_batch * trainer.accumulate_grad_batches * world_size
        per_step = windows * config.model.context_length
        n_steps = budget // per_step
        if n_steps < 1:
            message = f"is less than one step of {per_step:,} tokens (see data.batch_size)"
            raise UserError(message, "budget.tokens", budget, {"budget.tokens": per_step})
        length = f"{n_steps:,} steps of {per_step:,} tokens"
        _check_decays(config.optimizer, n_steps, per_step, length)
        if (snapshots := config.callbacks.snapshots or 0) > n_steps + 1:
            name = "callbacks.snapshots"
            message = f"is too many; a run of {length} allows {n_steps + 1:,}"
            raise UserError(message, name, snapshots, {name: n_steps + 1})
        if (max_steps := trainer.max_steps) not in (None, n_steps):
            message = f"contradicts budget.tokens={budget}, which is {length}"
            fix = {"budget.tokens": max_steps * per_step}
            raise UserError(message, "trainer.max_steps", max_steps, fix)
        return cls(n_steps, per_step)


def _check_decays(optimizer: OptimizerConfig, n_steps: int, per_step: int, length: str) -> None:
    """Raise UserError if the warm-up and the learning-rate cycles do not fit into the run.

    The error message contains `length`, the run length as text.
    """
    cycles, name = optimizer.cycles, "optimizer.cycle_share"
    if cycles and optimizer.cycle_share * n_steps < 1:
        share = (10_000 // n_steps + 1) / 10_000  # just over one step
        most = min(cycles, int(0.5 / share))  # so that they take at most half of the run
        fix = {} if most == cycles else {"optimizer.cycles": most}
        fix |= {name: share} if most else {}
        message = f"a cycle would be shorter than one step; the run has {length}"
        raise UserError(message, name, optimizer.cycle_share, fix)
    end = optimizer.decay_ends(n_steps)[0]
    if optimizer.n_warmup_steps(per_step) >= end:
        name, message = "optimizer.warmup_steps", f"must be less than the run length, {length}"
        message += f", without the {n_steps - end:,} steps in cycles" if cycles else ""
        if (tokens := optimizer.warmup_tokens) is not None:
            name = "optimizer.warmup_tokens"
            raise UserError(message, name, tokens, {name: end // 10 * per_step})
        raise UserError(message, name, optimizer.warmup_steps, {name: end // 10})
