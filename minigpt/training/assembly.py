"""Last steps before training: write and log the settings, build the losses and the Trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed
import yaml
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from minigpt.core.console import log
from minigpt.core.distributed import Launcher
from minigpt.core.files import MAX_YAML_BYTES, write_text
from minigpt.core.hardware import Hardware, matmul_peak
from minigpt.core.process import is_tuned
from minigpt.core.settings import UserError, plain
from minigpt.core.text import human_count
from minigpt.data.datamodule import DataModule
from minigpt.kernels.choice import is_plain
from minigpt.kernels.cuda_graph import graphed_loss
from minigpt.kernels.distillation import Distillation
from minigpt.kernels.microbatch import microbatched_loss
from minigpt.model import Kernels
from minigpt.runs.names import CONFIG, METRICS, TOKENIZER
from minigpt.runs.provenance import source_commit, total_tokens, with_their_teachers
from minigpt.runs.records import read_summary
from minigpt.training.callbacks import RunReport, StorySamples, Throughput, TrainingProgress
from minigpt.training.checkpointing import CallbackStates, Checkpoints
from minigpt.training.config import Schedule, TrainConfig, TrainerConfig, settings_of
from minigpt.training.cycles import CycleMean
from minigpt.training.loggers import MetricsCsv, extra_loggers
from minigpt.training.module import GPTModule
from minigpt.training.profiling import PROFILE, Profile
from minigpt.training.resume import ResumeState
from minigpt.training.snapshots import Snapshots
from minigpt.training.teacher import Teachers


def _tokens_seen(number: int | None) -> str:
    """Return a number of training tokens as text for the log; None means an unknown number."""
    return "an unknown number of" if number is None else human_count(number)


def config_text(config: TrainConfig, name: str) -> str:
    """Return the content of config.yaml for a run in a folder called `name`.

    Raises:
        UserError: the text is longer than `read_yaml` accepts.
    """
    values = settings_of(dataclasses.replace(config, name=name))
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if (size := len(text.encode())) > MAX_YAML_BYTES:
        problem = f"config.yaml would have {size:,} bytes, more than {MAX_YAML_BYTES:,}: "
        problem += "write many data files as a pattern, such as 'data.train_files=[stories/*.txt]'"
        raise UserError(problem)
    return text


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A run that is about to start: its folder, data and model, and its checked settings."""

    folder: Path
    config: TrainConfig
    start: ResumeState
    hardware: Hardware
    schedule: Schedule
    data: DataModule
    module: GPTModule

    def write_inputs(self) -> None:
        """Write config.yaml and tokenizer.json; evaluation needs both files and a checkpoint."""
        write_text(self.folder / CONFIG, config_text(self.config, self.folder.name))
        self.data.tokenizer.save(self.folder / TOKENIZER)

    def describe(self, kernels: Kernels) -> None:
        """Log the main settings of the run, so that the user can notice a wrong setting early."""
        config, data, schedule, hardware = self.config, self.data, self.schedule, self.hardware
        valid, parent = data.valid, self.start.parent
        n_windows = -(-(valid.n_tokens - 1) // config.model.context_length)
        per_batch = data.validation_windows(hardware.accelerator) * hardware.world_size
        n_batches = -(-n_windows // per_batch)
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
            seen = _tokens_seen(total_tokens(with_their_teachers(teachers.records)))
            settings = f"weight {c.weight:g}, temperature {c.temperature:g}"
            lines["teachers"] = f"{names}, trained on {seen} tokens: {settings}"
        for key, text in lines.items():
            log.info("%-10s %s", key, text)
        for note in dict.fromkeys([*data.train.notes, *valid.notes]):
            log.info("%-10s %s", "stories", note)
        size, limit = data.tokenizer.vocab_size, config.data.vocab_size
        if parent is None and self.start.tokenizer is None and size < limit:
            sizes, rows = f"{size:,} tokens, fewer than data.vocab_size={limit:,}", ""
            if (n_rows := config.model.vocab_size) > size:
                rows = f"; the rest of the model's {n_rows:,} embeddings is unused"
            log.warning("the training stories yield a vocabulary of %s%s", sizes, rows)

    def trainer(self, callbacks: Sequence[Callback]) -> L.Trainer:
        """Return the Lightning Trainer, with the loggers, our own callbacks and `callbacks`."""
        folder, config, hardware, c = self.folder, self.config, self.hardware, self.config.trainer
        validates, facts = self.start.validates, self._facts()
        checkpoints = Checkpoints(self.module, folder, config.callbacks, validates)
        tokens = self.module.tokens_per_step
        metrics = MetricsCsv(folder / METRICS, self.start.step or None, validates, tokens)
        loggers = [metrics, *extra_loggers(folder, config.logger)]
        accumulate, n_steps = c.accumulate_grad_batches, self.schedule.n_steps
        trainer = L.Trainer(
            accelerator=hardware.accelerator,
            devices=hardware.devices,
            num_nodes=hardware.num_nodes,
            strategy=_strategy(c, hardware),
            precision=hardware.precision,  # type: ignore[arg-type]
            max_steps=n_steps + validates,  # Lightning would skip a validation after the last step
            accumulate_grad_batches=accumulate,
            # Counted in batches of the whole run. It is a multiple of `accumulate`, because a
            # validation saves a checkpoint, which must come after a whole step.
            val_check_interval=accumulate * math.ceil(n_steps / c.n_validations),
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=c.log_every_n_steps,
            logger=loggers,
            callbacks=[
                *self._callbacks(checkpoints, facts),
                *callbacks,
                *([CallbackStates(checkpoints)] if callbacks else []),
            ],
            default_root_dir=folder,
            enable_checkpointing=False,  # ours are among the callbacks
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,  # the data module distributes the windows itself
            plugins=[checkpoints.files, _environment()],
        )
        for logger in loggers:  # opens the W&B run, which `_fit` closes
            shape = dataclasses.asdict(config.model)  # not `model`, the name of the size
            logger.log_hyperparams({**plain(config), "shape": shape, **facts})
        return trainer

    def _callbacks(self, checkpoints: Checkpoints, facts: dict[str, Any]) -> list[Callback]:
        """Return Mini GPT's callbacks, in the order in which they run."""
        folder, config, hardware = self.folder, self.config, self.hardware
        module, c, keep = self.module, config.trainer, config.callbacks
        cache_dir, first_step = Path(config.data.cache_dir), self.start.step - self.start.validates

        def peak(again: bool) -> float:
            return matmul_peak(hardware, cache_dir, again) * hardware.world_size

        throughput = Throughput(module, c.log_every_n_steps, peak)
        log.info(
            "%-10s %s", "peak", f"{throughput.peak_flops:.3g} FLOP/s, which mfu is relative to"
        )
        return [
            throughput,
            TrainingProgress(module, keep.progress_bar, throughput),
            StorySamples(module, folder, self.data.tokenizer, keep, config.seed, first_step),
            # Before snapshots and checkpoints, so that the last of each contains the mean.
            *([CycleMean(module)] if config.optimizer.cycles else []),
            *([Snapshots(module, folder, keep.snapshots)] if keep.snapshots else []),
            checkpoints,
            RunReport(module, folder, facts, throughput, checkpoints, self.start.step),
            *([Profile(module, folder / PROFILE)] if c.profile else []),
        ]

    def _facts(self) -> dict[str, Any]:
        """Return the entries of the summary that are known before the run starts."""
        model, hardware, commits = self.module.net, self.hardware, source_commit()
        with contextlib.suppress(UserError):  # a broken summary is replaced
            earlier = read_summary(self.folder).get("commit")
            if isinstance(earlier, str) and self.start.checkpoint is not None:  # of earlier parts
                commits = ", ".join(dict.fromkeys([*earlier.split(", "), commits]))
        parent, teachers = self.start.parent, self.start.teachers
        return {
            "model": self.config.size,
            "parameters": model.n_parameters,
            "non_embedding_parameters": model.n_parameters - model.embedding.weight.numel(),
            "flops_per_token": model.flops_per_token(),
            "train_stories": self.data.train.n_stories,
            "train_tokens": self.data.train.n_tokens,  # in the training split
            "valid_tokens": self.data.valid.n_tokens,
            "seed": self.config.seed,
            "device": hardware.accelerator,
            "devices": hardware.devices,  # on each node
            "num_nodes": hardware.num_nodes,
            "precision": hardware.precision,
            **({"init_from": dataclasses.asdict(parent)} if parent else {}),
            **({"teachers": plain(list(teachers.records))} if teachers else {}),
            "commit": commits,
        }


def _strategy(c: TrainerConfig, hardware: Hardware) -> Strategy | str:
    if c.strategy != "fsdp":
        return c.strategy
    # FSDP2: `GPTModule` shards its model, and checkpoints are single files.
    sizes = hardware.world_size, 1  # sizes of data and tensor parallelism
    return ModelParallelStrategy(*sizes, save_distributed_checkpoint=False)


def _environment() -> ClusterEnvironment:
    launcher = Launcher.detect()
    if launcher is None:
        return LightningEnvironment()
    if launcher.name == "torchrun":
        return TorchElasticEnvironment()
    return SLURMEnvironment(auto_requeue=False)  # `Checkpoints` queues the job again


def set_losses(
    module: GPTModule, kernels: Kernels, hardware: Hardware, config: TrainConfig,
    teachers: Teachers | None,
) -> None:  # fmt: skip
    """Set the loss functions of `module`.

    The functions use `kernels`. Depending on the device and the settings, they may also be compiled
    by torch.compile, replayed as CUDA graphs, or computed in micro-batches.
    """
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
    module.graphed_updates = _records_graphs(hardware, c)
    if module.graphed_updates and _is_repeatable(module, hardware):
        whole = model.loss  # for validation, where the last batch may be smaller
        module.fast_loss = graphed_loss(model, module.fast_loss or whole, whole)
        if (distillation := module.distillation) is not None:
            module.distillation = graphed_loss(model, distillation, distillation)
    elif not c.compile and kernels.name == "cpu" and c.strategy != "fsdp":
        # Not with fsdp, which gathers the weights for a single pass.
        module.fast_loss = microbatched_loss(model)
        if module.distillation is not None:
            module.distillation = microbatched_loss(model, loss=module.distillation)


def _records_graphs(hardware: Hardware, c: TrainerConfig) -> bool:
    """Return whether the run may use CUDA graphs, for Muon and for the loss.

    The loss uses them only if `_is_repeatable` returns True, too.
    """
    return c.cuda_graph and hardware.accelerator == "cuda" and c.strategy != "fsdp"


def _is_repeatable(module: GPTModule, hardware: Hardware) -> bool:
    """Return whether a CUDA graph of the training loss can be replayed in each step.

    Only the weights and the batch differ between two replays. Dropout needs new random numbers in
    each step, and 16-mixed may need another loss scale. A custom class of the model or of a teacher
    may have Python code that must run in each step.
    """
    plain = all(is_plain(model) for model in (module.net, *module.teachers))
    return plain and not module.net.config.dropout and hardware.precision != "16-mixed"
