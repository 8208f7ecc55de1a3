"""`minigpt train` and the train.py of a checkout: train a model with settings as key=value."""

from __future__ import annotations

import sys
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from minigpt.cli.compose import plain_values, train_config, typed_class
from minigpt.cli.program import Program, hydra_value
from minigpt.cli.run import run_app
from minigpt.core.settings import UserError


def main() -> None:
    """Train a model with the settings of the command line."""
    run_app("train", _train)


def _train(config: DictConfig, program: Program, classes: list[str]) -> None:
    job = HydraConfig.get()
    overrides: Any = OmegaConf.to_container(job.overrides.task)  # as typed, with interpolations
    overrides = [word for word in overrides if not word.startswith("local=")]  # MINIGPT_LOCAL
    excess = [word for word in overrides if not word.startswith(("resume=", "data.cache_dir="))]
    location: list[str] = []
    if job.mode == RunMode.MULTIRUN:
        # Each job has its own folder, and uses the same folder if a scheduler restarts the job.
        config.runs_dir = job.sweep.dir
        config.name = config.name or f"{job.runtime.choices.get('model')}-{job.job.num}"
        config.resume = config.resume or "auto"
        location = [f"{key}={hydra_value(config[key])}" for key in ("runs_dir", "name", "resume")]
    # Lightning starts the processes of other devices with this command. It runs one job only.
    sys.argv = [program.path, *program.words, *overrides, *classes, *location]
    if config.resume not in (None, "auto") and excess:
        raise UserError(f"a resumed run keeps its own settings: leave out {excess[0]}", "resume")
    from minigpt.core.process import tune_process
    from minigpt.training.loggers import forget_wandb_run
    from minigpt.training.loop import train  # imports Lightning, which is slow: after the checks

    if job.mode == RunMode.MULTIRUN:
        forget_wandb_run()

    tune_process()
    model = typed_class("train", classes)
    values, size = plain_values(config), job.runtime.choices.get("model")
    train(train_config(values, size, [*overrides, *classes], model), model)
