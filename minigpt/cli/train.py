"""`minigpt train`, and train.py of a checkout: train a model by settings as key=value."""

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
    """Entry point."""
    run_app("train", _train)


def _train(config: DictConfig, program: Program, classes: list[str]) -> None:
    job = HydraConfig.get()
    overrides: Any = OmegaConf.to_container(job.overrides.task)  # as typed, nothing looked up yet
    overrides = [word for word in overrides if not word.startswith("local=")]  # MINIGPT_LOCAL
    own = [word for word in overrides if not word.startswith(("resume=", "data.cache_dir="))]
    place: list[str] = []
    if job.mode == RunMode.MULTIRUN:
        # The same place whenever a scheduler starts this job, of a name that the others have not.
        config.runs_dir = job.sweep.dir
        config.name = config.name or f"{job.runtime.choices.get('model')}-{job.job.num}"
        config.resume = config.resume or "auto"
        place = [f"{key}={hydra_value(config[key])}" for key in ("runs_dir", "name", "resume")]
    # What Lightning types to start processes for more devices: this job, not the whole sweep.
    sys.argv = [program.path, *program.words, *overrides, *classes, *place]
    if config.resume not in (None, "auto") and own:
        raise UserError(f"continues with the settings of that run: leave out {own[0]}", "resume")
    from minigpt.core.process import tune_process
    from minigpt.training.loop import train  # imports Lightning, which a mistake need not wait for

    tune_process()
    model = typed_class("train", classes)
    values, size = plain_values(config), job.runtime.choices.get("model")
    train(train_config(values, size, [*overrides, *classes], model), model)
