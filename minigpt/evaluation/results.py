"""Results of an evaluation, and the files that they are written to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from minigpt.analysis.embeddings import Tokens
from minigpt.core.settings import UserError
from minigpt.data.config import DataConfig
from minigpt.evaluation.config import EvaluationConfig
from minigpt.evaluation.corpora import Scores
from minigpt.evaluation.stories import Temperature

_FILES = ("train_files", "valid_files")  # settings that are lists of paths


@dataclass(frozen=True)
class Evaluation(Scores):
    """Content of evaluation.json: the loss, the generated stories and the embedding probes."""

    checkpoint: str  # name of the checkpoint file
    weights: str  # fingerprint of the weights
    parameters: int
    device: str
    precision: str
    stride: int | None
    seed: int
    temperatures: list[Temperature]
    novelty_stories: int  # number of training stories that novelty was measured against
    neighbours: dict[str, Tokens | str]  # nearest tokens of each word, or why there are none
    analogies: dict[str, Tokens | str]  # answers to each analogy, or why there are none


def check_writable(folder: Path, name: str = "evaluation.json") -> None:
    """Create `folder` if it is missing; raise UserError if no file can be created in it.

    The error says that the file `name` cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = f"cannot write {name} ({error.strerror}); choose another folder"
        raise UserError(problem, "out", str(folder)) from None


def evaluation_name(config: EvaluationConfig, evaluation: Evaluation) -> str:
    """Return the name of the file to write an evaluation to.

    The name consists of "evaluation" and a part for each of the following that applies: the source
    of `config.data`, if this is set, with a hash of these settings if they name files or a
    dataset, so that each text has its own file; "tuning" for data.valid=tuning; "v1" if only the
    stories from TinyStories V1 are scored; and `config.context` and `config.stride`, if these are
    set.

    Args:
        config: settings of the evaluation.
        evaluation: the evaluation.

    Returns:
        The name, such as "evaluation-stride128.json".
    """
    return file_name("evaluation", config, evaluation.data["valid"] == "tuning", evaluation.valid)


def file_name(start: str, config: EvaluationConfig, is_tuning: bool, valid: str | None) -> str:
    """Return the name of a file of results: `start`, then the parts listed in `evaluation_name`."""
    parts = [
        start,
        config.data.source if config.data else "",
        _hash(config.data) if config.data and config.data.source in ("text", "hf") else "",
        "tuning" if is_tuning else "",
        "v1" if valid == "v1" else "",
        f"context{config.context}" if config.context else "",
        f"stride{config.stride}" if config.stride else "",
    ]
    return "-".join(filter(None, parts)) + ".json"


def _hash(data: DataConfig) -> str:
    """Return eight hexadecimal digits for data settings; paths count as absolute paths."""
    paths = {name: list(map(os.path.abspath, getattr(data, name))) for name in _FILES}
    settings = {**dataclasses.asdict(data), **paths, "cache_dir": None}
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=4).hexdigest()
