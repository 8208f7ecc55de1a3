"""Where the numbers of a run go: metrics.csv always, W&B or TensorBoard beside it."""

from __future__ import annotations

import csv
import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.logger import Logger

from minigpt.config import UserError
from minigpt.runs import write_text

log = logging.getLogger("minigpt")

COLUMNS = [
    "step", "tokens", "train/loss", "val/loss", "val/perplexity", "val/bits_per_byte",
    "tokens_per_second", "mfu", "lr", "grad_norm",
]  # fmt: skip


@dataclass(frozen=True)
class LoggerConfig:
    """Where numbers go beside metrics.csv."""

    kind: Literal["csv", "wandb", "tensorboard"] = "csv"
    project: str = "mini-gpt"


class MetricsCsv(Logger):
    """A Lightning logger that appends to one CSV file, so that no row waits in memory.

    A cell is empty where a number was not measured at that step. A metric with a new name adds a
    column. With `resume_step`, rows after that step are dropped, since training will make them
    again; without it an existing file is replaced.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        super().__init__()
        self.path = path
        rows: list[dict[str, str]] = []
        self.columns = list(COLUMNS)
        if resume_step is not None and path.is_file():
            whole_lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # a kill leaves halves
            reader = csv.DictReader(whole_lines)
            rows = [row for row in reader if int(row["step"]) <= resume_step]
            self.columns = list(reader.fieldnames or COLUMNS)
        self._write_all(rows)

    @property
    def name(self) -> str:
        """What Lightning calls this logger."""
        return "csv"

    @property
    def version(self) -> str:
        """One file, one version."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row; `step` counts updates made."""
        row: dict[str, Any] = {k: f"{v:.8g}" for k, v in metrics.items() if k != "epoch"}
        row["step"] = int(step or 0)
        if "tokens" in row:
            row["tokens"] = int(metrics["tokens"])
        new = [key for key in row if key not in self.columns]
        if new:
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            self.columns += new
            self._write_all(rows)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml holds them."""

    @rank_zero_only
    def _write_all(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())


def extra_loggers(folder: Path, config: LoggerConfig) -> list[Logger]:
    """The logger that was asked for beside metrics.csv."""
    if config.kind == "tensorboard":
        from lightning.pytorch.loggers import TensorBoardLogger

        try:
            return [TensorBoardLogger(folder, name="tensorboard", version="")]
        except ModuleNotFoundError:
            raise UserError(
                "logger=tensorboard needs another package: pip install -e '.[tensorboard]'"
            ) from None
    if config.kind == "wandb":
        import wandb
        from lightning.pytorch.loggers import WandbLogger
        from wandb.errors import AuthenticationError

        mode = wandb.setup().settings.mode
        try:
            if mode != "disabled" and not wandb.login(prompt=False):
                mode = "offline"
        except AuthenticationError as error:
            problem = " ".join(str(error).split())
            raise UserError(f"{problem} Set WANDB_MODE=offline, or type logger=csv") from None
        if mode == "offline":
            log.info("W&B        offline: later, wandb sync %s/wandb/offline-run-*", folder)
        project = config.project
        return [WandbLogger(folder.name, folder, project=project, mode=mode, resume=None)]
    return []
