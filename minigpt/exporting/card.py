"""The README.md of an exported model: what it is, what it was trained on, how well it does.

What it says of a run comes out of the run's files, which may come from anybody, so that `_cell`
puts each value on one line.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from importlib import metadata, resources
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from minigpt.core.settings import one_line
from minigpt.core.text import BAR, human_time
from minigpt.exporting.config import ExportConfig
from minigpt.model import GPT
from minigpt.runs.provenance import Parent

Record = Mapping[str, Any]  # what a file of a run holds
TINYSTORIES = "roneneldan/TinyStories"
CORPORA = {
    "tinystories_sample": "the bundled sample",
    "tinystories": "the V2 training file of the full corpus",
}


def model_card(
    name: str, export: ExportConfig, net: GPT, vocabulary: int, config: Record, summary: Record,
    evaluation: Record | None, parent: Parent | None,
) -> str:  # fmt: skip
    """Return the text of README.md, with the metadata that the Hub reads in front.

    Args:
        name: of the model: its folder's, or user/name on the Hub.
        export: what is written; its license None means that of the code for TinyStories.
        net: the model.
        vocabulary: number of tokens of the tokenizer.
        config: the run's settings, without paths.
        summary: the run's summary.json; {} when it left none.
        evaluation: evaluation.json as measured on these very weights; None if not measured.
        parent: the run whose weights this one began with.
    """
    name, license = _cell(name), export.license
    sources: list[str] = [*(parent.sources if parent else []), config["data"]["source"]]
    stories = [source for source in sources if source.startswith("tinystories")]
    if license is None and len(stories) == len(sources):
        license = "mit"
    averaged = parent is not None and summary.get("averaged") is True
    card = ModelCard.from_template(
        _metadata(name, export.format, bool(stories), evaluation, license),
        template_str=resources.files("minigpt.exporting").joinpath("card.md.j2").read_text("utf-8"),
        **{"cell": _cell, "count": _count, "time": _time, "number": _number},
        **{"name": name, "format": export.format, "dtype": export.weights, "net": net},
        vocabulary=vocabulary,
        **{"config": config, "summary": summary, "evaluation": evaluation, "parent": parent},
        place=name.split("/")[1] if "/" in name else f"path/to/{name}",
        on_hub="/" in name,
        averaged=averaged,
        devices=_devices(summary),
        corpus=" and ".join(dict.fromkeys(CORPORA.get(source, source) for source in stories)),
        n_stories=_n_stories(config["data"]["source"], summary),
        others=len(stories) < len(sources),
        license=license,
        command=_command(config, averaged),
        run=shlex.quote(f"runs/{_cell(config.get('name'))}"),
        version=metadata.version("minigpt"),
        commit=_cell(summary.get("commit")),
    )
    return f"{card}\n"


def _metadata(
    name: str, format: str, tinystories: bool, evaluation: Record | None, license: str | None
) -> ModelCardData:
    """Return what the Hub shows and searches: license, data, and the measured numbers."""
    results = []
    if evaluation is not None:
        source = _cell(evaluation["data"].get("source"))
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=TINYSTORIES if source.startswith("tinystories") else source,
                dataset_name=f"validation split of {source}",
                dataset_split="validation",
                metric_type=key,
                metric_name=key.replace("_", " "),
                metric_value=round(evaluation[key], digits),
            )
            for key, digits in (("perplexity", 3), ("bits_per_byte", 4))
        ]
    return ModelCardData(
        license=license,
        datasets=[TINYSTORIES] if tinystories else None,
        language=["en"] if tinystories else None,
        pipeline_tag="text-generation",
        library_name="transformers" if format == "hf" else None,
        tags=["mini-gpt", *(["tinystories"] if tinystories else [])],
        model_name=name.split("/")[-1],
        eval_results=results or None,
    )


def _cell(value: Any) -> str:
    """Return a value out of a file as text that stays in its cell of a table, on one line."""
    return "not recorded" if value is None else one_line(str(value)).replace("|", BAR)


def _count(number: Any) -> str:
    return f"{number:,}" if isinstance(number, int) else _cell(number)


def _number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else _cell(value)


def _time(seconds: Any) -> str:
    known = isinstance(seconds, int | float) and math.isfinite(seconds)
    return human_time(seconds) if known else _cell(seconds)


def _n_stories(source: str, summary: Record) -> str:
    """Return how many stories the run was trained on, for the card; "" if nothing says it."""
    n = summary.get("train_stories")
    if n is None and source == "tinystories_sample":
        n = 14_849  # the first edition: a run on the second records the number
    return "" if n is None else f", {_count(n)} stories"


def _devices(summary: Record) -> str:
    """Return the device, and how many of it there were over all nodes."""
    numbers = [summary.get("devices"), summary.get("num_nodes")]
    n = math.prod(number for number in numbers if isinstance(number, int))
    device = summary.get("device") or "an unknown device"
    return device if n == 1 else f"{n} × {device}"


def _command(config: Record, averaged: bool) -> str | None:
    """Return the command that trained the run; None if it was not recorded on one line."""
    overrides = config.get("overrides")
    if overrides is None or not all(typed.isprintable() for typed in overrides):
        return None
    if averaged and not any(typed.startswith("name=") for typed in overrides):
        overrides = [*overrides, f"name={_cell(config.get('name'))}"]
    return shlex.join(["minigpt", "train", *overrides])
