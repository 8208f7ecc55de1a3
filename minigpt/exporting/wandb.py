"""Upload of the model of a finished run to Weights & Biases (setting `logger.log_model`)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import WandbLogger

from minigpt.core.console import log
from minigpt.core.settings import one_line
from minigpt.exporting.config import ExportConfig
from minigpt.exporting.exporter import export
from minigpt.runs.folder import ModelFactory, Run
from minigpt.training.callbacks import ModelUpload


class WandbModel(ModelUpload):
    """Callback that uploads the best model of a run to W&B when training ends.

    The artifact `model-<id of the W&B run>` is an export in the format safetensors with bfloat16
    weights and a model card. It contains no checkpoint and no absolute paths. Commands such as
    `minigpt generate` can load it. If the export fails, a warning is logged, and the run still
    finishes.

    Args:
        model: class of the model, or a function that takes a config and returns a model; None means
            `GPT`.
    """

    def __init__(self, model: ModelFactory | None = None) -> None:
        self.model = model

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Export the best checkpoint, and pass the export to W&B for upload in the background."""
        import wandb

        runs = [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        folder = Path(trainer.default_root_dir)
        with tempfile.TemporaryDirectory() as name:
            out = Path(name) / folder.name
            try:
                export(Run.load(folder, self.model), out, ExportConfig("safetensors"))
            except Exception as error:
                log.warning("W&B        the model was not uploaded: %s", one_line(error))
                return
            for run in runs:
                artifact = wandb.Artifact(f"model-{run.id}", type="model")
                artifact.add_dir(str(out))  # copies the files
                run.log_artifact(artifact)
