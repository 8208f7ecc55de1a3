"""Read the results of runs from their folders, and make small copies of the folders.

    >>> runs = [read_run(folder) for folder in find_runs([Path("runs")])]

A W&B agent, a Hydra sweep and a single training run write the same files.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from minigpt.core.files import refuse_links_out, write_json, write_text
from minigpt.core.settings import UserError, flat
from minigpt.core.text import human_count
from minigpt.data.config import DataConfig
from minigpt.model import GPTConfig
from minigpt.runs.folder import Run
from minigpt.runs.names import CONFIG, METRICS, SUMMARY
from minigpt.runs.provenance import (
    Parent,
    own_teachers,
    parent_of,
    portable_overrides,
    teachers_of,
    total_tokens,
)
from minigpt.runs.records import Row, last_values, read_metrics, read_summary, series

LATE = 0.05  # final fraction of a run over which the training loss is averaged
_COMPARED = (  # settings that should be equal in a group of runs, besides all optimizer settings
    "model.dropout", "model.embedding_scale", "model.residual_init", "data.batch_size",
    "data.holdout", "data.random_offset", "data.noise", "data.vocab_size", "data.shuffle",
)  # fmt: skip
COPIED_ROWS = 200  # maximum number of training rows before the last 5 % in a copied metrics.csv


@dataclass(frozen=True)
class ReferenceModel:
    """Reference model, trained on 104M tokens of the full TinyStories corpus.

    Its vocabulary has 3,000 tokens.
    """

    parameters: int
    perplexity: float  # validation
    flops_per_token: int  # training FLOPs, from GPT.flops_per_token for the same shape
    tokens: int = 104_000_000  # seen in training


REFERENCE = (
    ReferenceModel(1_046_656, 17.75, 8_202_240),
    ReferenceModel(3_404_032, 10.23, 24_268_800),
    ReferenceModel(7_072_128, 8.08, 48_199_680),
)


@dataclass(frozen=True)
class RunResult:
    """Result of one run. A number that was not measured, or is not finite, is None."""

    path: Path
    model: str  # option of the config group `model`, such as small
    data: str  # value of the setting data.source
    corpus: str  # `data`, with the names of text files, `max_stories` and a non-default vocabulary
    recipe: str  # such as "adamw, unscaled embeddings" or "muon, from <run>, averaged"
    seed: int
    status: str  # finished, interrupted or failed; unfinished if running or killed
    parameters: int | None
    non_embedding_parameters: int | None
    tokens: int | None  # seen in training, including those of the parent run
    teacher_tokens: int | None  # seen by all teachers; 0 without teachers, None if unknown
    own_tokens: int | None  # the part of `tokens` that the run itself has seen, without its parent
    train_tokens: int | None  # size of the training split
    flops_per_token: int | None  # training FLOPs
    train_loss: float | None  # mean over the last 5 % of the run, with dropout
    loss: float | None  # nats per token over the validation split, at the end of the run
    best_loss: float | None  # lowest validation loss during the run
    perplexity: float | None
    bits_per_byte: float | None
    # (tokens seen, validation loss); empty if the tokens of the parent run are unknown
    curve: tuple[tuple[float, float], ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)  # should be equal in a group

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self.path.resolve().name

    @property
    def group(self) -> str:
        """Label of the group of comparable runs that this run is in: data, tokens seen, recipe.

        If the tokens of the parent run are unknown, the label has those of the run itself.
        """
        unknown = dict.fromkeys([None, self.own_tokens])  # of the parent run, or of both
        counts = unknown if self.tokens is None else [self.tokens]
        tokens = " + ".join("unknown" if n is None else human_count(n) for n in counts)
        return ", ".join(filter(None, (self.corpus, f"{tokens} tokens", self.recipe)))

    @property
    def point(self) -> tuple[int, float] | None:
        """Parameter count and perplexity; None if the run is unfinished or a number is missing."""
        if self.status != "finished" or self.parameters is None or self.perplexity is None:
            return None
        return self.parameters, self.perplexity

    @property
    def epochs(self) -> float | None:
        """Number of passes of the run itself, without its parent, over its training split.

        The number is None if the size of the split or the number of tokens is unknown.
        """
        if self.own_tokens is None or not self.train_tokens:
            return None
        return self.own_tokens / self.train_tokens

    @property
    def reference_perplexity(self) -> float | None:
        """Perplexity of the reference model of this size; None if there is no such model."""
        return {model.parameters: model.perplexity for model in REFERENCE}.get(self.parameters or 0)


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Return the run folders among `folders` and below them, without duplicates.

    A run folder contains config.yaml and at least one of summary.json and metrics.csv. Hidden
    folders and the folders inside a run are not searched.

    Args:
        folders: folders to search. A checkpoint file stands for its run folder.

    Returns:
        The run folders, sorted within each of `folders`.

    Raises:
        UserError: a folder does not exist, or no folder contains a run.
    """
    runs: dict[Path, Path] = {}
    for folder in folders:
        if folder.is_file():
            folder = Run.load(folder).folder
        if not folder.is_dir():
            raise UserError("is not a folder; give one that contains runs", "folders", str(folder))
        for name, below, files in os.walk(folder):
            below[:] = sorted(inner for inner in below if not inner.startswith("."))
            if CONFIG in files and (SUMMARY in files or METRICS in files):
                runs.setdefault(Path(name).resolve(), Path(name))
                below.clear()
    if not runs:
        names = " or ".join(map(str, folders))
        raise UserError(f"no run found in {names}", command=("train", {"experiment": "quickstart"}))
    return list(runs.values())


def read_run(path: Path) -> RunResult:
    """Return the result of a run, which may be unfinished.

    Args:
        path: the run folder.

    Raises:
        UserError: config.yaml is missing, a file of the run is damaged, or a link in the run folder
            points outside the folder. The message names the file.
    """
    refuse_links_out(path)
    summary, config, rows = read_summary(path), Run(path, path).config, read_metrics(path)
    known = {name: value for name, value in summary.items() if value is not None}
    numbers: dict[str, Any] = last_values(rows) | known

    def number(name: str) -> Any:
        value = numbers.get(name)
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{path / SUMMARY}: {name} must be a number, not {value!r}: correct it")
        return value

    parent, teachers = parent_of(summary, path / SUMMARY), teachers_of(summary, path / SUMMARY)
    before = parent.tokens if parent else 0
    own = None if (tokens := number("tokens")) is None else int(tokens)
    points = zip(*series(rows, "val/loss"), strict=True)
    losses = [(seen, loss) for seen, loss in points if math.isfinite(loss)]
    try:
        data, corpus, seed = config["data"]["source"], _corpus(config["data"]), config["seed"]
    except (KeyError, TypeError):
        raise UserError(f"{path / CONFIG} lacks data.source or seed: restore the file") from None
    return RunResult(
        path=path,
        model=numbers.get("model", "unknown"),
        data=data,
        corpus=corpus,
        recipe=_recipe(config, summary, parent, own_teachers(summary, path / SUMMARY)),
        seed=seed,
        status=numbers.get("status", "unfinished"),
        parameters=number("parameters"),
        non_embedding_parameters=number("non_embedding_parameters"),
        tokens=None if before is None or own is None else before + own,
        teacher_tokens=total_tokens(teachers),
        own_tokens=own,
        train_tokens=number("train_tokens"),
        flops_per_token=number("flops_per_token"),
        train_loss=late_training_loss(rows),
        loss=number("val/loss"),
        best_loss=number("best_val_loss"),
        perplexity=number("val/perplexity"),
        bits_per_byte=number("val/bits_per_byte"),
        curve=() if before is None else tuple((before + seen, loss) for seen, loss in losses),
        settings=_settings(config, parent, teachers) | {"train_tokens": number("train_tokens")},
    )


def _corpus(data: dict[str, Any]) -> str:
    dataset = data.get("dataset")
    files = [Path(name).name for name in data.get("train_files") or ()]
    files += [Path(dataset).name if Path(dataset).is_absolute() else dataset] if dataset else []
    names = f" of {', '.join(files[:2])}" if files else ""
    more = f" and {len(files) - 2} more" if len(files) > 2 else ""
    size = data.get("vocab_size") or DataConfig.vocab_size
    vocabulary = "" if size == DataConfig.vocab_size else f", vocabulary {size}"
    stories = f", {limit:,} stories" if (limit := data.get("max_stories")) else ""
    split = data.get("split")
    parts = [data.get("subset"), split if split != DataConfig.split else None]
    parts += [f"validated on {data[key]}" for key in ("valid_split", "valid") if data.get(key)]
    files = [Path(name).name for name in data.get("valid_files") or ()]
    parts += [f"validated on {', '.join(files)}"] if files else []
    details = "".join(f", {part}" for part in parts if part)
    return f"{data['source']}{names}{more}{details}{stories}{vocabulary}"


def _recipe(
    config: dict[str, Any], summary: dict[str, Any], parent: Parent | None, teachers: list[Parent]
) -> str:
    scale = (config.get("model") or {}).get("embedding_scale")
    cycles = (config.get("optimizer") or {}).get("cycles")
    # The summary names the parent, and a run in progress has no summary yet.
    start = parent.name if parent else "another run" if config.get("init_from") else None
    taught = bool((config.get("teacher") or {}).get("runs"))
    names = " and ".join(teacher.name for teacher in teachers) or ("another run" if taught else "")
    context = (config.get("model") or {}).get("context_length", GPTConfig.context_length)
    parts = (
        (config.get("optimizer") or {}).get("name"),
        context != GPTConfig.context_length and f"context {context}",
        scale == 1 and "unscaled embeddings",
        cycles and f"mean over {cycles} cycles",
        start and f"from {start}",
        names and f"taught by {names}",
        bool(summary.get("averaged")) and "averaged",  # by minigpt export
    )
    return ", ".join(part for part in parts if part)


def _settings(
    config: dict[str, Any], parent: Parent | None, teachers: list[Parent]
) -> dict[str, Any]:
    values = flat(config)
    optimizer = [name for name in values if name.startswith("optimizer.")]
    if not values.get("optimizer.cycles"):  # then the other settings of cycles have no effect
        optimizer = [name for name in optimizer if not name.startswith("optimizer.cycle_")]
    names = [*_COMPARED, *optimizer, "trainer.accumulate_grad_batches"]
    names += ["teacher.weight", "teacher.temperature"] if teachers else []
    settings = {name: values[name] for name in names if name in values}
    settings |= {"init_from": parent.weights} if parent else {}
    return settings | ({"teachers": [t.weights for t in teachers]} if teachers else {})


def late_training_loss(rows: list[Row]) -> float | None:
    """Return the mean training loss of the steps logged in the last 5 % of the tokens so far.

    In a finished run with the default schedule, the learning rate of these steps is close to zero,
    so the weights hardly change. The result is None if no such step was logged or if a loss is not
    finite.
    """
    late = [row["train/loss"] for row in rows if "train/loss" in row and _is_late(row, rows)]
    return fmean(late) if late and all(map(math.isfinite, late)) else None


def _is_late(row: Row, rows: list[Row]) -> bool:
    return row["tokens"] >= (1 - LATE) * rows[-1]["tokens"]


# ---------------------------------------------------------------------------- copies of runs


def keep_run(path: Path, into: Path) -> Path:
    """Copy the records of a run to a folder in `into`; the copy is small enough for a repository.

    The copy contains summary.json, config.yaml and metrics.csv. In config.yaml, absolute paths are
    reduced to their last component. The copy of metrics.csv keeps the rows of all validations, the
    rows of the last 5 % of training, and at most 200 earlier rows.

    Args:
        path: the run folder.
        into: folder for the copies, created if missing.

    Returns:
        The folder of the copy.

    Raises:
        UserError: `into` contains another run of the same name, or a file of the run is unreadable.
    """
    config, summary = Run(path, path).config, read_summary(path)
    folder = into / path.resolve().name
    if folder.resolve() == path.resolve():
        return folder
    if folder.is_dir() and read_summary(folder) != summary:
        raise UserError(f"{folder} contains another run: remove that folder or rename {path}")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / METRICS, _thinned(read_metrics(path)))
    write_json(folder / SUMMARY, summary)
    settings = portable(config)
    if isinstance(typed := config.get("overrides"), list):
        settings["overrides"] = portable_overrides([o for o in typed if isinstance(o, str)])
    write_text(folder / CONFIG, yaml.safe_dump(settings, sort_keys=False))
    return folder


def portable(value: Any) -> Any:
    """Return `value` with every absolute path reduced to its last component."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _thinned(rows: list[Row]) -> str:
    every = max(1, math.ceil(len(rows) / COPIED_ROWS))
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    for i, row in enumerate(rows):
        if i % every == 0 or "val/loss" in row or _is_late(row, rows):
            writer.writerow({name: f"{value:.8g}" for name, value in row.items()})
    return text.getvalue()
