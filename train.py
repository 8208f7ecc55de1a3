"""Train a Mini GPT: `python train.py model=large budget.tokens=20e6`. See `--help`."""

import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from minigpt.cli.hydra_errors import one_line_errors, run_app
from minigpt.core.settings import UserError

CONF = Path(__file__).parent / "conf"


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    job = HydraConfig.get()
    overrides: Any = OmegaConf.to_container(job.overrides.task)  # as typed, nothing looked up yet
    typed = [text for text in overrides if not text.startswith(("resume=", "data.cache_dir="))]
    size = job.runtime.choices["model"]
    if job.mode == RunMode.MULTIRUN:
        # The same place whenever a scheduler starts this job, of a name that the others have not.
        config.runs_dir = job.sweep.dir
        config.name = config.name or f"{size}-{job.job.num}"
        config.resume = config.resume or "auto"
        # What Lightning types to start processes for more devices: this job, not the whole sweep.
        place = [f"{key}='{config[key]}'" for key in ("runs_dir", "name", "resume")]
        sys.argv = [__file__, *overrides, *place]
    with one_line_errors():
        if config.resume not in (None, "auto") and typed:
            raise UserError(f"resume goes on with the settings of that run: leave out {typed[0]}")
        from minigpt.training.loop import train

        train(config, size=size)


if __name__ == "__main__":
    run_app(main, CONF, "train")
