"""Export a run as files that others can use.

    >>> export(Run.load("runs/my-run"), "out", ExportConfig(format="hf"))
    [PosixPath('out/README.md'), PosixPath('out/config.json'), ...]

The numbers in an export are those that were measured on the very weights in it, which their
fingerprint tells, or none.
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
from minigpt.exporting.card import Record, model_card
from minigpt.exporting.config import ExportConfig
from minigpt.exporting.folder import MARK, check_output, read_object, whole_folder
from minigpt.exporting.formats import write_gguf, write_hf, write_onnx, write_safetensors
from minigpt.kernels.decode import is_plain
from minigpt.model import GPT
from minigpt.runs.checkpoint import weights_fingerprint
from minigpt.runs.folder import Run, class_path
from minigpt.runs.names import CONFIG, EVALUATION, SUMMARY
from minigpt.runs.provenance import MACHINE, Parent, parent_of, portable_overrides
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
    """Write the model of `run` and its model card into the folder `out`.

    The folder is written beside its place and renamed when it is whole.

    Args:
        run: a run, or an export in our own format.
        out: new, empty, or an earlier export, which is replaced.
        config: what to write; None means the format of transformers.
        name: title of the model card, such as user/name; None means the name of the folder.
        console: where to show the progress of an evaluation; None means nowhere.

    Returns:
        The files in `out`.

    Raises:
        UserError: `out` is neither new, empty nor an earlier export, or is the run itself; the run
            cannot be read; a package is missing.
    """
    out, config = user_path(out, "out"), config or ExportConfig()
    check_output(out)
    if out.resolve() == run.folder.resolve() and config.format != "safetensors":
        problem = f"is the model itself, which {config.format} would replace: give a new folder"
        raise UserError(problem, "out", str(out))
    net, tokenizer, settings = run.load_model(), run.tokenizer, run.config
    if not is_plain(net) and config.format != "safetensors":
        problem = f"no other program computes {class_path(run.model or type(net))}"
        raise UserError(problem, "format", config.format, {"format": "safetensors"})
    summary = run.summary
    parent = parent_of(summary, run.folder / SUMMARY)
    if parent is not None:  # without what earlier versions wrote about it
        summary = {**summary, "init_from": dataclasses.asdict(parent)}
    if config.average:
        _average(net, run, parent)
        summary = {**summary, "averaged": True}
    portable = _portable_config(settings, run.folder / CONFIG)
    dtype: torch.dtype = getattr(torch, config.weights)
    for parameter in net.parameters():  # round to what is read back; positions are no parameter
        parameter.copy_(parameter.to(dtype))
    evaluation = _measured(run.folder, weights_fingerprint(net))
    if evaluation is None and config.evaluate:
        evaluation = _measure(net, run, summary, dtype, console)
    title, size = name or out.resolve().name, tokenizer.vocab_size
    card = model_card(title, config, net, size, portable, summary, evaluation, parent)
    with whole_folder(out) as folder:
        if config.format == "safetensors":
            summary = _portable_summary(summary, evaluation)
            _write_run(net, tokenizer, portable, summary, dtype, folder)
        else:
            WRITERS[config.format](net, tokenizer, folder)
        if evaluation is not None:
            write_json(folder / EVALUATION, evaluation)
        write_text(folder / CARD, card)
        files = sorted([MARK, *(path.name for path in folder.iterdir())])
        mark = {"format": config.format, "dtype": config.weights, "files": files}
        write_json(folder / MARK, mark)
    return sorted(out.iterdir())


def _write_run(
    net: GPT, tokenizer: Tokenizer, settings: Record, summary: Record, dtype: torch.dtype,
    folder: Path,
) -> None:  # fmt: skip
    """Write what `Run.load` takes for a run."""
    write_safetensors(net, tokenizer, folder, dtype)
    write_text(folder / CONFIG, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    write_json(folder / SUMMARY, summary)


def _average(net: GPT, run: Run, parent: Parent | None) -> None:
    """Make `net` the mean of itself and of the weights that its run began with.

    Both lie in one valley of the loss, in whose middle it is lower than at either side (Izmailov et
    al. 2018, https://arxiv.org/abs/1803.05407; measured here: docs/LOG.md, 2026-11-25).
    """
    path = run.config.get("init_from")
    if parent is None or not isinstance(path, str):
        raise UserError("leave it out: this run began with no weights of another", "average")
    first = Run.load(path, run.model).load_model()
    if weights_fingerprint(first) != parent.weights:
        problem = f"{path} no longer holds the weights that the run began with: restore it, or"
        raise UserError(problem, "average", fix={"average": False})
    for weight, other in zip(net.parameters(), first.parameters(), strict=True):
        weight.lerp_(other, 0.5)


# ---------------------------------------------------------------------------- the run, portable


def _portable_config(settings: Record, path: Path) -> dict[str, Any]:
    """Return the settings without those of the machine. `path` is where they were read."""
    data = settings.get("data")
    if not isinstance(data, Mapping) or not isinstance(data.get("source"), str):
        raise UserError(f"{path} does not hold data.source: restore the file, or train again")
    left_out = (*MACHINE, "init_from", "data", "overrides")
    portable = {key: value for key, value in settings.items() if key not in left_out}
    portable["data"] = _portable_data(data)
    overrides = settings.get("overrides")
    if isinstance(overrides, list) and all(isinstance(typed, str) for typed in overrides):
        portable["overrides"] = portable_overrides(overrides)
    return portable


def _portable_data(data: Record) -> dict[str, Any]:
    """Return the settings of a corpus without paths: TinyStories is found by name."""
    paths = ("train_files", "valid_files", "cache_dir")
    values = {key: value for key, value in data.items() if key not in paths}
    if Path(values.get("dataset") or "").is_absolute():
        values["dataset"] = Path(values["dataset"]).name
    return values


def _portable_summary(summary: Record, evaluation: Record | None) -> dict[str, Any]:
    """Return the summary with the losses of the exported weights instead of those in training."""
    portable = {k: value for k, value in summary.items() if "loss" not in k and "/" not in k}
    if evaluation is not None:
        names = {
            "loss": "nats_per_token",
            "perplexity": "perplexity",
            "bits_per_byte": "bits_per_byte",
        }
        portable |= {f"val/{name}": evaluation[key] for name, key in names.items()}
    return portable


# ---------------------------------------------------------------------------- what is measured


def _measured(folder: Path, weights: str) -> dict[str, Any] | None:
    """Return the run's evaluation.json if it was measured on the weights of this fingerprint."""
    evaluation = read_object(folder / EVALUATION)
    if evaluation.get("weights") != weights:
        return None
    data = evaluation.get("data")
    wrong = [key for key in NUMBERS if not isinstance(evaluation.get(key), int | float)]
    if wrong or not isinstance(data, Mapping):
        raise UserError(
            f"{folder / EVALUATION} is not what an evaluation writes: {(*wrong, 'data')[0]}",
            command=("evaluate", {"ckpt": str(folder)}),
        )
    return {**evaluation, "data": _portable_data(data)}


def _measure(
    net: GPT, run: Run, summary: dict[str, Any], dtype: torch.dtype, console: Console | None
) -> dict[str, Any]:
    """Evaluate `net`, which holds the rounded weights of `run`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_run(net, run.tokenizer, run.config, summary, dtype, folder)
        result = evaluate(Run.load(folder, run.model), EvaluationConfig(), console, folder)
    evaluation = dataclasses.asdict(result)
    return {**evaluation, "data": _portable_data(evaluation["data"])}
