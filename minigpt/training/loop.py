"""Train a model with a `TrainConfig`, and record the run in a folder.

The config, the budget and the data are checked, in this order, before the run folder is created.
After that, the folder records the run, whether the run finishes or fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import signal
import subprocess
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed
import yaml
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from minigpt.core.console import log, log_file
from minigpt.core.distributed import (
    Launcher,
    forget_stale_launcher,
    global_rank,
    may_start_processes,
    step_name,
)
from minigpt.core.files import write_text
from minigpt.core.hardware import (
    Hardware,
    has_cpp_compiler,
    matmul_peak,
    set_threads,
)
from minigpt.core.process import is_tuned, preserved_process
from minigpt.core.settings import ModelClassError, UserError, build, next_step, plain
from minigpt.core.signals import watch
from minigpt.core.text import human_count
from minigpt.data.datamodule import DataModule
from minigpt.data.spool import spool_stories
from minigpt.kernels.choice import kernels_for
from minigpt.kernels.cuda_graph import graphed_loss
from minigpt.kernels.decode import is_plain
from minigpt.kernels.distillation import Distillation
from minigpt.kernels.microbatch import microbatched_loss
from minigpt.model import GPT, Kernels
from minigpt.runs.folder import ModelFactory, Run, class_path, config_class, new_run_folder
from minigpt.runs.names import CHECKPOINTS, CONFIG, METRICS, REPORT, TOKENIZER
from minigpt.runs.provenance import source_commit, total_tokens
from minigpt.runs.records import read_summary
from minigpt.training.callbacks import (
    ModelUpload,
    RunReport,
    StorySamples,
    Throughput,
    TrainingProgress,
)
from minigpt.training.checkpointing import Checkpoints, full_disk_in_one_line
from minigpt.training.config import Schedule, TrainConfig, TrainerConfig, settings_of
from minigpt.training.cycles import CycleMean
from minigpt.training.loggers import MetricsCsv, check_logger, extra_loggers, finish_wandb
from minigpt.training.module import GPTModule
from minigpt.training.profiling import PROFILE, Profile
from minigpt.training.resume import AUTO, ResumeState, folder_to_resume, run_lock
from minigpt.training.snapshots import Snapshots
from minigpt.training.teacher import Teachers


def train(
    config: TrainConfig,
    model: ModelFactory | None = None,
    callbacks: Sequence[Callback] = (),
    stories: Iterable[str] | None = None,
    valid_stories: Iterable[str] | None = None,
    teacher: ModelFactory | None = None,
) -> Run:
    """Train a model, or continue the run in `config.resume`, and return the run.

    At the end, the state of the process is restored: warnings, logging, signal handlers, matmul
    precision, threads, random states and environment variables.

    Args:
        config: all settings, such as the result of `load_config`.
        model: class derived from `GPT`, or function that maps a config to a model; None means
            `GPT`.
        callbacks: Lightning callbacks, called after Mini GPT's own callbacks.
        stories: training stories, which replace the stories of `config.data`.
        valid_stories: validation stories; None holds out the fraction `config.data.holdout` at the
            end of `stories`.
        teacher: class of the teachers in `config.teacher`, derived from `GPT`, or function that
            maps a config to a teacher; None means `GPT`.

    Returns:
        The run, with its best checkpoint selected.

    Raises:
        UserError: the settings or the data are invalid or contradict each other, the loss
            diverged, the disk is full, or another process trains this run.
    """
    with preserved_process():
        forget_stale_launcher()
        rank_zero: Any = rank_zero_only
        rank_zero.rank = global_rank()  # Lightning reads other variables too
        config = _with_classes(config, model, teacher)
        if stories is not None:
            data = spool_stories(config.data, stories, valid_stories)
            config = dataclasses.replace(config, data=data)
        elif valid_stories is not None:
            raise UserError("must be given together with stories", "valid_stories")
        return Run.load(_train(config, model, teacher, callbacks), model)


def _train(
    config: TrainConfig, model: ModelFactory | None, teacher: ModelFactory | None,
    callbacks: Sequence[Callback],
) -> Path:  # fmt: skip
    """Check everything, create the run folder and train; return the folder."""
    if config.name is None and (step := step_name()) is not None:  # under srun
        config = dataclasses.replace(config, name=f"{config.size}-{step}")
    lock = run_lock if global_rank() == 0 else contextlib.nullcontext  # held until the run ends
    with contextlib.ExitStack() as stack:
        if (folder := folder_to_resume(config)) is not None:
            stack.enter_context(lock(folder))
        start = ResumeState.from_config(config, folder, model, teacher)
        config = start.config
        hardware = _hardware(config.trainer)
        set_threads(config.trainer.threads, hardware)
        kernels = kernels_for(hardware.accelerator, config.trainer.kernels)
        schedule = Schedule.from_config(config, hardware.world_size)
        if folder is not None and start.step >= schedule.n_steps and not start.validates:
            log.info("%s is already complete (%d steps)", folder, start.step)
            return folder
        check_logger(config.logger)
        _check_upload(config, callbacks)
        _prepare_libraries(config.seed)
        data = start.prepared_data(schedule)
        start = start.with_vocabulary(data.tokenizer)
        config = start.config
        module = start.module(schedule, data, model)
        if not is_plain(module.net):
            config = dataclasses.replace(config, model_class=class_path(model or GPT))
        if folder is None:
            parent = Path(config.runs_dir)
            assert config.size is not None
            folder = new_run_folder(parent, config.name, config.size, config.resume == AUTO)
            stack.enter_context(lock(folder))
        stack.enter_context(full_disk_in_one_line(folder))
        training = _Training(folder, config, start, hardware, schedule, data, module)
        if global_rank() == 0:
            stack.enter_context(log_file(folder / "train.log"))
            if start.checkpoint is None:
                training.write_inputs()
            start.clear(folder)
        training.describe(kernels)
        trainer = training.trainer(callbacks)
        _speed_up(module, kernels, hardware, config, start.teachers)
        _fit(trainer, module, data, start.checkpoint, config)
        log.info("report: %s", folder / REPORT)
        log.info("next:   %s", next_step("evaluate", ckpt=str(folder), **_class_setting(config)))
    return folder


def _check_upload(config: TrainConfig, callbacks: Sequence[Callback]) -> None:
    """Raise UserError if the model must be uploaded and no callback does so."""
    if config.logger.log_model and not any(isinstance(c, ModelUpload) for c in callbacks):
        problem = (
            "needs a callback that uploads: add minigpt.exporting.wandb.WandbModel() to callbacks"
        )
        raise UserError(problem, "logger.log_model", True, {"logger.log_model": False})


def _with_classes(
    config: TrainConfig, model: ModelFactory | None, teacher: ModelFactory | None
) -> TrainConfig:
    """Return `config` with the classes of model and teachers.

    `config.model` is converted to the config class of `model`.
    """
    if model is None and config.model_class is not None:
        raise ModelClassError("the config is for a model class other than GPT", config.model_class)
    if teacher is not None:
        taught = dataclasses.replace(config.teacher, class_path=class_path(teacher))
        config = dataclasses.replace(config, teacher=taught)
    shape = config_class(model or GPT)
    if type(config.model) is not shape:
        values = dataclasses.asdict(config.model)
        config = dataclasses.replace(config, model=build(shape, values, "model"))
    return config


def _hardware(c: TrainerConfig) -> Hardware:
    """Return the device, the number of processes and the precision of the run.

    Raises:
        UserError: the hardware is not available, or this process may not start other processes.
    """
    try:
        hardware = Hardware.detect(c.accelerator, c.devices, c.num_nodes, c.precision)
    except UserError as error:
        raise error.within("trainer") from None
    if hardware.accelerator == "mps" and c.strategy != "auto":
        message = "needs several devices, and a Mac has one GPU; CPU processes can train instead"
        raise UserError(message, "trainer.strategy", c.strategy, {"trainer.accelerator": "cpu"})
    if c.compile and hardware.accelerator == "cpu" and not has_cpp_compiler():
        message = "torch.compile needs a C++ compiler, such as g++"
        raise UserError(message, "trainer.compile", True, {"trainer.compile": False})
    if hardware.world_size > 1 and not may_start_processes():
        message = "only the command line, torchrun or srun can train on several devices"
        raise UserError(message, "trainer.devices", hardware.devices, {"trainer.devices": "1"})
    return hardware


def _speed_up(
    module: GPTModule, kernels: Kernels, hardware: Hardware, config: TrainConfig,
    teachers: Teachers | None,
) -> None:  # fmt: skip
    """Set the losses of `module`: with `kernels`, and compiled, recorded or micro-batched."""
    model, c = module.net.use(kernels), config.trainer
    if teachers is not None:
        module.teachers = [teacher.use(kernels) for teacher in teachers.models]
        settings = config.teacher.weight, config.teacher.temperature, hardware.fast_dtype
        module.distillation = Distillation(model, module.teachers, *settings)
    if kernels.name == "cpu" and not is_tuned():
        log.info("memory     minigpt.tune_process() makes training on this CPU faster")
    if c.compile:  # only the loss: compiling the whole model would rename its weights
        module.fast_loss = torch.compile(model.loss)
        module.distillation = module.distillation and torch.compile(module.distillation)
    if _records_graphs(module, hardware, c):
        whole = model.loss  # for validation, whose batches may have two shapes
        module.fast_loss = graphed_loss(model, module.fast_loss or whole, whole)
        if (distillation := module.distillation) is not None:
            module.distillation = graphed_loss(model, distillation, distillation)
    elif (
        not c.compile and kernels.name == "cpu" and c.strategy != "fsdp"
    ):  # fsdp gathers weights for a single pass
        module.fast_loss = microbatched_loss(model)
        if module.distillation is not None:
            module.distillation = microbatched_loss(model, loss=module.distillation)


def _records_graphs(module: GPTModule, hardware: Hardware, c: TrainerConfig) -> bool:
    """Return whether the training loss is replayed as a CUDA graph."""
    # A recording would repeat the random numbers of dropout and the loss scale of 16-mixed, and
    # what the Python code of a custom class did in the first step.
    repeatable = is_plain(module.net) and not module.net.config.dropout
    plain = repeatable and hardware.precision != "16-mixed" and c.strategy != "fsdp"
    return c.cuda_graph and hardware.accelerator == "cuda" and plain


def _class_setting(config: TrainConfig) -> dict[str, str]:
    """Return the setting that names a custom model class; {} for GPT."""
    return {} if config.model_class is None else {"class_path": config.model_class}


def _tokens_seen(number: int | None) -> str:
    """Return the number of tokens that a model was trained on, for the log."""
    return "an unknown number of" if number is None else human_count(number)


@dataclasses.dataclass(frozen=True)
class _Training:
    """A run that is about to start: its folder, settings and parts, which are already checked."""

    folder: Path
    config: TrainConfig
    start: ResumeState
    hardware: Hardware
    schedule: Schedule
    data: DataModule
    module: GPTModule

    def write_inputs(self) -> None:
        """Write config.yaml and tokenizer.json; evaluation needs both files and a checkpoint."""
        values = settings_of(dataclasses.replace(self.config, name=self.folder.name))
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        write_text(self.folder / CONFIG, text)
        self.data.tokenizer.save(self.folder / TOKENIZER)

    def describe(self, kernels: Kernels) -> None:
        """Log the main settings of the run, so that the user can notice a wrong setting early."""
        config, data, schedule, hardware = self.config, self.data, self.schedule, self.hardware
        valid, parent = data.valid, self.start.parent
        n_windows = -(-(valid.n_tokens - 1) // config.model.context_length)
        n_batches = -(-n_windows // (config.data.windows_per_batch * hardware.world_size))
        epochs = schedule.n_steps * schedule.tokens_per_step / data.train.n_tokens
        lrs = ", ".join(f"peak {name} {lr:.2e}" for name, lr in self.module.peak_lrs.items())
        lines = {
            "run": str(self.folder),
            "model": f"{config.size}, {self.module.net.n_parameters:,} parameters",
            "data": f"{config.data.source}: {data.train.n_tokens:,} training and "
            f"{valid.n_tokens:,} validation tokens, {valid.bytes_per_token:.2f} bytes each",
            "validation": f"{n_windows:,} windows in {n_batches:,} batches, up to "
            f"{config.trainer.n_validations} times",
            "budget": f"{human_count(config.budget.tokens)} tokens = {schedule.n_steps:,} steps of "
            f"{schedule.tokens_per_step:,}, {epochs:.1f} epochs",
            "optimizer": f"{config.optimizer.name}, {lrs}, "
            f"{config.optimizer.n_warmup_steps(schedule.tokens_per_step)} warm-up steps",
            "device": f"{hardware.accelerator} ×{hardware.world_size}, "
            f"{torch.get_num_threads()} CPU thread(s) each",
            "precision": f"{hardware.precision}: {hardware.why}",
            "kernels": kernels.name,
        }
        if cycles := config.optimizer.cycles:
            ends = ", ".join(map(str, config.optimizer.decay_ends(schedule.n_steps)))
            lines["cycles"] = f"{cycles}; the final weights are the mean of those at steps {ends}"
        if prompts := config.callbacks.prompts:
            quoted = ", ".join(json.dumps(prompt, ensure_ascii=False) for prompt in prompts)
            lines["stories"] = f"{len(prompts)} prompt{'s' if len(prompts) > 1 else ''}: {quoted}"
        if parent is not None:
            seen = _tokens_seen(parent.tokens)
            lines["weights"] = f"from {parent.name}, trained on {seen} tokens, with its tokenizer"
        if (teachers := self.start.teachers) is not None:
            names, c = ", ".join(record.name for record in teachers.records), config.teacher
            seen = _tokens_seen(total_tokens(teachers.records))
            settings = f"weight {c.weight:g}, temperature {c.temperature:g}"
            lines["teachers"] = f"{names}, trained on {seen} tokens: {settings}"
        for key, text in lines.items():
            log.info("%-10s %s", key, text)
        size, limit = data.tokenizer.vocab_size, config.data.vocab_size
        if parent is None and self.start.tokenizer is None and size < limit:
            sizes = f"{size:,} tokens, fewer than data.vocab_size={limit:,}"
            rows = f"the model's vocabulary has {config.model.vocab_size:,}"
            log.warning("the training stories yield a vocabulary of %s; %s", sizes, rows)

    def trainer(self, callbacks: Sequence[Callback]) -> L.Trainer:
        """Return the Lightning Trainer with Mini GPT's callbacks and loggers, then `callbacks`."""
        folder, config, hardware = self.folder, self.config, self.hardware
        module, c, keep = self.module, config.trainer, config.callbacks
        cache_dir, start_step = Path(config.data.cache_dir), self.start.step

        def peak(again: bool) -> float:
            return matmul_peak(hardware, cache_dir, again) * hardware.world_size

        throughput = Throughput(module, c.log_every_n_steps, peak)
        log.info(
            "%-10s %s", "peak", f"{throughput.peak_flops:.3g} FLOP/s, which mfu is relative to"
        )
        validates = self.start.validates
        checkpoints = Checkpoints(module, folder, keep, validates)
        # At the last step, snapshots and checkpoints contain the mean.
        weights: list[Callback] = [CycleMean(module)] if config.optimizer.cycles else []
        weights += [Snapshots(module, folder, keep.snapshots)] if keep.snapshots else []
        profiles = [Profile(module, folder / PROFILE)] if c.profile else []
        facts = self._facts()
        metrics = MetricsCsv(folder / METRICS, start_step or None, validates)
        loggers = [metrics, *extra_loggers(folder, config.logger)]
        strategy: Strategy | str = c.strategy
        if strategy == "fsdp":  # FSDP2; `GPTModule` shards its model, checkpoints are single files
            sizes = hardware.world_size, 1  # sizes of data and tensor parallelism
            strategy = ModelParallelStrategy(*sizes, save_distributed_checkpoint=False)
        launcher = Launcher.detect()
        # Under srun, `Checkpoints` queues the job again, so Lightning must not.
        environment = {
            None: LightningEnvironment,
            "torchrun": TorchElasticEnvironment,
            "srun": partial(SLURMEnvironment, auto_requeue=False),
        }[launcher and launcher.name]()
        accumulate, n_steps = c.accumulate_grad_batches, self.schedule.n_steps
        trainer = L.Trainer(
            accelerator=hardware.accelerator,
            devices=hardware.devices,
            num_nodes=hardware.num_nodes,
            strategy=strategy,
            precision=hardware.precision,  # type: ignore[arg-type]
            max_steps=n_steps + validates,  # Lightning would skip a validation after the last step
            accumulate_grad_batches=accumulate,
            # In batches, because a run is one pass of the loader. Validation saves a checkpoint, so
            # it must come after a whole step.
            val_check_interval=accumulate * math.ceil(n_steps / c.n_validations),
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=c.log_every_n_steps,
            logger=loggers,
            callbacks=[
                throughput,
                TrainingProgress(module, keep.progress_bar, throughput),
                StorySamples(
                    module, folder, self.data.tokenizer, keep, config.seed, start_step - validates
                ),
                *weights,
                checkpoints,
                RunReport(module, folder, facts, throughput, checkpoints),
                *profiles,
                *callbacks,
            ],
            default_root_dir=folder,
            enable_checkpointing=False,  # ours are among the callbacks
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,  # the data module distributes the windows itself
            plugins=[checkpoints.files, environment],
        )
        for logger in loggers:  # opens the W&B run, which `_fit` closes
            shape = dataclasses.asdict(config.model)  # `model` is the name of the size
            logger.log_hyperparams({**plain(config), "shape": shape, **facts})
        return trainer

    def _facts(self) -> dict[str, Any]:
        """Return the entries of the summary that are known before the run starts."""
        model, hardware, commits = self.module.net, self.hardware, source_commit()
        with contextlib.suppress(UserError):  # a broken summary is replaced
            earlier = read_summary(self.folder).get("commit")
            if isinstance(earlier, str):  # commits of earlier parts of the run
                commits = ", ".join(dict.fromkeys([*earlier.split(", "), commits]))
        parent, teachers = self.start.parent, self.start.teachers
        return {
            "model": self.config.size,
            "parameters": model.n_parameters,
            "non_embedding_parameters": model.n_parameters - model.n_embedding_parameters,
            "flops_per_token": model.flops_per_token(),
            "train_stories": self.data.train.n_stories,
            "train_tokens": self.data.train.n_tokens,  # in the training split
            "seed": self.config.seed,
            "device": hardware.accelerator,
            "devices": hardware.devices,  # on each node
            "num_nodes": hardware.num_nodes,
            "precision": hardware.precision,
            **({"init_from": dataclasses.asdict(parent)} if parent else {}),
            **({"teachers": plain(list(teachers.records))} if teachers else {}),
            "commit": commits,
        }


def _fit(
    trainer: L.Trainer, module: GPTModule, data: DataModule, checkpoint: Path | None,
    config: TrainConfig,
) -> None:  # fmt: skip
    """Train, then close the W&B run, if there is one, with exit code 0 or 1."""
    status, folder = 1, Path(trainer.default_root_dir)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        status = 0
    except torch.OutOfMemoryError:
        windows, accumulate = config.data.windows_per_batch, config.trainer.accumulate_grad_batches
        fix = {"data.batch_size": windows // 2, "trainer.accumulate_grad_batches": 2 * accumulate}
        problem = "the GPU does not have enough memory for this number of windows at a time: "
        problem += "reduce it, and raise trainer.accumulate_grad_batches"
        fix = fix if windows % 2 == 0 else None  # an odd batch has no half
        raise UserError(problem, "data.batch_size", windows, fix) from None
    except SystemExit as leaving:  # from `Checkpoints`, or 1 from Lightning at KeyboardInterrupt
        if (folder / CHECKPOINTS).is_dir():
            more = {f"model.{key}": value for key, value in _class_setting(config).items()}
            if (name := config.teacher.class_path) is not None:
                more["teacher.class_path"] = name
            log.info("continue:  %s", next_step("train", resume=str(folder), **more))
        if leaving.code in (1, 128 + signal.SIGINT):
            raise KeyboardInterrupt from None
        raise SystemExit(leaving.code or 128 + signal.SIGTERM) from None
    finally:
        finish_wandb(trainer.loggers, status)
        _end_processes(trainer, finished=status == 0)
        watch.patient = False  # `Checkpoints` has set it


def _end_processes(trainer: L.Trainer, finished: bool) -> None:
    """End the processes that Lightning started, so that the next job of a multirun can start."""
    if global_rank() > 0 or Launcher.detect() is not None:
        return
    started: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for process in started:
        if not finished:  # the process may wait in a collective operation forever
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2.0)  # it may be about to print why it failed
            process.kill()
        process.wait()
    started.clear()  # Lightning watches this list and would kill this process if one failed
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK"):
        os.environ.pop(name, None)


def _prepare_libraries(seed: int) -> None:
    """Seed the libraries, allow tf32, and silence messages that do not apply here."""
    L.seed_everything(seed, verbose=False)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # tf32
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Workers are not needed, because loading a batch takes microseconds.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # Lightning cannot know that our sampler starts at the step of the checkpoint.
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
    # Validation metrics are equal on every device, because torchmetrics has gathered them.
    warnings.filterwarnings("ignore", ".*sync_dist=True.* when logging on epoch level")
    warnings.filterwarnings("ignore", "The `srun` command is available")  # `Launcher` checks
    warnings.filterwarnings("ignore", ".*LeafSpec.*deprecated.*")  # Lightning 2.6 on torch 2.13
