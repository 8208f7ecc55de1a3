"""Train a model with a `TrainConfig`, and record the run in a folder.

The config, the budget and the data are checked, in this order, before the run folder is created.
Once it exists, the folder records the run, whether the run finishes or fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback

from minigpt.core.console import log, log_file
from minigpt.core.distributed import (
    forget_stale_launcher,
    global_rank,
    may_start_processes,
    step_name,
)
from minigpt.core.gpu_memory import is_out_of_memory
from minigpt.core.hardware import Hardware, has_c_compiler, has_cpp_compiler, set_threads
from minigpt.core.process import preserved_process
from minigpt.core.settings import ModelClassError, UserError, build, next_step
from minigpt.core.signals import watch
from minigpt.data.datamodule import DataModule
from minigpt.data.spool import spool_stories
from minigpt.kernels.choice import Choice, is_plain, kernels_for
from minigpt.model import GPT, Kernels
from minigpt.runs.folder import (
    ModelFactory,
    Run,
    class_path,
    config_class,
    new_run_folder,
    read_config,
    same_class,
)
from minigpt.runs.names import CHECKPOINTS, REPORT, SUMMARY
from minigpt.training.assembly import Assembly, config_text, set_losses
from minigpt.training.callbacks import ModelUpload
from minigpt.training.checkpointing import full_disk_in_one_line
from minigpt.training.config import MAX_NAME_BYTES, Schedule, TrainConfig, TrainerConfig
from minigpt.training.loggers import check_logger, finish_wandb
from minigpt.training.module import GPTModule
from minigpt.training.processes import end_processes, own_launcher
from minigpt.training.report import write_report
from minigpt.training.resume import ResumeState
from minigpt.training.resume_settings import AUTO, folder_to_resume, run_lock


def train(
    config: TrainConfig,
    model: ModelFactory | None = None,
    callbacks: Sequence[Callback] = (),
    stories: Iterable[str] | None = None,
    valid_stories: Iterable[str] | None = None,
    teacher: ModelFactory | None = None,
) -> Run:
    """Train a model, or continue the run in `config.resume`, and return the run.

    At the end, the state of the process is restored, such as warnings, logging, signal handlers,
    matmul precision, threads, random states and environment variables.

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
            diverged, the disk is full, the GPU has too little memory, or another process trains
            this run.
    """
    with preserved_process(), contextlib.ExitStack() as stack:
        forget_stale_launcher()
        rank_zero: Any = rank_zero_only
        stack.callback(setattr, rank_zero, "rank", rank_zero.rank)
        rank_zero.rank = global_rank()  # Lightning would also read other variables
        config = _with_classes(config, model, teacher)
        if stories is not None and config.resume not in (None, AUTO):
            raise UserError("a resumed run keeps its own stories: leave this out", "stories")
        if stories is not None:
            data = spool_stories(config.data, stories, valid_stories)
            config = dataclasses.replace(config, data=data)
        elif valid_stories is not None:
            raise UserError("needs the argument stories too", "valid_stories")
        return Run.load(_train(config, model, teacher, callbacks), model)


def _train(
    config: TrainConfig, model: ModelFactory | None, teacher: ModelFactory | None,
    callbacks: Sequence[Callback],
) -> Path:  # fmt: skip
    """Check the settings and the data, start or continue the run, and return its folder.

    If the run in `config.resume` is already complete, nothing is trained.
    """
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
        kernels = _kernels(hardware, config.trainer.kernels)
        schedule = Schedule.from_config(config, hardware.world_size)
        if folder is not None and start.step >= schedule.n_steps and not start.validates:
            if start.is_complete:
                log.info("%s is already complete (%d steps)", folder, start.step)
                if global_rank() == 0 and _lacks_report(folder):
                    write_report(folder)
                return folder
            # The end of the run was interrupted: validate again, and write the missing report.
            start = dataclasses.replace(start, validates=True)
        check_logger(config.logger)
        _check_upload(config, callbacks)
        _prepare_libraries(config.seed)
        data = start.prepared_data(schedule)
        start = start.with_vocabulary(data.tokenizer)
        config = start.config
        module = start.module(schedule, data, model)
        given = class_path(GPT) if is_plain(module.net) else class_path(model or GPT)
        if start.checkpoint is not None:
            trained = config.model_class or class_path(GPT)
            if not same_class(given, trained):
                problem = f"{folder} was trained with {trained}, not {given}"
                raise ModelClassError(problem, trained)
        if not is_plain(module.net):
            config = dataclasses.replace(config, model_class=given)
        if folder is None:
            parent = Path(config.runs_dir)
            assert config.size is not None
            config_text(config, config.name or MAX_NAME_BYTES * "x")  # before the folder exists
            folder = new_run_folder(parent, config.name, config.size, config.resume == AUTO)
            stack.enter_context(lock(folder))
        stack.enter_context(full_disk_in_one_line(folder))
        training = Assembly(folder, config, start, hardware, schedule, data, module)
        if global_rank() == 0:
            stack.enter_context(log_file(folder / "train.log"))
            if start.checkpoint is None:
                training.write_inputs()
            start.clear(folder)
        training.describe(kernels)
        trainer = training.trainer(callbacks)
        set_losses(module, kernels, hardware, config, start.teachers)
        _fit(trainer, module, data, start.checkpoint, config)
        log.info("report: %s", folder / REPORT)
        log.info("next:   %s", next_step("evaluate", ckpt=str(folder), **_class_setting(config)))
    return folder


def _check_upload(config: TrainConfig, callbacks: Sequence[Callback]) -> None:
    """Raise UserError if `logger.log_model` is set and no callback can upload the model."""
    if config.logger.log_model and not any(isinstance(c, ModelUpload) for c in callbacks):
        problem = (
            "needs minigpt.exporting.wandb.WandbModel() in callbacks; add it, or do not upload"
        )
        raise UserError(problem, "logger.log_model", True, {"logger.log_model": False})


def _with_classes(
    config: TrainConfig, model: ModelFactory | None, teacher: ModelFactory | None
) -> TrainConfig:
    """Return `config`, adapted to the classes of the model and of the teachers.

    `config.model` is converted to the config class of `model`. If `teacher` is not None,
    `config.teacher.class_path` is set to the dotted path of `teacher`.

    Args:
        config: all settings.
        model: class of the model, or function that creates it; None means `GPT`.
        teacher: class of the teachers, or function that creates them; None leaves the class path
            unchanged.

    Raises:
        UserError: `teacher` is given for a new run without teachers.
        ModelClassError: the config is for a custom model class, but `model` is None.
    """
    if model is None and config.model_class is not None:
        problem = f"the config is for the model class {config.model_class}, which must be given"
        raise ModelClassError(problem, config.model_class)
    if teacher is not None:
        if config.resume is None and not config.teacher.runs:
            raise UserError("there are no teachers; leave this out, or name some", "teacher")
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
        UserError: the settings need hardware or a compiler that is missing, or they need several
            processes and this process is not allowed to start others.
    """
    try:
        hardware = Hardware.detect(c.accelerator, c.devices, c.num_nodes, c.precision)
    except UserError as error:
        raise error.within("trainer") from None
    if hardware.accelerator == "mps" and c.strategy != "auto":
        message = "needs several devices, and a Mac has one GPU; CPU processes can train instead"
        raise UserError(message, "trainer.strategy", c.strategy, {"trainer.accelerator": "cpu"})
    compilers = {
        "cpu": ("C++ compiler, such as g++", has_cpp_compiler),
        "cuda": ("C compiler, such as gcc", has_c_compiler),
    }
    if c.compile and hardware.accelerator in compilers:
        compiler, is_found = compilers[hardware.accelerator]
        if not is_found():
            message = f"torch.compile needs a {compiler}"
            raise UserError(message, "trainer.compile", True, {"trainer.compile": False})
    if hardware.world_size > 1 and not may_start_processes():
        message = "only the command line, torchrun or srun can train on several devices"
        raise UserError(message, "trainer.devices", hardware.devices, {"trainer.devices": "1"})
    return hardware


def _kernels(hardware: Hardware, choice: Choice) -> Kernels:
    """Return the kernels; raise UserError if `choice` does not fit the device."""
    try:
        return kernels_for(hardware.accelerator, choice)
    except UserError as error:
        raise error.within("trainer") from None


def _class_setting(config: TrainConfig) -> dict[str, str]:
    """Return the path of a custom model class as {"class_path": path}; {} for `GPT`."""
    return {} if config.model_class is None else {"class_path": config.model_class}


def _fit(
    trainer: L.Trainer, module: GPTModule, data: DataModule, checkpoint: Path | None,
    config: TrainConfig,
) -> None:  # fmt: skip
    """Train; at the end, close any W&B run, and end the processes that Lightning started."""
    status, folder = 1, Path(trainer.default_root_dir)
    own_launcher(trainer)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        status = 0
    except (RuntimeError, UserError) as error:  # a sample story raises UserError
        if not is_out_of_memory(error):
            raise
        raise _too_many_windows(config) from None
    except SystemExit as leaving:  # by `Checkpoints`, or by Lightning at Ctrl-C, with code 1
        if (folder / CHECKPOINTS).is_dir():
            classes = _class_setting(config).items()
            more: dict[str, Any] = {f"model.{key}": value for key, value in classes}
            if (name := config.teacher.class_path) is not None:
                more["teacher.class_path"] = name
            recorded = read_config(folder).get("teacher", {}).get("runs", [])
            if (runs := [str(Path(run).absolute()) for run in config.teacher.runs]) != recorded:
                more["teacher"] = runs  # they have moved
            log.info("continue:  %s", next_step("train", resume=str(folder), **more))
        if leaving.code in (1, 128 + signal.SIGINT):
            raise KeyboardInterrupt from None
        raise SystemExit(leaving.code or 128 + signal.SIGTERM) from None
    finally:
        finish_wandb(trainer.loggers, status)
        end_processes(trainer, finished=status == 0)
        watch.patient = False  # `Checkpoints` has set it


def _too_many_windows(config: TrainConfig) -> UserError:
    """Return the error for a GPU without enough memory for a batch."""
    windows, accumulate = config.data.windows_per_batch, config.trainer.accumulate_grad_batches
    fix = {"data.batch_size": windows // 2, "trainer.accumulate_grad_batches": 2 * accumulate}
    problem = "the GPU does not have enough memory for this many windows at a time; choose a "
    problem += "smaller model, or fewer windows and a larger trainer.accumulate_grad_batches"
    halves = fix if windows % 2 == 0 else None  # an odd batch has no half
    return UserError(problem, "data.batch_size", windows, halves)


def _lacks_report(folder: Path) -> bool:
    """Return whether report.html is missing, or older than the summary.json that it shows."""
    report = folder / REPORT
    return not report.is_file() or report.stat().st_mtime < (folder / SUMMARY).stat().st_mtime


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
