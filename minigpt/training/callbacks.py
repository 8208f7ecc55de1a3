"""Lightning callbacks: throughput, sample stories, progress, summary and report.

The callback that writes checkpoints is in checkpointing.py.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.progress import BarColumn, TimeRemainingColumn

from minigpt.core.console import log
from minigpt.core.files import write_json, write_text
from minigpt.core.gpu_memory import end_if_out_of_memory
from minigpt.core.progress import Progress
from minigpt.core.settings import UserError
from minigpt.core.text import human_count, human_time
from minigpt.generation.sampling import SamplingConfig, generate_stories
from minigpt.model import perplexity
from minigpt.runs.names import SAMPLES, SUMMARY
from minigpt.runs.records import read_metrics, read_samples
from minigpt.tokenizer import Tokenizer
from minigpt.training.checkpointing import Checkpoints
from minigpt.training.config import CallbacksConfig
from minigpt.training.loggers import log_final, log_samples
from minigpt.training.module import GPTModule
from minigpt.training.report import write_report

_LONG_VALIDATION = 60.0  # seconds


class Throughput(Callback):
    """Log `tokens_per_second` and `mfu` (model FLOPs utilisation) in training rows of metrics.csv.

    Both are measured over the steps and the work between them (data, logging), without the
    validations. `mfu` is the model's FLOP/s as a fraction of the peak FLOP/s of all devices
    (Chowdhery et al. 2022, arXiv:2204.02311, appendix B). If `mfu` exceeds 1, the measured peak is
    too low, usually because the machine was busy during the measurement. The peak is then measured
    again, at most once.

    Args:
        module: the model in training.
        every: number of steps over which the speed is averaged.
        measure_peak: function that returns the total peak of all devices in FLOP/s. If its
            argument is true, the function measures the peak even if a cached value exists.

    Attributes:
        seconds: training time so far in seconds, including earlier parts of a resumed run.
        speed: tokens per second in the current window of at most `every` steps.
        peak_flops: total peak of all devices, in FLOP/s.
    """

    def __init__(
        self, module: GPTModule, every: int, measure_peak: Callable[[bool], float]
    ) -> None:
        self.module, self.every, self._measure_peak = module, every, measure_peak
        self.peak_flops = measure_peak(False)
        self.seconds, self.speed, self._measured_again = 0.0, 0.0, False
        self._steps, self._elapsed = 0, 0.0  # batches and seconds in the current window
        self._mark: float | None = None  # end of the last batch; None if the clock is stopped

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        """Start the clock if it is stopped: at the first step, or after a validation."""
        if self._mark is None:
            self._mark = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Update `seconds` and `speed`; log speed and MFU if this step has a row in metrics.csv."""
        assert self._mark is not None
        now = time.perf_counter()
        self._elapsed += now - self._mark
        self.seconds += now - self._mark
        self._mark, self._steps = now, self._steps + 1
        tokens_per_batch = self.module.tokens_per_step / trainer.accumulate_grad_batches
        self.speed = self._steps * tokens_per_batch / self._elapsed
        if self.module.has_row(trainer.global_step):
            flops = self.speed * self.module.net.flops_per_token()
            if flops > self.peak_flops and not self._measured_again and trainer.is_global_zero:
                self._measured_again, self._mark = True, None  # the clock excludes the measurement
                with end_if_out_of_memory():  # a GPU full of activations
                    self.peak_flops = self._measure_peak(True)
                message = "mfu was above 1, so the peak was measured again: %.3g FLOP/s"
                log.info(message, self.peak_flops)
            values = {"tokens_per_second": self.speed, "mfu": flops / self.peak_flops}
            self.module.log_dict(values)
        if self._steps >= self.every * trainer.accumulate_grad_batches:
            self._steps, self._elapsed = 0, 0.0

    def on_validation_start(self, *_: Any, **__: Any) -> None:
        """Stop the clock until the next training step."""
        self._mark = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state to store in a checkpoint."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the training time from a checkpoint."""
        self.seconds = state_dict["seconds"]


class StorySamples(Callback):
    """After every validation, append a new story for each prompt to samples.jsonl.

    Args:
        module: the model in training.
        folder: the run folder.
        tokenizer: tokenizer of the run.
        config: prompts, sampling temperature and maximum length of the stories.
        seed: sampling seed, the same at each validation.
        start_step: step at which a resumed run starts. Stories of later steps are removed from
            the file, because the run writes them again.
    """

    def __init__(
        self, module: GPTModule, folder: Path, tokenizer: Tokenizer, config: CallbacksConfig,
        seed: int, start_step: int,
    ) -> None:  # fmt: skip
        self.module, self.tokenizer, self.config = module, tokenizer, config
        self.path, self.start_step = folder / SAMPLES, start_step
        self.sampling = SamplingConfig(config.temperature, max_tokens=config.max_tokens, seed=seed)

    @rank_zero_only
    def on_fit_start(self, *_: Any, **__: Any) -> None:
        """Remove from samples.jsonl the stories that a resumed run will write again."""
        earlier = (s for s in read_samples(self.path.parent) if s["step"] <= self.start_step)
        write_text(self.path, "".join(map(_line, earlier)))

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Append a story for each prompt to samples.jsonl, and send the stories to the loggers."""
        model, step, samples = self.module.net, trainer.global_step, []
        with self.path.open("a", encoding="utf-8") as file:
            for prompt in self.config.prompts:
                (story,) = generate_stories(model, self.tokenizer, prompt, 1, self.sampling)
                sample = {
                    "step": step,
                    "tokens": step * self.module.tokens_per_step,
                    "prompt": prompt,
                    "temperature": self.config.temperature,
                    "text": story,
                }
                file.write(_line(sample))
                samples.append(sample)
        log_samples(trainer.loggers, samples)


def _line(sample: dict[str, Any]) -> str:
    return json.dumps(sample, ensure_ascii=False) + "\n"


class TrainingProgress(Callback):
    """Progress of training: tokens, loss, perplexity, tokens per second and time left.

    The training loss and perplexity are updated only at steps that have a row in metrics.csv, so
    that other steps need not wait for the device. Each validation also logs a line.

    Args:
        module: the model in training.
        show: whether to show progress; the line for each validation is always logged.
        throughput: the callback that measures tokens per second.
    """

    def __init__(self, module: GPTModule, show: bool, throughput: Throughput) -> None:
        self.module, self.throughput, self.loss = module, throughput, ""
        numbers = "{task.fields[position]}", "{task.fields[numbers]}", TimeRemainingColumn()
        columns = "{task.description}", BarColumn(bar_width=8), *numbers
        self.bar = Progress(*columns, show=show, refresh_per_second=4)

    def on_train_start(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Start the progress bar at the current step."""
        total, step = self.module.n_steps, trainer.global_step
        self.task = self.bar.add_task("training", True, total, step, position="", numbers="")
        self.bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Show the number of tokens so far, the latest losses and the speed."""
        step, total, size = trainer.global_step, self.module.n_steps, self.module.tokens_per_step
        if not self.bar.show:
            return
        metrics = trainer.callback_metrics
        if self.module.has_row(step) and "train/loss" in metrics:  # none before the first update
            loss = float(metrics["train/loss"])
            self.loss = f"loss {loss:.3f} · ppl {perplexity(loss):.2f} · "
            if "val/perplexity" in metrics:
                self.loss += f"val {float(metrics['val/perplexity']):.2f} · "
        position = f"{human_count(step * size)}/{human_count(total * size)}"
        if self.bar.plain:
            position = f"step {step:,}/{total:,} · {position} tokens"
        numbers = f"{self.loss}{self.throughput.speed:,.0f} tok/s"
        self.bar.update(self.task, completed=step, position=position, numbers=numbers)

    def on_validation_start(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Start to count validation batches; log their number if validation may take a minute."""
        self.bar.update(self.task, description="validating")
        total = sum(trainer.num_val_batches)
        self.bar.add_task("validating", True, total, visible=False, position="", numbers="")
        loader: Any = trainer.val_dataloaders
        context = self.module.net.config.context_length
        tokens = total * loader.batch_size * context * trainer.world_size
        # A validation batch takes less time than a training batch, which has a backward pass.
        seconds = tokens / self.throughput.speed if self.throughput.speed else 0.0
        if seconds > _LONG_VALIDATION and trainer.is_global_zero:
            message = "validating on %s windows in %s batches, which takes at most about %s"
            log.info(message, f"{len(loader.sampler):,}", f"{total:,}", human_time(seconds))

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """Count a batch of the validation."""
        task = self.bar.tasks[-1]
        position = f"batch {task.completed + 1:,}/{task.total:,}"
        self.bar.update(task.id, advance=1, position=position)

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Log the result of the validation."""
        self.bar.remove_task(self.bar.tasks[-1].id)
        self.bar.update(self.task, description="training")
        tokens = human_count(trainer.global_step * self.module.tokens_per_step)
        names, metrics = ("val/perplexity", "val/bits_per_byte"), trainer.callback_metrics
        values = (metrics[name] for name in names)
        log.info("%s tokens: validation perplexity %.3f, %.4f bits per byte", tokens, *values)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Remove the progress bar."""
        self.bar.stop()

    on_exception = on_train_end


class ModelUpload(Callback):
    """Base class of callbacks that upload the model of a finished run to W&B.

    The setting `logger.log_model` needs such a callback. The command line adds one,
    `minigpt.exporting.wandb.WandbModel`.
    """


class RunReport(Callback):
    """Write summary.json and report.html when a run finishes, fails or is interrupted.

    Args:
        module: the model in training.
        folder: the run folder.
        facts: entries of the summary that are known before the run starts, such as `device`.
        throughput: the callback that measures training time and peak FLOP/s.
        checkpoints: the callback that tracks the lowest validation loss.
        first_step: number of updates in the checkpoint from which the run is resumed, or 0.
    """

    def __init__(
        self, module: GPTModule, folder: Path, facts: dict[str, Any], throughput: Throughput,
        checkpoints: Checkpoints, first_step: int,
    ) -> None:  # fmt: skip
        self.module, self.folder, self.facts, self.first_step = module, folder, facts, first_step
        self.throughput, self.checkpoints = throughput, checkpoints
        self._is_finished = False

    def on_train_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Write summary.json and report.html for a run that finished."""
        self._write(trainer, "finished")

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Write summary.json and report.html for a run that was interrupted or failed."""
        if self._is_finished:  # what failed came after the training
            return
        if trainer.global_step < self.first_step:  # the state was not restored yet
            return
        interrupted = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        try:
            self._write(trainer, "interrupted" if interrupted else "failed")
        except OSError as error:  # a full disk, perhaps; the first error is more important
            log.warning("cannot write the report: %s", error)

    @rank_zero_only
    def _write(self, trainer: L.Trainer, status: str) -> None:
        steps, seconds = trainer.global_step, self.throughput.seconds
        tokens, metrics = steps * self.module.tokens_per_step, dict(trainer.callback_metrics)
        if self.module.train_loss is not None:  # newer than the loss in the latest row
            metrics["train/loss"] = self.module.train_loss
        names = ("train/loss", "val/loss", "val/perplexity", "val/bits_per_byte")
        best = self.checkpoints.best_val_loss
        losses = {name: float(metrics[name]) for name in names if name in metrics}
        if "train/loss" not in losses:  # this process has made no step
            with contextlib.suppress(UserError):
                rows = [row for row in read_metrics(self.folder) if "train/loss" in row]
                if rows:
                    losses["train/loss"] = rows[-1]["train/loss"]
        summary = {
            **self.facts,
            "status": status,
            "steps": steps,
            "tokens": tokens,
            "seconds": round(seconds, 1),
            "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
            "peak_flops": self.throughput.peak_flops,  # mfu is relative to it
            **losses,
            "best_val_loss": best if math.isfinite(best) else None,
        }
        if (cycles := self.module.settings.cycles) and steps >= self.module.n_steps:
            summary["cycles"] = cycles  # the weights are the mean over the ends of the decays
        write_json(self.folder / SUMMARY, summary)
        self._is_finished = status == "finished"
        write_report(self.folder)
        final = {name: summary[name] for name in names if name != "val/loss" and name in summary}
        log_final(trainer.loggers, final, steps)
        log.info("%s after %s: %s tokens", status, human_time(seconds), f"{tokens:,}")
