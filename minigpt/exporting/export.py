"""A run out as files that others can use: `minigpt export`.

    >>> export(Run.open("runs/my-run"), Path("out"), ExportConfig(format="hf"))
    [PosixPath('out/README.md'), PosixPath('out/config.json'), ...]

The folder is written beside its place and renamed when it is whole. An earlier export is replaced;
any other folder with something in it is left as it is. The numbers in it are those that were
measured on the very weights that are exported, which their fingerprint tells, or none.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from rich.console import Console

from minigpt.core.files import read_json, write_json, write_text
from minigpt.core.settings import UserError
from minigpt.evaluation import EvaluationConfig, evaluate
from minigpt.exporting.card import (
    CONFIG_FACTS,
    EVALUATION_FACTS,
    SUMMARY_FACTS,
    model_card,
)
from minigpt.exporting.formats import (
    write_gguf,
    write_hf,
    write_onnx,
    write_safetensors,
)
from minigpt.model import GPT
from minigpt.runs.checkpoint import weights_fingerprint
from minigpt.runs.folder import Run
from minigpt.runs.names import CONFIG, EVALUATION, SUMMARY, TOKENIZER
from minigpt.runs.provenance import Origin, origin
from minigpt.runs.records import check_facts, read_summary

CARD = "README.md"
MARK = "export.json"  # says that this is an export, and which files belong to it
ALSO = ("report.html", "evaluation*.json")  # what evaluate.py may leave in one
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Format = Literal["hf", "safetensors", "onnx", "gguf"]


@dataclass(frozen=True)
class ExportConfig:
    """What to write."""

    format: Format = "hf"
    dtype: Literal["float32", "bfloat16"] | None = None  # None: bfloat16 for safetensors
    evaluate: bool = False  # measure the exported weights if nobody has
    license: str | None = None  # of the weights, for the model card, as the Hub spells it: mit
    average: bool = False  # the mean of these weights and of those the run began with (init_from)

    def __post_init__(self) -> None:
        if self.license is not None and not re.fullmatch(r"[\w.-]+", self.license):
            raise UserError(
                f"--license {self.license} is not the name of a licence: type one as the Hugging "
                "Face Hub spells it, such as mit or cc-by-4.0"
            )
        if self.dtype == "bfloat16" and self.format != "safetensors":
            raise UserError(
                f"--format {self.format} is float32, which is exact: leave out --dtype, or take "
                "--format safetensors"
            )

    @property
    def weights(self) -> str:
        """The dtype of the exported weights: a key of DTYPES."""
        return self.dtype or ("bfloat16" if self.format == "safetensors" else "float32")


def export(
    run: Run,
    out: Path,
    config: ExportConfig,
    name: str | None = None,
    console: Console | None = None,
) -> list[Path]:
    """Write the model of `run` into the folder `out`; returns the files in it.

    Args:
        run: a run, or an export in our own format.
        out: new, empty, or an earlier export, which is replaced.
        config: the format.
        name: for the model card, such as user/name; None: what the folder is called.
        console: where to show the progress of an evaluation; None: nowhere.

    Raises:
        UserError: `out` is neither new, empty nor an earlier export, or is the run itself; the run
            cannot be read; a package is missing.
    """
    check_place(out)
    if out.resolve() == run.folder.resolve() and config.format != "safetensors":
        raise UserError(
            f"{out} is the model itself, which --format {config.format} would replace: give a new "
            "folder"
        )
    net, summary = run.load_net(), run.summary
    check_facts(run.config, CONFIG_FACTS, run.folder / CONFIG)
    check_facts(summary, SUMMARY_FACTS, run.folder / SUMMARY)
    began = origin(summary, run.folder / SUMMARY)
    if config.average:
        _average(run, net, began)
        summary = {**summary, "averaged": True}
    _round(net, DTYPES[config.weights])  # to what will be read back
    evaluation = _known_evaluation(run.folder, net)
    if evaluation is None and config.evaluate:
        evaluation = _measure(run, net, config, console)
    with _whole_folder(out) as folder:
        _write_files(run, net, summary, evaluation, folder, config)
        card = model_card(
            name=name or out.resolve().name,
            format=config.format,
            dtype=config.weights,
            config=run.config,
            summary=summary,
            evaluation=evaluation,
            n_parameters=net.n_parameters,
            vocabulary=run.load_tokenizer().vocab_size,
            license=config.license,
            origin=began,
        )
        write_text(folder / CARD, card)
        files = sorted([MARK, *(path.name for path in folder.iterdir())])
        write_json(
            folder / MARK, {"format": config.format, "dtype": config.weights, "files": files}
        )
    return sorted(out.iterdir())


def _write_files(
    run: Run,
    net: GPT,
    summary: dict[str, Any],
    evaluation: dict[str, Any] | None,
    folder: Path,
    config: ExportConfig,
) -> None:
    """All but the model card."""
    tokenizer = run.load_tokenizer()
    if config.format == "safetensors":
        write_safetensors(net, folder, DTYPES[config.weights])
        tokenizer.save(folder / TOKENIZER)
        _write_yaml(folder / CONFIG, portable_config(run.config))
        write_json(folder / SUMMARY, _portable_summary(summary, evaluation))
    else:
        writers = {"hf": write_hf, "onnx": write_onnx, "gguf": write_gguf}
        writers[config.format](net, tokenizer, folder)
    if evaluation is not None:
        write_json(folder / EVALUATION, evaluation)


@torch.no_grad()
def _average(run: Run, net: GPT, began: Origin | None) -> None:
    """Make `net`, the model of `run`, the mean of itself and of the weights that `run` began with.

    Both lie in one valley of the loss, in whose middle it is lower than at either side (Izmailov et
    al. 2018, https://arxiv.org/abs/1803.05407; measured here: docs/LOG.md, 2026-11-25).
    """
    asked = run.config.get("init_from")
    if began is None or not isinstance(asked, str):
        raise UserError(
            "--average takes the mean with the weights that a run began with, and this one began "
            "with random ones, or is an export: leave it out"
        )
    other = Run.open(asked).load_net()
    if weights_fingerprint(other) != began.weights:
        raise UserError(
            f"{asked} is no longer what the run began with: restore it, or leave out --average"
        )
    for weight, first in zip(net.parameters(), other.parameters(), strict=True):
        weight.lerp_(first, 0.5)


@torch.no_grad()
def _round(net: GPT, dtype: torch.dtype) -> None:
    """Make every parameter one that `dtype` can hold; the positions are no parameter."""
    for parameter in net.parameters():
        parameter.copy_(parameter.to(dtype))


# ---------------------------------------------------------------------------- the folder


def check_place(out: Path) -> None:
    """Raises UserError unless `out` is new, empty, or an earlier export with nothing added.

    The current folder cannot be replaced, nor one above it: programs would go on in a removed one.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file: give a new folder to export into")
    present = {path.name for path in out.iterdir()}
    ours = {path.name for pattern in ALSO for path in out.glob(pattern)}
    listed = _read_json(out / MARK).get("files")
    if isinstance(listed, list):
        ours |= set(map(str, listed))
    foreign = sorted(present - ours if MARK in present else present)
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(
            f"{out} holds {foreign[0]}{more}, which no export made: give a new folder, or move "
            "that away"
        )
    if Path.cwd().is_relative_to(out.resolve()):
        raise UserError(
            f"{out.resolve()}, which an export would replace, is the current folder or above it: "
            "type cd .. first, or give another folder"
        )


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when the body is through, or disappears.

    What was at `out` is removed once the new folder is there, and put back if that never comes.
    """
    place = out.resolve()
    folder = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    old = place.with_name(f".{place.name}.{os.getpid()}.old")
    try:
        folder.mkdir(parents=True)
        yield folder
        if place.exists():
            place.rename(old)
        folder.rename(place)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if old.exists() and not place.exists():
            old.rename(place)


# ---------------------------------------------------------------------------- the run, portable


def portable_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that say what the model is, without those of the machine it was made on."""
    left_out = ("runs_dir", "resume", "init_from", "logger", "callbacks", "data")
    kept = {key: value for key, value in settings.items() if key not in left_out}
    return kept | {"data": portable_data(settings["data"])}


def portable_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a corpus without paths: TinyStories is found by name, own files are not."""
    paths = ("train_files", "valid_files", "cache_dir")
    return {key: value for key, value in data.items() if key not in paths}


def _portable_summary(
    summary: Mapping[str, Any], evaluation: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The run's summary with the losses of the exported weights instead of those in training."""
    kept = {key: value for key, value in summary.items() if "loss" not in key and "/" not in key}
    if evaluation is not None:
        kept["val/loss"] = evaluation["nats_per_token"]
        kept["val/perplexity"] = evaluation["perplexity"]
        kept["val/bits_per_byte"] = evaluation["bits_per_byte"]
    return kept


# ---------------------------------------------------------------------------- what is measured


def _known_evaluation(folder: Path, net: GPT) -> dict[str, Any] | None:
    """The run's evaluation.json if it was measured on exactly these weights."""
    found = _read_json(folder / EVALUATION)
    if found.get("weights") != weights_fingerprint(net):
        return None
    check_facts(found, EVALUATION_FACTS, folder / EVALUATION)
    return {**found, "data": portable_data(found["data"])}


def _measure(run: Run, net: GPT, config: ExportConfig, console: Console | None) -> dict[str, Any]:
    """What evaluate.py finds for `net`, which is the model of `run` with rounded weights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_safetensors(net, folder, DTYPES[config.weights])
        run.load_tokenizer().save(folder / TOKENIZER)
        _write_yaml(folder / CONFIG, run.config)
        write_json(folder / SUMMARY, read_summary(run.folder))
        evaluate(Run.open(folder), EvaluationConfig(), console, folder)
        found = _known_evaluation(folder, net)
    assert found is not None  # it has just been measured on them
    return found


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} when there is none that can be read."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
