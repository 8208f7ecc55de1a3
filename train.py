"""Train a Mini GPT: `python train.py model=large budget.tokens=20e6`. See `--help`."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from minigpt.config import UserError
from minigpt.entry import one_line_errors, run_app

CONF = Path(__file__).parent / "conf"


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    job = HydraConfig.get()
    typed = [text for text in job.overrides.task if not text.startswith("resume=")]
    group = Path(job.sweep.dir) if job.mode == RunMode.MULTIRUN else None
    with one_line_errors():
        if config.resume not in (None, "auto") and typed:
            raise UserError(f"resume goes on with the settings of that run: leave out {typed[0]}")
        from minigpt.training import train  # imports torch, which a mistake need not wait for

        train(config, size=job.runtime.choices["model"], group=group)


if __name__ == "__main__":
    run_app(main, CONF, "train")
