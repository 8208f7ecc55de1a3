"""Export a run to files that other programs can use.

    >>> export(Run.load("runs/my-run"), "out", ExportConfig(format="hf"))
    [PosixPath('out/README.md'), PosixPath('out/config.json'), ...]

Evaluation results are exported only if they were measured on exactly the exported weights.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from minigpt.core.files import user_path, write_json, write_text
from minigpt.core.settings import UserError
from minigpt.evaluation import EvaluationConfig, evaluate
from minigpt.evaluation.corpora import own_data
from minigpt.exporting.average import average
from minigpt.exporting.card import Record, model_card
from minigpt.exporting.config import ExportConfig
from minigpt.exporting.folder import MARKER, atomic_folder, check_output, read_object
from minigpt.exporting.formats import write_gguf, write_hf, write_onnx, write_safetensors
from minigpt.exporting.html import write_html
from minigpt.kernels.choice import is_plain
from minigpt.model import GPT
from minigpt.runs.checkpoint import weights_fingerprint
from minigpt.runs.folder import Run, class_path
from minigpt.runs.names import CONFIG, EVALUATION, SUMMARY
from minigpt.runs.provenance import (
    MACHINE,
    averaged_runs,
    parent_of,
    portable_overrides,
    teachers_of,
)
from minigpt.tokenizer import Tokenizer

CARD = "README.md"
NUMBERS = ("nats_per_token", "perplexity", "bits_per_byte", "n_stories", "n_tokens")
WRITERS = {"hf": write_hf, "onnx": write_onnx, "gguf": write_gguf}


def export(
    run: Run,
    out: str | Path,
    config: ExportConfig | None = None,
    name: str | None = None,
    console: Console | None = None,
) -> list[Path]:
    """Write the model of a run, with a model card, to a folder, atomically.

    Args:
        run: a run, or an export in the format safetensors.
        out: the output folder: a new or an empty folder, or an earlier export, which is replaced.
            It must not contain a run that the export reads. One exception: an export can replace
            itself if the new format is safetensors and no weights are averaged.
        config: settings of the export; None means the defaults, with the format hf (transformers).
        name: title of the model card, such as user/name; None means the name of the output folder.
        console: console for the progress of an evaluation; None means that no progress is shown.

    Returns:
        The paths of all files in `out`, sorted.

    Raises:
        UserError: the run cannot be read, `out` is not a permitted folder, the format does not
            support the model, the weights cannot be averaged, the data for an evaluation is not
            available, or a package that the format needs is missing.
    """
    out, config = user_path(out, "out"), config or ExportConfig()
    _check_out(out, run, config)
    model, tokenizer, settings = run.load_model(), run.tokenizer, run.config
    if not is_plain(model) and config.format != "safetensors":
        problem = f"other programs cannot run {class_path(run.model or type(model))}"
        raise UserError(problem, "format", config.format, {"format": "safetensors"})
    summary = average(model, run, config.average) if config.average else run.summary
    if not run.is_export:  # a killed run has no summary.json
        summary = {"status": "unfinished", **summary}
    parent = parent_of(summary, run.folder / SUMMARY)
    teachers = teachers_of(summary, run.folder / SUMMARY)
    if parent is not None:  # without entries that only earlier versions wrote
        summary = {**summary, "init_from": dataclasses.asdict(parent)}
    portable = _portable_config(settings, run.folder / CONFIG)
    dtype: torch.dtype = getattr(torch, config.weights)
    for parameter in model.parameters():  # so that the rounded weights are evaluated
        parameter.copy_(parameter.to(dtype))
    evaluation = _stored_evaluation(run.folder, weights_fingerprint(model))
    if evaluation is None and config.evaluate:
        evaluation = _new_evaluation(model, run, summary, dtype, console)
    title, size = name or out.resolve().name, tokenizer.vocab_size
    averaged = averaged_runs(summary, run.folder / SUMMARY)
    records = portable, summary, evaluation, parent, teachers, averaged
    prompts = (settings.get("callbacks") or {}).get("prompts") or ["Once upon a time"]
    card = model_card(title, config, model, size, *records, str(prompts[0]))
    with atomic_folder(out) as folder:
        if config.format == "safetensors":
            summary = _portable_summary(summary, evaluation)
            _write_run(model, tokenizer, portable, summary, dtype, folder)
        elif config.format == "html":
            write_html(model, tokenizer, folder, title, dtype)
        else:
            WRITERS[config.format](model, tokenizer, folder)
        if evaluation is not None:
            write_json(folder / EVALUATION, evaluation)
        write_text(folder / CARD, card)
        files = sorted([MARKER, *(path.name for path in folder.iterdir())])
        marker = {"format": config.format, "dtype": config.weights, "files": files}
        write_json(folder / MARKER, marker)
    return sorted(out.iterdir())


def _check_out(out: Path, run: Run, config: ExportConfig) -> None:
    """Raise UserError unless the export may be written to `out`; see `export`."""
    is_same = out.resolve() == run.folder.resolve()
    in_place = is_same and config.format == "safetensors" and not config.average
    sources = [run.folder, *(user_path(name, "average") for name in config.average)]
    check_output(out, [] if in_place else sources)


def _write_run(
    model: GPT, tokenizer: Tokenizer, settings: Record, summary: Record, dtype: torch.dtype,
    folder: Path,
) -> None:  # fmt: skip
    """Write an export that `Run.load` can read: weights, tokenizer, settings and summary."""
    write_safetensors(model, tokenizer, folder, dtype)
    write_text(folder / CONFIG, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    write_json(folder / SUMMARY, summary)


# ---------------------------------------------------------------------------- portable records


def _portable_config(settings: Record, path: Path) -> dict[str, Any]:
    """Return the settings of a run, except init_from and those that depend on the machine.

    Of the paths of teachers, only the last components remain. `_portable_data` and
    `portable_overrides` remove or shorten the paths in the data settings and in the overrides.

    Args:
        settings: content of config.yaml.
        path: path of config.yaml, for errors.

    Raises:
        UserError: the settings have no valid data.source.
    """
    data = settings.get("data")
    if not isinstance(data, Mapping) or not isinstance(data.get("source"), str):
        raise UserError(f"{path} has no valid data.source: restore the file, or train again")
    excluded = (*MACHINE, "init_from", "data", "overrides")
    portable = {key: value for key, value in settings.items() if key not in excluded}
    portable["data"] = _portable_data(data)
    if isinstance(teacher := settings.get("teacher"), Mapping):
        names = [Path(path).name for path in teacher.get("runs") or ()]
        portable["teacher"] = {**teacher, "runs": names}
    overrides = settings.get("overrides")
    if isinstance(overrides, list) and all(isinstance(typed, str) for typed in overrides):
        portable["overrides"] = portable_overrides(overrides)
    return portable


def _portable_data(data: Record) -> dict[str, Any]:
    """Return the data settings without the data files, the cache folder and absolute paths.

    If the tokenizer is an absolute path, only the last component of the path is kept. If the
    dataset is an absolute path, nothing is kept, because the last component could be the name of
    another dataset on the Hub.
    """
    paths = ["train_files", "valid_files", "cache_dir"]
    paths += ["dataset"] if Path(data.get("dataset") or "").is_absolute() else []
    values = {key: value for key, value in data.items() if key not in paths}
    if Path(values.get("tokenizer") or "").is_absolute():
        values["tokenizer"] = Path(values["tokenizer"]).name
    return values


def _portable_summary(summary: Record, evaluation: Record | None) -> dict[str, Any]:
    """Return the summary with the results of `evaluation` instead of those from training.

    The results from training may be for weights other than the exported ones. If `evaluation` is
    None, the returned summary has no results.
    """
    portable = {k: value for k, value in summary.items() if "loss" not in k and "/" not in k}
    if evaluation is not None:
        portable["val/loss"] = evaluation["nats_per_token"]
        portable |= {f"val/{key}": evaluation[key] for key in ("perplexity", "bits_per_byte")}
    return portable


# ---------------------------------------------------------------------------- evaluation


def _stored_evaluation(folder: Path, weights: str) -> dict[str, Any] | None:
    """Return the content of evaluation.json if it belongs to the exported weights, else None.

    An unreadable file also gives None.

    Args:
        folder: folder of evaluation.json.
        weights: fingerprint of the exported weights.

    Raises:
        UserError: a result or the data settings in evaluation.json are missing or invalid.
    """
    evaluation = read_object(folder / EVALUATION)
    if evaluation.get("weights") != weights:
        return None
    data = evaluation.get("data")
    invalid = [key for key in NUMBERS if not isinstance(evaluation.get(key), int | float)]
    if invalid or not isinstance(data, Mapping):
        problem = f"{folder / EVALUATION} is damaged: {(*invalid, 'data')[0]} is missing or invalid"
        raise UserError(problem, command=("evaluate", {"ckpt": str(folder)}))
    return {**evaluation, "data": _portable_data(data)}


def _new_evaluation(
    model: GPT, run: Run, summary: dict[str, Any], dtype: torch.dtype, console: Console | None
) -> dict[str, Any]:
    """Evaluate `model` as it will be exported, and return the content of evaluation.json.

    Raises:
        UserError: the stories that the run was trained on are not available.
    """
    if own_data(run.config) is None:
        problem = f"the stories that {run.folder} was trained on are not available"
        raise UserError(f"{problem}: leave this option out", "evaluate")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_run(model, run.tokenizer, run.config, summary, dtype, folder)
        result = evaluate(Run.load(folder, run.model), EvaluationConfig(), console, folder)
    evaluation = dataclasses.asdict(result)
    return {**evaluation, "data": _portable_data(evaluation["data"])}
