"""Loggers of a run: metrics.csv and, if selected, W&B or TensorBoard."""

from __future__ import annotations

import csv
import io
import os
import secrets
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.logger import Logger

from minigpt.core.console import log
from minigpt.core.distributed import global_rank
from minigpt.core.files import sync, write_text
from minigpt.core.settings import UserError, one_line
from minigpt.core.typed import shell_command
from minigpt.runs.names import TENSORBOARD
from minigpt.runs.records import broken_line, whole_lines
from minigpt.training.config import LoggerConfig

WANDB_ID = "wandb-id.txt"  # in the run folder
_WANDB_START_SECONDS = 30.0  # wait for an answer, then continue offline
_WANDB_FINISH_SECONDS = 60.0  # wait for the final upload; WANDB_FINISH_TIMEOUT overrides it

COLUMNS = [
    "step", "tokens", "train/loss", "val/loss", "val/perplexity", "val/bits_per_byte",
    "tokens_per_second", "mfu", "lr", "grad_norm",
]  # fmt: skip


class MetricsCsv(Logger):
    """Lightning logger that appends each row of metrics to a CSV file immediately.

    A cell is empty if the metric was not measured at the step of the row. A new metric adds a
    column.

    Args:
        path: the CSV file.
        resume_step: step at which a resumed run starts. Rows of later steps are removed, because
            the run writes them again. None means a new run, which replaces an existing file.
        validates: whether the run repeats the validation at `resume_step`. If it does, the old row
            of this validation is removed.
        tokens_per_step: number of tokens per update. For metrics without `tokens`, the column
            `tokens` is computed from this number and the step.
    """

    name, version = "csv", ""  # type: ignore[assignment]  # Lightning needs both

    def __init__(
        self, path: Path, resume_step: int | None = None, validates: bool = False,
        tokens_per_step: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.path, self.tokens_per_step = path, tokens_per_step
        self.columns = list(COLUMNS)
        rows: list[dict[str, str]] = []
        if resume_step is not None:
            reader = csv.DictReader(whole_lines(path))
            try:
                last = resume_step, not validates  # last row to keep: step, has validation
                rows = [r for r in reader if (int(r["step"]), bool(r["val/loss"])) <= last]
            except (KeyError, TypeError, ValueError):
                raise broken_line(path, reader.line_num, "a row with a step") from None
            self.columns = list(reader.fieldnames or COLUMNS)
        self._write_all(rows)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row to the CSV file.

        Args:
            metrics: values by name.
            step: number of updates so far.
        """
        row: dict[str, Any] = {k: f"{v:.8g}" for k, v in metrics.items() if k != "epoch"}
        row["step"] = int(step or 0)
        row["tokens"] = int(metrics.get("tokens", row["step"] * self.tokens_per_step))
        if new := [key for key in row if key not in self.columns]:
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            self.columns += new
            self._write_all(rows)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)

    @rank_zero_only
    def sync(self) -> None:
        """Sync the file to disk; `Checkpoints` calls this before it writes a checkpoint.

        The method is not called `save`, because Lightning calls `save` after every row.
        """
        with self.path.open("r+b") as file:  # Windows does not sync a file opened for reading
            sync(file.fileno())

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing, because config.yaml contains the hyperparameters."""

    @rank_zero_only
    def _write_all(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())


def check_logger(config: LoggerConfig) -> None:
    """Check that the package of the logger is installed.

    Args:
        config: settings of the logger.

    Raises:
        UserError: the package is not installed.
    """
    kind = config.kind
    if kind != "csv" and find_spec(kind) is None:  # a kind is also the name of its package
        raise UserError(f"needs the package {kind}: run pip install {kind}", "logger", kind)


def extra_loggers(folder: Path, config: LoggerConfig) -> list[Logger]:
    """Return a list with the logger of W&B or TensorBoard; for the kind `csv`, the list is empty.

    Args:
        folder: the run folder.
        config: settings of the logger.

    Raises:
        UserError: the login of a new run to W&B fails, or W&B refuses a setting.
    """
    if config.kind == "tensorboard":
        from lightning.pytorch.loggers import TensorBoardLogger

        # `log_final` writes the hyperparameters, with the final metrics.
        options: Any = {"version": "", "default_hp_metric": False}
        return [TensorBoardLogger(folder, name=TENSORBOARD, **options)]
    return [_wandb_logger(folder, config)] if config.kind == "wandb" else []


def _wandb_logger(folder: Path, config: LoggerConfig) -> Logger:
    """Return a W&B logger, and store its id in the run folder so that a resumed run keeps the id.

    A new run takes its name and its id from WANDB_NAME and WANDB_RUN_ID, if they are set. Even in
    the mode `online`, the logger works offline if there is no API key, if the login of a resumed
    run fails, or if the server does not answer after the login.

    Raises:
        UserError: the login of a new run fails or times out, or W&B refuses the value of a setting
            or of an environment variable.
    """
    import wandb
    from lightning.pytorch.loggers import WandbLogger
    from wandb.errors import AuthenticationError, CommError, UsageError

    is_new = not (folder / WANDB_ID).is_file()
    try:
        defaults = wandb.setup().settings
    except (UsageError, ValueError) as error:  # such as WANDB_MODE=on
        raise _wandb_error(error) from None
    mode = config.mode or defaults.mode
    try:
        if mode != "disabled" and not wandb.login(prompt=False):
            mode = "offline"
    except AuthenticationError as error:  # also raised if the server does not answer
        problem = one_line(error)
        if is_new:
            message = f"W&B login failed ({problem}); set WANDB_MODE=offline, or change the logger"
            raise UserError(message, "logger.kind", "wandb", {"logger.kind": "csv"}) from None
        log.warning("W&B        login failed: %s", problem)
        mode = "offline"
    start = min(defaults.init_timeout, _WANDB_START_SECONDS)
    finish = defaults.finish_timeout or _WANDB_FINISH_SECONDS
    settings = wandb.Settings(init_timeout=start, finish_timeout=finish, finish_timeout_raises=True)
    # A resumed run keeps the name that it has on the server.
    name = os.environ.get("WANDB_NAME") or folder.name if is_new else None

    def logger(mode: str) -> WandbLogger:
        wandb_logger = WandbLogger(
            name, folder, id=_wandb_id(folder), project=config.project or defaults.project
            or "mini-gpt", entity=config.entity, group=config.group, mode=mode,
            resume=None if mode == "offline" else "allow", settings=settings,
        )  # fmt: skip
        _ = wandb_logger.experiment  # opens the run, only on rank 0
        return wandb_logger

    try:
        if mode != "offline":
            try:
                return logger(mode)
            except CommError as error:
                log.warning("W&B        no answer: %s", one_line(error))
        sync = shell_command("wandb", "sync", str(folder / "wandb"))
        log.info("W&B        offline: upload it later with %s/offline-run-*", sync)
        return logger("offline")
    except (UsageError, ValueError) as error:  # such as a WANDB_RUN_ID with a slash
        if is_new:
            (folder / WANDB_ID).unlink(missing_ok=True)
        raise _wandb_error(error) from None


def _wandb_error(error: Exception) -> UserError:
    """Return the error for a setting that W&B refuses, usually an environment variable."""
    problem = f"W&B refuses a setting ({one_line(error)}): check the variables WANDB_*"
    return UserError(f"{problem}, or choose another logger", fix={"logger.kind": "csv"})


def forget_wandb_run() -> None:
    """Remove WANDB_NAME and WANDB_RUN_ID from the environment before a multirun, with a warning.

    These variables are meant for a single run. If all jobs of a multirun had the same id, W&B would
    mix their metrics into one run.
    """
    for name in ("WANDB_NAME", "WANDB_RUN_ID"):
        if value := os.environ.pop(name, None):
            log.warning("%s=%s ignored: it is for one run, and this is a multirun", name, value)


def _wandb_id(folder: Path) -> str:
    """Return the W&B id: the id in the run folder, else WANDB_RUN_ID, else a random id."""
    if (path := folder / WANDB_ID).is_file():
        return path.read_text(encoding="utf-8").strip()
    wandb_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    if global_rank() == 0:
        write_text(path, wandb_id + "\n")
    return wandb_id


def log_samples(loggers: Sequence[Logger], samples: Sequence[Mapping[str, Any]]) -> None:
    """Log sample stories to W&B, as a table, and to TensorBoard, as texts.

    Args:
        loggers: all loggers of the run.
        samples: the stories of one validation, in the form of samples.jsonl.
    """
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

    columns = ["step", "tokens", "prompt", "temperature", "text"]
    rows = [[sample[column] for column in columns] for sample in samples]
    for logger in loggers:
        if isinstance(logger, WandbLogger) and rows:
            logger.log_table("samples", columns, rows, step=samples[0]["step"])
        elif isinstance(logger, TensorBoardLogger):
            for i, sample in enumerate(samples):
                text = f"**{sample['prompt']}**{sample['text']}"
                logger.experiment.add_text(f"samples/{i}", text, sample["step"])


def log_final(loggers: Sequence[Logger], metrics: Mapping[str, float], step: int) -> None:
    """Log hyperparameters and final metrics to TensorBoard, which shows them in its HParams tab.

    Args:
        loggers: all loggers of the run.
        metrics: final metrics by name.
        step: number of updates.
    """
    from lightning.pytorch.loggers import TensorBoardLogger

    final = {f"final/{name.removeprefix('val/')}": value for name, value in metrics.items()}
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger) and final:
            hparams: Any = logger.hparams
            logger.log_hyperparams(dict(hparams), final, step)


def finish_wandb(loggers: list[Logger], exit_code: int) -> None:
    """Close the W&B run, if there is one, and wait a limited time for the upload.

    Args:
        loggers: all loggers of the run.
        exit_code: exit code to report to W&B: 0 if the run finished, 1 otherwise.
    """
    from lightning.pytorch.loggers import WandbLogger

    if not any(isinstance(logger, WandbLogger) for logger in loggers):
        return
    import wandb

    run: Any = wandb.run
    try:
        wandb.finish(exit_code=exit_code)
    except TimeoutError:
        sync = shell_command("wandb", "sync", str(Path(run.dir).parent))
        log.warning("W&B        the upload timed out: finish it later with %s", sync)
