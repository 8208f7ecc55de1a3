"""Export a run as files that others can use.

    >>> export(Run.load("runs/my-run"), "out", ExportConfig(format="hf"))
    [PosixPath('out/README.md'), PosixPath('out/config.json'), ...]

The numbers in an export are those that were measured on the very weights in it, which their
fingerprint tells, or none.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from rich.console import Console

from minigpt.core.files import write_json, write_text
from minigpt.core.settings import UserError
from minigpt.evaluation import EvaluationConfig, evaluate
from minigpt.exporting.card import model_card
from minigpt.exporting.folder import MARK, check_output, read_object, whole_folder
from minigpt.exporting.formats import write_gguf, write_hf, write_onnx, write_safetensors
from minigpt.model import GPT
from minigpt.runs.checkpoint import weights_fingerprint
from minigpt.runs.folder import Run, class_path
from minigpt.runs.names import CONFIG, EVALUATION, SUMMARY
from minigpt.runs.provenance import MACHINE, Parent, parent_of, portable_overrides
from minigpt.tokenizer import Tokenizer

CARD = "README.md"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUMBERS = ("nats_per_token", "perplexity", "bits_per_byte", "n_stories", "n_tokens")
WRITERS = {"hf": write_hf, "onnx": write_onnx, "gguf": write_gguf}


@dataclass(frozen=True)
class ExportConfig:
    """What to write."""

    format: Literal["hf", "safetensors", "onnx", "gguf"] = "hf"
    """Format of the files: of transformers, of this project, ONNX, or of llama.cpp."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the weights; None means bfloat16 for safetensors, else float32."""

    evaluate: bool = False
    """Whether to evaluate the exported weights if no evaluation of them is there."""

    license: str | None = None
    """License of the weights as the Hub spells it, such as mit; None leaves it to the data."""

    average: bool = False
    """Whether to export the mean of the weights and of those that the run began with."""

    def __post_init__(self) -> None:
        if self.license is not None and not re.fullmatch(r"[\w.-]+", self.license):
            raise UserError(
                "not the name of a license as the Hugging Face Hub spells it, such as mit or "
                "cc-by-4.0",
                "license",
                self.license,
            )
        if self.dtype == "bfloat16" and self.format != "safetensors":
            raise UserError(
                f"the format {self.format} is float32, which is exact; leave this out or",
                "dtype",
                self.dtype,
                fix={"format": "safetensors"},
            )

    @property
    def weights(self) -> str:
        """Type of the exported weights: a key of DTYPES."""
        return self.dtype or ("bfloat16" if self.format == "safetensors" else "float32")


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
    out, config = Path(out), config or ExportConfig()
    check_output(out)
    if out.resolve() == run.folder.resolve() and config.format != "safetensors":
        raise UserError(
            f"is the model itself, which the format {config.format} would replace: give a new "
            "folder",
            "out",
            str(out),
        )
    net, tokenizer, settings = run.load_model(), run.tokenizer, run.config
    if type(net) is not GPT and config.format != "safetensors":
        raise UserError(
            f"no other program computes {class_path(type(net))}",
            "format",
            config.format,
            fix={"format": "safetensors"},
        )
    summary = run.summary
    parent = parent_of(summary, run.folder / SUMMARY)
    if parent is not None:  # without what earlier versions wrote about it
        summary = {**summary, "init_from": dataclasses.asdict(parent)}
    if config.average:
        _average(net, run, parent)
        summary = {**summary, "averaged": True}
    portable = _portable_config(settings, run.folder / CONFIG)
    dtype = DTYPES[config.weights]
    _round(net, dtype)  # to what will be read back
    evaluation = _measured(run.folder, weights_fingerprint(net))
    if evaluation is None and config.evaluate:
        evaluation = _measure(net, run, summary, dtype, console)
    card = model_card(
        name=name or out.resolve().name,
        format=config.format,
        dtype=config.weights,
        net=net,
        vocabulary=tokenizer.vocab_size,
        config=portable,
        summary=summary,
        evaluation=evaluation,
        parent=parent,
        license=config.license,
    )
    with whole_folder(out) as folder:
        if config.format == "safetensors":
            _write_run(
                net, tokenizer, portable, _portable_summary(summary, evaluation), dtype, folder
            )
        else:
            WRITERS[config.format](net, tokenizer, folder)
        if evaluation is not None:
            write_json(folder / EVALUATION, evaluation)
        write_text(folder / CARD, card)
        files = sorted([MARK, *(path.name for path in folder.iterdir())])
        write_json(
            folder / MARK, {"format": config.format, "dtype": config.weights, "files": files}
        )
    return sorted(out.iterdir())


def _write_run(
    net: GPT,
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    summary: dict[str, Any],
    dtype: torch.dtype,
    folder: Path,
) -> None:
    """Write what `Run.load` takes for a run."""
    write_safetensors(net, tokenizer, folder, dtype)
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    write_text(folder / CONFIG, text)
    write_json(folder / SUMMARY, summary)


@torch.no_grad()
def _average(net: GPT, run: Run, parent: Parent | None) -> None:
    """Make `net` the mean of itself and of the weights that its run began with.

    Both lie in one valley of the loss, in whose middle it is lower than at either side (Izmailov et
    al. 2018, https://arxiv.org/abs/1803.05407; measured here: docs/LOG.md, 2026-11-25).
    """
    path = run.config.get("init_from")
    if parent is None or not isinstance(path, str):
        raise UserError(
            "takes the mean with the weights that a run began with; this one began with random "
            "weights, or is an export",
            "average",
            fix={"average": False},
        )
    first = Run.load(path, run.model).load_model()
    if weights_fingerprint(first) != parent.weights:
        raise UserError(
            f"{path} no longer holds the weights that the run began with: restore it, or",
            "average",
            fix={"average": False},
        )
    for weight, other in zip(net.parameters(), first.parameters(), strict=True):
        weight.lerp_(other, 0.5)


@torch.no_grad()
def _round(net: GPT, dtype: torch.dtype) -> None:
    """Make every parameter one that `dtype` can hold; the positions are no parameter."""
    for parameter in net.parameters():
        parameter.copy_(parameter.to(dtype))


# ---------------------------------------------------------------------------- the run, portable


def _portable_config(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
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


def _portable_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a corpus without paths: TinyStories is found by name."""
    paths = ("train_files", "valid_files", "cache_dir")
    return {key: value for key, value in data.items() if key not in paths}


def _portable_summary(
    summary: Mapping[str, Any], evaluation: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the summary with the losses of the exported weights instead of those in training."""
    kept = {key: value for key, value in summary.items() if "loss" not in key and "/" not in key}
    if evaluation is not None:
        kept["val/loss"] = evaluation["nats_per_token"]
        kept["val/perplexity"] = evaluation["perplexity"]
        kept["val/bits_per_byte"] = evaluation["bits_per_byte"]
    return kept


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
