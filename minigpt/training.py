"""What train.py runs: a composed config in, a trained run folder out.

Everything is checked before the run folder is made: every section of the config, then the budget,
then the data. From there on the folder tells how the run went, however it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from minigpt.callbacks import (
    CallbacksConfig,
    Checkpoints,
    RunReport,
    StorySamples,
    Throughput,
    TrainingProgress,
)
from minigpt.config import UserError, build
from minigpt.data import DataConfig, DataModule
from minigpt.fast import accelerate
from minigpt.hardware import Hardware, keep_freed_memory
from minigpt.loggers import LoggerConfig, MetricsCsv, extra_loggers
from minigpt.model import GPTConfig
from minigpt.module import GPTModule, OptimizerConfig
from minigpt.records import human_count
from minigpt.report import write_report
from minigpt.runs import (
    CHECKPOINTS,
    CONFIG,
    LAST,
    METRICS,
    REPORT,
    TOKENIZER,
    Run,
    read_checkpoint,
    write_text,
)

log = logging.getLogger("minigpt")
RUN_FOLDER_VARIABLE = "MINIGPT_RUN_FOLDER"  # rank 0 tells the ranks it launches


@dataclass(frozen=True)
class TrainerConfig:
    """Where and how precisely a run computes, and how often it validates and logs."""

    accelerator: str = "auto"
    devices: str = "auto"  # a number, or auto: one CPU process, or every GPU
    num_nodes: int = 1
    strategy: str = "auto"
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"] = "auto"
    accumulate_grad_batches: int = 1
    n_validations: int = 5
    log_every_n_steps: int = 10
    compile: bool = False
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
    seed: int = 1
    size: str = "gpt"  # what the model config is called: small, medium, large

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} must not be negative")
        if self.name is not None and Path(self.name).name != self.name:
            raise ValueError(f"name {self.name!r} is a folder's name under runs_dir, not a path")


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


def train(config: DictConfig, size: str = "gpt", group: Path | None = None) -> Path:
    """Run one training job, or go on with one; returns its run folder.

    Args:
        config: composed from conf/train.yaml. With `resume` in it, the run's own settings are used.
        size: what the model config is called: small, medium, large.
        group: folder for the run folder instead of `runs_dir` (the jobs of a Hydra multirun).

    Raises:
        UserError: a setting, the data, or both together are not right; or the loss diverged.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True)
    job = build(Job, {**plain, "size": size}, "")
    checkpoint, start_step = None, 0
    if job.resume is not None:
        run = Run.open(job.resume)
        checkpoint = run.folder / CHECKPOINTS / f"{LAST}.ckpt"
        start_step = read_checkpoint(checkpoint)["global_step"]
        job = build(Job, run.config(), "")
    c = job.trainer
    hardware = Hardware.find(c.accelerator, c.devices, c.num_nodes, c.precision)
    plan = Plan.of(job, hardware.world_size)
    if start_step >= plan.n_steps:
        raise UserError(
            f"{job.resume or job.name} has made all of its {plan.n_steps:,} steps: train a new run "
            "with a larger budget.tokens"
        )
    _prepare_libraries(job.seed)
    data = _data(job, plan, start_step)
    module = GPTModule(
        job.model, job.optimizer, plan.n_steps, plan.tokens_per_step, data.valid.bytes_per_token
    )
    folder = checkpoint.parent.parent if checkpoint else _new_folder(job, group)
    with _log_file(folder / "train.log"):
        if checkpoint is None:
            _write_inputs(folder, job, data)
        _describe(folder, job, plan, hardware, module, data)
        trainer = _trainer(folder, job, plan, hardware, module, data, start_step)
        if hardware.accelerator == "cpu":
            keep_freed_memory()
            accelerate(module.net)
        if c.compile:
            module.net.compile()  # the net and not the module: the names of its weights stay
        _fit(trainer, module, data, checkpoint)
        log.info("report: %s", folder / REPORT)
        log.info("next:   python evaluate.py ckpt=%s", folder)
    return folder


def _data(job: Job, plan: Plan, start_step: int) -> DataModule:
    """The data of the job, prepared; on one process before any other is started."""
    accumulate = job.trainer.accumulate_grad_batches
    data = DataModule(
        job.data,
        job.model.context_length,
        n_steps=plan.n_steps * accumulate,
        seed=job.seed,
        start_step=start_step * accumulate,
    )
    data.prepare_data()
    data.setup("fit")
    if data.tokenizer.vocab_size > job.model.vocab_size:
        raise UserError(
            f"model.vocab_size={job.model.vocab_size} is less than the {data.tokenizer.vocab_size} "
            "tokens of the tokenizer: leave it out, it follows data.vocab_size"
        )
    return data


def _new_folder(job: Job, group: Path | None) -> Path:
    """A folder no other run has, made now: two runs never share one.

    Ranks that Lightning starts later are told by the environment which one it is.
    """
    told = os.environ.get(RUN_FOLDER_VARIABLE)
    if told and int(os.environ.get("LOCAL_RANK", 0)) > 0:
        return Path(told)
    parent = group or Path(job.runs_dir)
    parent.mkdir(parents=True, exist_ok=True)
    base = job.name or f"{job.size}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in range(1, 1000):
        folder = parent / (base if attempt == 1 else f"{base}-{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:
            if job.name is not None:
                raise UserError(
                    f"{folder} exists: go on with it by resume={folder}, or take another name=..."
                ) from None
            continue
        os.environ[RUN_FOLDER_VARIABLE] = str(folder)
        return folder
    raise UserError(f"{parent} holds a thousand runs of this second: give a name=...")


def _write_inputs(folder: Path, job: Job, data: DataModule) -> None:
    """config.yaml and tokenizer.json: with a checkpoint, all that evaluation needs."""
    settings = dataclasses.asdict(dataclasses.replace(job, name=folder.name))
    plain = yaml.safe_dump(_lists(settings), sort_keys=False, allow_unicode=True)
    write_text(folder / CONFIG, plain)
    data.tokenizer.save(folder / TOKENIZER)


def _lists(value: Any) -> Any:
    """`value` with tuples as lists, which YAML knows."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _describe(
    folder: Path, job: Job, plan: Plan, hardware: Hardware, module: GPTModule, data: DataModule
) -> None:
    """Say what is about to happen, so that a wrong setting is seen before it costs an hour."""
    epochs = plan.n_steps * plan.tokens_per_step / data.train.n_tokens
    lines = {
        "run": str(folder),
        "model": f"{job.size}, {module.net.n_parameters:,} parameters",
        "data": f"{job.data.source}: {data.train.n_tokens:,} training and "
        f"{data.valid.n_tokens:,} validation tokens, {data.valid.bytes_per_token:.2f} bytes each",
        "budget": f"{human_count(job.budget.tokens)} tokens = {plan.n_steps:,} steps of "
        f"{plan.tokens_per_step:,}, {epochs:.1f} times the training split",
        "optimizer": f"AdamW, learning rate {module.peak_lr:.2e} after {job.optimizer.warmup_steps}"
        " steps of warm-up",
        "device": f"{hardware.accelerator} ×{hardware.world_size}",
        "precision": f"{hardware.precision}: {hardware.why}",
    }
    for key, text in lines.items():
        log.info("%-10s %s", key, text)
    if data.tokenizer.vocab_size < job.data.vocab_size:
        log.warning(
            "the training stories give a vocabulary of %s tokens, fewer than data.vocab_size=%s",
            f"{data.tokenizer.vocab_size:,}", f"{job.data.vocab_size:,}",
        )  # fmt: skip


def _trainer(
    folder: Path,
    job: Job,
    plan: Plan,
    hardware: Hardware,
    module: GPTModule,
    data: DataModule,
    start_step: int,
) -> L.Trainer:
    """The Lightning Trainer with our callbacks and loggers."""
    throughput = Throughput(job.trainer.log_every_n_steps)
    checkpoints = Checkpoints(folder, job.callbacks.checkpoint_minutes)
    facts = {
        "model": job.size,
        "parameters": module.net.n_parameters,
        "non_embedding_parameters": module.net.n_parameters - module.net.n_embedding_parameters,
        "seed": job.seed,
        "device": hardware.accelerator,
        "precision": hardware.precision,
    }
    n_batches = plan.n_steps * job.trainer.accumulate_grad_batches
    metrics = MetricsCsv(folder / METRICS, start_step or None)
    loggers = [metrics, *extra_loggers(folder, job.logger)]
    trainer = L.Trainer(
        accelerator=hardware.accelerator,
        devices=hardware.devices,
        num_nodes=hardware.num_nodes,
        strategy=job.trainer.strategy,
        precision=hardware.precision,  # type: ignore[arg-type]
        max_steps=plan.n_steps,
        max_epochs=-1,
        accumulate_grad_batches=job.trainer.accumulate_grad_batches,
        # The whole run is one pass of the loader, so validation is counted in its batches.
        val_check_interval=math.ceil(n_batches / job.trainer.n_validations),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=job.trainer.log_every_n_steps,
        logger=loggers,
        callbacks=[
            throughput,
            TrainingProgress(job.callbacks.progress_bar),
            StorySamples(folder, data.tokenizer, job.callbacks, job.seed, start_step),
            checkpoints,
            RunReport(folder, facts, throughput, checkpoints, write_report),
        ],
        default_root_dir=folder,
        enable_checkpointing=False,  # ours are among the callbacks
        enable_model_summary=False,
        use_distributed_sampler=False,  # the data module deals out the windows itself
    )
    for logger in loggers:  # this opens the W&B run, which `_fit` closes
        shape = dataclasses.asdict(job.model)  # beside `model`, which is the size's name
        logger.log_hyperparams({**dataclasses.asdict(job), "shape": shape, **facts})
    return trainer


def _fit(trainer: L.Trainer, module: GPTModule, data: DataModule, checkpoint: Path | None) -> None:
    """Train; and close the W&B run of this job with the exit code that tells how it went."""
    status = 1
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        status = 0
    except SystemExit:  # Lightning's answer to ctrl-C, after our callbacks have saved
        log.info("go on with: python train.py resume=%s", trainer.default_root_dir)
        raise KeyboardInterrupt from None
    finally:
        if any(type(logger).__name__ == "WandbLogger" for logger in trainer.loggers):
            import wandb

            wandb.finish(exit_code=status)


def _prepare_libraries(seed: int) -> None:
    """Seed them, allow tf32, and leave out what Lightning says of itself: `_describe` says more."""
    L.seed_everything(seed, verbose=False)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # tf32
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # a gather of microseconds
    # It cannot know that our sampler starts at the step the checkpoint was written at.
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*deprecated.*")  # Lightning 2.6 on torch 2.13


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Also write what the log says to `path`."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
