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
import signal
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed
import yaml
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from minigpt.core.distributed import Launcher, global_rank, step_name
from minigpt.core.files import write_text
from minigpt.core.hardware import PEAK_FILE, Hardware, keep_freed_memory, matmul_peak
from minigpt.core.settings import UserError, build
from minigpt.core.text import human_count
from minigpt.data.datamodule import DataModule
from minigpt.kernels.choice import kernels_for
from minigpt.kernels.microbatch import microbatched_loss
from minigpt.model import Kernels
from minigpt.runs.folder import (
    CONFIG,
    METRICS,
    REPORT,
    TOKENIZER,
    last_checkpoints,
    new_run_folder,
)
from minigpt.runs.provenance import Origin, source_commit
from minigpt.runs.records import read_summary
from minigpt.training.callbacks import (
    RunReport,
    StorySamples,
    Throughput,
    TrainingProgress,
)
from minigpt.training.checkpointing import CheckpointFiles, Checkpoints, full_disk_in_one_line
from minigpt.training.config import Job, Plan, TrainerConfig
from minigpt.training.loggers import (
    MetricsCsv,
    check_logger,
    extra_loggers,
    finish_wandb,
)
from minigpt.training.module import GPTModule
from minigpt.training.report import write_report
from minigpt.training.resume import (
    AUTO,
    Start,
    alone_in,
    folder_to_resume,
    settings,
)

log = logging.getLogger("minigpt")


def train(config: DictConfig, size: str = "gpt") -> Path:
    """Run one training job, or go on with one; returns its run folder.

    Args:
        config: composed from conf/train.yaml. With `resume` in it, the run's own settings are used.
        size: what the model config is called: small, medium, large.

    Raises:
        UserError: a setting, the data, or both together are not right; the loss diverged; or
            another process trains this run.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True)
    job = build(Job, {**plain, "size": size}, "")
    if job.name is None and (step := step_name()) is not None:  # under srun
        job = dataclasses.replace(job, name=f"{size}-{step}")
    parent = Path(job.runs_dir)
    with contextlib.ExitStack() as stack:
        folder = folder_to_resume(job, parent)
        if folder is not None:
            stack.enter_context(alone_in(folder))
        start = Start.of(job, folder)
        job = start.job
        c = job.trainer
        hardware = Hardware.find(c.accelerator, c.devices, c.num_nodes, c.precision)
        _check_strategy(c.strategy, hardware)
        kernels = kernels_for(hardware.accelerator, c.kernels)
        plan = Plan.of(job, hardware.world_size)
        if folder is not None and start.step >= plan.n_steps:
            log.info("%s has made all of its %d steps: nothing is left to do", folder, start.step)
            return folder
        check_logger(job.logger)
        _prepare_libraries(job.seed)
        data = _data(job, plan, start)
        module = _module(job, plan, data, start)
        start.check_the_same(module)
        if folder is None:
            folder = new_run_folder(parent, job.name, job.size, exist_ok=job.resume == AUTO)
            stack.enter_context(alone_in(folder))
        stack.enter_context(full_disk_in_one_line(folder))
        stack.enter_context(_log_file(folder / "train.log"))
        if start.checkpoint is None and global_rank() == 0:
            _write_inputs(folder, job, data)
        start.clear(folder)
        _describe(folder, job, plan, hardware, module, data, start.origin, kernels)
        trainer = _trainer(folder, job, plan, hardware, module, data, start.step)
        _speed_up(module, kernels, c)
        _fit(trainer, module, data, start.checkpoint)
        log.info("report: %s", folder / REPORT)
        log.info("next:   python evaluate.py ckpt=%s", folder)
    return folder


def _module(job: Job, plan: Plan, data: DataModule, start: Start) -> GPTModule:
    made_of = {"tokenizer": data.tokenizer.fingerprint, "train_tokens": data.train.n_tokens}
    if start.origin is not None:
        made_of["init_from"] = dataclasses.asdict(start.origin)
    module = GPTModule(
        job.model,
        job.optimizer,
        plan.n_steps,
        plan.tokens_per_step,
        data.valid.bytes_per_token,
        made_of,
    )
    start.set_weights(module.net)
    return module


def _speed_up(module: GPTModule, kernels: Kernels, c: TrainerConfig) -> None:
    """Have the loss computed by `kernels`, compiled or in micro-batches where both can be."""
    net = module.net.use(kernels)
    if kernels.name == "cpu":
        keep_freed_memory()
    if c.compile:  # the loss and not the net: the names of its weights stay as they are
        module.fast_loss = torch.compile(net.loss)
    elif kernels.name == "cpu" and c.strategy != "fsdp":  # which gathers weights for one pass
        module.fast_loss = microbatched_loss(net)


def _data(job: Job, plan: Plan, start: Start) -> DataModule:
    """The data of the job, prepared; on one process before any other is started."""
    accumulate = job.trainer.accumulate_grad_batches
    data = DataModule(
        job.data,
        job.model.context_length,
        n_steps=plan.n_steps * accumulate,
        seed=job.seed,
        start_step=start.step * accumulate,
        given=start.tokenizer,
    )
    data.setup("fit")  # prepares them too; `prepare_data` before it would read them all once more
    if data.tokenizer.vocab_size > job.model.vocab_size:
        raise UserError(
            f"model.vocab_size={job.model.vocab_size} is less than the {data.tokenizer.vocab_size} "
            "tokens of the tokenizer: leave it out, it follows data.vocab_size"
        )
    return data


def _write_inputs(folder: Path, job: Job, data: DataModule) -> None:
    """config.yaml and tokenizer.json: with a checkpoint, all that evaluation needs."""
    plain = settings(dataclasses.replace(job, name=folder.name))
    write_text(folder / CONFIG, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    data.tokenizer.save(folder / TOKENIZER)


def _describe(
    folder: Path,
    job: Job,
    plan: Plan,
    hardware: Hardware,
    module: GPTModule,
    data: DataModule,
    origin: Origin | None,
    kernels: Kernels,
) -> None:
    """Say what is about to happen, so that a wrong setting is seen before it costs an hour."""
    epochs = plan.n_steps * plan.tokens_per_step / data.train.n_tokens
    peaks = ", ".join(f"{name} {peak:.2e}" for name, peak in module.peak_lrs.items())
    lines = {
        "run": str(folder),
        "model": f"{job.size}, {module.net.n_parameters:,} parameters",
        "data": f"{job.data.source}: {data.train.n_tokens:,} training and "
        f"{data.valid.n_tokens:,} validation tokens, {data.valid.bytes_per_token:.2f} bytes each",
        "budget": f"{human_count(job.budget.tokens)} tokens = {plan.n_steps:,} steps of "
        f"{plan.tokens_per_step:,}, {epochs:.1f} times the training split",
        "optimizer": f"{job.optimizer.name}, {peaks} after {job.optimizer.warmup_steps} steps of "
        "warm-up",
        "device": f"{hardware.accelerator} ×{hardware.world_size}",
        "precision": f"{hardware.precision}: {hardware.why}",
        "kernels": kernels.name,
    }
    if origin is not None:
        seen = "an unknown number of" if origin.tokens is None else human_count(origin.tokens)
        lines["weights"] = f"of {origin.name}, which have seen {seen} tokens; its tokenizer"
    for key, text in lines.items():
        log.info("%-10s %s", key, text)
    if job.init_from is None and data.tokenizer.vocab_size < job.data.vocab_size:
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
    cache_dir = Path(job.data.cache_dir)
    peak = matmul_peak(hardware, cache_dir) * hardware.world_size
    throughput = Throughput(job.trainer.log_every_n_steps, peak, cache_dir / PEAK_FILE)
    keep = job.callbacks
    files = CheckpointFiles(keep.keep_checkpoints)
    checkpoints = Checkpoints(folder, files, keep.checkpoint_minutes, keep.checkpoint_steps)
    facts = {
        "model": job.size,
        "parameters": module.net.n_parameters,
        "non_embedding_parameters": module.net.n_parameters - module.net.n_embedding_parameters,
        "flops_per_token": module.net.flops_per_token(),
        "train_tokens": data.train.n_tokens,  # of the split, so epochs are tokens / these
        "seed": job.seed,
        "device": hardware.accelerator,
        "devices": hardware.devices,  # of each node
        "num_nodes": hardware.num_nodes,
        "precision": hardware.precision,
        **{key: value for key, value in module.hparams.items() if key == "init_from"},
        "commit": ", ".join(
            dict.fromkeys([*_commits_before(folder), source_commit() or "unknown"])
        ),
    }
    accumulate = job.trainer.accumulate_grad_batches
    metrics = MetricsCsv(folder / METRICS, start_step or None)
    loggers = [metrics, *extra_loggers(folder, job.logger)]
    trainer = L.Trainer(
        accelerator=hardware.accelerator,
        devices=hardware.devices,
        num_nodes=hardware.num_nodes,
        strategy=_strategy(job.trainer.strategy, hardware),
        precision=hardware.precision,  # type: ignore[arg-type]
        max_steps=plan.n_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        # In batches, as the whole run is one pass of the loader; after whole steps, for it saves.
        val_check_interval=accumulate * math.ceil(plan.n_steps / job.trainer.n_validations),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=job.trainer.log_every_n_steps,
        logger=loggers,
        callbacks=[
            throughput,
            TrainingProgress(job.callbacks.progress_bar, throughput),
            StorySamples(folder, data.tokenizer, job.callbacks, job.seed, start_step),
            checkpoints,
            RunReport(folder, facts, throughput, checkpoints, write_report),
        ],
        default_root_dir=folder,
        enable_checkpointing=False,  # ours are among the callbacks
        enable_model_summary=False,
        use_distributed_sampler=False,  # the data module deals out the windows itself
        plugins=[files, *_environment()],
    )
    for logger in loggers:  # this opens the W&B run, which `_fit` closes
        shape = dataclasses.asdict(job.model)  # beside `model`, which is the size's name
        logger.log_hyperparams({**dataclasses.asdict(job), "shape": shape, **facts})
    return trainer


def _commits_before(folder: Path) -> list[str]:
    """Those by which earlier parts of the run were trained, as far as its summary tells."""
    before = None
    with contextlib.suppress(UserError):  # a broken summary is written anew
        before = read_summary(folder).get("commit")
    return before.split(", ") if isinstance(before, str) else []


def _check_strategy(name: str, hardware: Hardware) -> None:
    """UserError: several processes cannot share the GPU of a Mac."""
    if hardware.accelerator == "mps" and name != "auto":
        raise UserError(
            f"trainer.strategy={name} is for several devices, and a Mac has one GPU: leave it out, "
            "or add trainer.accelerator=cpu"
        )


def _strategy(name: str, hardware: Hardware) -> Strategy | str:
    """How the devices share the work. `fsdp` is FSDP2, on which `GPTModule` shards its net."""
    if name != "fsdp":
        return name
    return ModelParallelStrategy(
        data_parallel_size=hardware.world_size,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,  # one file, as evaluation reads it
    )


def _environment() -> list[SLURMEnvironment]:
    """Under srun: `Checkpoints` queues the job again, and Lightning must not."""
    launcher = Launcher.found()
    srun = launcher is not None and launcher.name == "srun"
    return [SLURMEnvironment(auto_requeue=False)] if srun else []


def _fit(trainer: L.Trainer, module: GPTModule, data: DataModule, checkpoint: Path | None) -> None:
    """Train; and close the W&B run of this job with the exit code that tells how it went."""
    status = 1
    folder = Path(trainer.default_root_dir)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        status = 0
    except SystemExit as leaving:  # Lightning's answer to ctrl-C and ours to other signals
        if last_checkpoints(folder):
            log.info("go on with: python train.py resume=%s", folder)
        if not isinstance(leaving, SIGTERMException):
            raise KeyboardInterrupt from None
        raise SystemExit(leaving.code or 128 + signal.SIGTERM) from None
    finally:
        finish_wandb(trainer.loggers, status)
        _end_processes(trainer, finished=status == 0)


def _end_processes(trainer: L.Trainer, finished: bool) -> None:
    """Leave no process that Lightning started, so that the next job of a multirun can start its."""
    if global_rank() > 0 or Launcher.found() is not None:
        return
    started: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for process in started:
        if not finished:  # it may wait for this one in a collective for ever
            process.kill()
        process.wait()
    started.clear()  # Lightning watches these, and would kill this process for one that failed
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK"):
        os.environ.pop(name, None)


def _prepare_libraries(seed: int) -> None:
    """Seed them, allow tf32, and leave out what Lightning says of itself: `_describe` says more."""
    L.seed_everything(seed, verbose=False)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # tf32
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # a gather of microseconds
    # It cannot know that our sampler starts at the step the checkpoint was written at.
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
    # The validation metrics are the same on every device: torchmetrics has gathered them.
    warnings.filterwarnings("ignore", ".*sync_dist=True.* when logging on epoch level")
    warnings.filterwarnings("ignore", "The `srun` command is available")  # `Launcher` checks
    warnings.filterwarnings("ignore", ".*LeafSpec.*deprecated.*")  # Lightning 2.6 on torch 2.13


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Also write what the log says to `path`; the first process alone."""
    if global_rank() > 0:
        yield
        return
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        with contextlib.suppress(OSError):  # what did not fit before does not fit now
            handler.close()


class _LogFile(logging.FileHandler):
    """On a full disk a line is left out: the terminal has it too."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass
