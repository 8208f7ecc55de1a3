"""`minigpt train` and the train.py of a checkout: train a model with settings as key=value."""

from __future__ import annotations

import sys
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from minigpt.cli.compose import plain_values, train_config, typed_class
from minigpt.cli.program import CLASS_SETTINGS, Program
from minigpt.cli.run import run_app
from minigpt.core.settings import build
from minigpt.core.typed import typed_settings


def main() -> None:
    """Train a model with the settings of the command line."""
    run_app("train", _train)


def _train(config: DictConfig, program: Program, classes: list[str]) -> None:
    job = HydraConfig.get()
    overrides: Any = OmegaConf.to_container(job.overrides.task)  # as typed, with interpolations
    overrides = [word for word in overrides if not word.startswith("local=")]  # MINIGPT_LOCAL
    values, size = plain_values(config), job.runtime.choices.get("model")
    location: list[str] = []
    resumes_run = values["resume"] not in (None, "auto")
    if job.mode == RunMode.MULTIRUN and not resumes_run:
        # Each job has its own folder, and uses the same folder if a scheduler restarts the job.
        name = values["name"] or f"{size}-{job.job.num}"
        where = {"runs_dir": job.sweep.dir, "name": name, "resume": "auto"}
        values, location = values | where, typed_settings(where)
    # Lightning starts the processes of other devices with this command, which runs one job only.
    folders = [s.path for s in job.runtime.config_sources if s.provider == "command-line"]
    groups = [f"--config-dir={path.removeprefix('file://')}" for path in folders]
    groups += [word for word in job.overrides.hydra if word.startswith("hydra.searchpath=")]
    sys.argv = [program.path, *program.words, *groups, *overrides, *classes, *location]
    if resumes_run:
        from minigpt.training.config import BudgetConfig, TrainConfig
        from minigpt.training.resume_settings import refuse_settings

        budget = build(BudgetConfig, values["budget"], "budget")
        typed = TrainConfig(resume=str(values["resume"]), budget=budget, overrides=tuple(overrides))
        refuse_settings(typed)
    from minigpt.core.process import tune_process
    from minigpt.training.loggers import forget_wandb_run
    from minigpt.training.loop import train  # imports Lightning, which is slow: after the checks

    if job.mode == RunMode.MULTIRUN:
        forget_wandb_run()

    tune_process()
    model, teacher = (typed_class(name, classes) for name in CLASS_SETTINGS["train"])
    settings = train_config(values, size, [*overrides, *classes], model)
    callbacks = []
    if settings.logger.log_model:
        from minigpt.exporting.wandb import WandbModel

        callbacks = [WandbModel(model)]
    train(settings, model, callbacks, teacher=teacher)
