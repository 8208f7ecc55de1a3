"""Model card of an export: a README.md with description, training data and evaluation results.

The values in the card come from the files of a run. These files may be untrusted, so `_cell`
reduces each value to one line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import minigpt
from minigpt.core.settings import one_line
from minigpt.core.text import BAR, human_time
from minigpt.core.typed import shell_command, shell_word, typed_settings
from minigpt.exporting.config import ExportConfig
from minigpt.model import GPT
from minigpt.runs.provenance import AveragedRun, Parent, total_tokens

Record = Mapping[str, Any]  # content of a JSON or YAML file of a run
TINYSTORIES = "roneneldan/TinyStories"
CORPORA = {
    "tinystories_sample": "the bundled sample of the TinyStories corpus",
    "tinystories": "the training split (V2) of the TinyStories corpus",
}


def model_card(
    name: str, export: ExportConfig, model: GPT, vocabulary: int, config: Record, summary: Record,
    evaluation: Record | None, parent: Parent | None, teachers: Sequence[Parent] = (),
    averaged: Sequence[AveragedRun] = (), prompt: str = "Once upon a time",
) -> str:  # fmt: skip
    """Return the content of README.md, the model card of an export.

    Args:
        name: title of the card: user/name for a repository on the Hub, otherwise the name of the
            folder.
        export: settings of the export.
        model: the model.
        vocabulary: number of tokens in the vocabulary of the tokenizer.
        config: settings of the exported run, without paths.
        summary: content of summary.json of the exported run; {} if there is none.
        evaluation: content of evaluation.json for exactly the exported weights; None if they were
            not evaluated.
        parent: the run that the exported run was initialised from; None if the initial weights
            were random.
        teachers: all teachers from which the exported weights have learned, as returned by
            `teachers_of`.
        averaged: the runs whose weights were averaged with those of the exported run.
        prompt: the prompt of the examples, in the language of the stories.

    Returns:
        Markdown, with the YAML metadata for the Hub at the top.
    """
    local_path = name.split("/")[1] if "/" in name else f"path/to/{name}"
    settings: dict[str, Any] = {"ckpt": local_path}
    data = config["data"]
    # An export contains neither the user's stories nor the folder of a local dataset.
    if data["source"] == "text" or (data["source"] == "hf" and not data.get("dataset")):
        settings |= {"data": "text", "data.valid_files": ["stories.txt"]}
    if config.get("model_class"):
        settings["class_path"] = config["model_class"]
    name, prompt = _cell(name), one_line(prompt)
    sources: list[str] = [*(parent.sources if parent else []), config["data"]["source"]]
    sources += [source for run in averaged for source in run.sources]
    stories = [source for source in sources if source.startswith("tinystories")]
    license = export.license or _license([*sources, *(s for t in teachers for s in t.sources)])
    options = ["--class-path", str(config["model_class"])] if config.get("model_class") else []
    card = ModelCard.from_template(
        _metadata(name, export.format, bool(stories), evaluation, license),
        template_str=resources.files("minigpt.exporting").joinpath("card.md.j2").read_text("utf-8"),
        **{"cell": _cell, "count": _count, "time": _time, "number": _number},
        **{"name": name, "format": export.format, "dtype": export.weights, "model": model},
        vocabulary=vocabulary,
        **{"config": config, "summary": summary, "evaluation": evaluation, "parent": parent},
        **{"teachers": teachers, "teacher_tokens": total_tokens(teachers)},
        prompt=json.dumps(prompt, ensure_ascii=False),
        shell_prompt=_shell_prompt(prompt),
        local_path=shell_word(local_path),
        evaluate=shell_command("minigpt", "evaluate", *typed_settings(settings)),
        model_path=_python_string(name if "/" in name else local_path),
        on_hub="/" in name,
        averaged=averaged,
        devices=_devices(summary),
        corpus=" and ".join(dict.fromkeys(CORPORA.get(source, source) for source in stories)),
        n_stories=_n_stories(config["data"]["source"], summary),
        others=len(stories) < len(sources),
        license=license,
        command=_command(config.get("overrides"), config.get("name"), bool(averaged)),
        commands=_commands(config, averaged, parent, [*_format_options(export), *options]),
        class_option="".join(f" {shell_word(option)}" for option in options),
        version=minigpt.__version__,
        commit=_cell(summary.get("commit")),
        is_partial=summary.get("status", "finished") != "finished",
    )
    return f"{card}\n"


def _license(sources: list[str]) -> str | None:
    """Return the license of a model whose training stories, and its teachers', are `sources`."""
    return "mit" if all(source.startswith("tinystories") for source in sources) else None


def _metadata(
    name: str, format: str, tinystories: bool, evaluation: Record | None, license: str | None
) -> ModelCardData:
    """Return the metadata that the Hub displays, such as license, data and evaluation results."""
    texts: dict[str | None, Record] = {}  # results by release of TinyStories; None: no release
    if evaluation is not None and isinstance(v1 := evaluation.get("valid_v1"), Mapping):
        texts = {"V2": evaluation, "V1": v1}
    elif evaluation is not None:
        texts = {{"v1": "V1", "v2": "V2"}.get(str(evaluation.get("valid"))): evaluation}
    source = _cell(evaluation["data"].get("source")) if evaluation is not None else ""
    name_of_split = _split(evaluation) if evaluation is not None else ""
    split = f"{name_of_split} split of {source}"
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=TINYSTORIES if source.startswith("tinystories") else source,
            dataset_name=f"{split}, {text}" if text else split,
            dataset_config=text,
            dataset_split="validation" if name_of_split == "validation" else "train",
            metric_type=key,
            metric_name=key.replace("_", " "),
            metric_value=round(loss[key], digits),
        )
        for text, loss in texts.items()
        for key, digits in (("perplexity", 3), ("bits_per_byte", 4))
        if isinstance(loss.get(key), int | float)
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


def _split(evaluation: Record) -> str:
    """Return the name of the split that was evaluated: "validation" or "tuning"."""
    return "tuning" if evaluation["data"].get("valid") == "tuning" else "validation"


def _shell_prompt(prompt: str) -> str:
    """Return the prompt as an argument of `minigpt generate`."""
    if prompt.startswith("-"):  # not an option
        return shell_word(f"--prompt={prompt}")
    return f'"{prompt}"' if re.fullmatch(r"[\w ,.]+", prompt) else shell_word(prompt)


def _cell(value: Any) -> str:
    """Return an untrusted value as one line of text for a table cell."""
    return "not recorded" if value is None else one_line(str(value)).replace("|", BAR)


def _python_string(text: str) -> str:
    """Return `text` as a Python string literal on one line."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else ascii(text)


def _count(number: Any) -> str:
    return f"{number:,}" if isinstance(number, int) else _cell(number)


def _number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else _cell(value)


def _time(seconds: Any) -> str:
    finite = isinstance(seconds, int | float) and math.isfinite(seconds)
    return human_time(seconds) if finite else _cell(seconds)


def _n_stories(source: str, summary: Record) -> str:
    """Return the phrase ", <n> stories" for the card; "" if the number n is not recorded."""
    # Runs on the first edition of the sample (14,849 stories) may not have recorded the number.
    n = summary.get("train_stories", 14_849 if source == "tinystories_sample" else None)
    return "" if n is None else f", {_count(n)} stories"


def _devices(summary: Record) -> str:
    """Return the name of the device, with the total number of devices if there were several."""
    numbers = [summary.get("devices"), summary.get("num_nodes")]
    n = math.prod(number for number in numbers if isinstance(number, int))
    device = summary.get("device") or "an unknown device"
    return device if n == 1 else f"{n} × {device}"


def _command(overrides: Any, name: Any, named: bool) -> str | None:
    """Return the command that started a run; None if the command is not recorded or not printable.

    Args:
        overrides: the overrides as typed; None if they are not recorded.
        name: name of the run.
        named: whether to add the name if `overrides` do not set it. The command that exports an
            averaged model refers to the averaged runs by name, so these runs need a name.
    """
    if overrides is None or not all(typed.isprintable() for typed in overrides):
        return None
    if named and not any(typed.startswith("name=") for typed in overrides):
        overrides = [*overrides, *typed_settings({"name": name})]
    return shell_command("minigpt", "train", *overrides)


def _commands(
    config: Record, averaged: Sequence[AveragedRun], parent: Parent | None, options: list[str]
) -> list[str]:
    """Return the commands that train the exported run and the runs averaged with it.

    If there are averaged runs, the last command exports the mean of the weights. A training command
    that was not recorded is left out.

    Args:
        config: settings of the exported run.
        averaged: the runs whose weights were averaged with those of the exported run.
        parent: the run that the exported run was initialised from; None if there is none. Each run
            in `averaged` is the parent itself, or was also initialised from the parent.
        options: options of the export command.
    """
    before = [run for run in averaged if parent and run.weights == parent.weights]
    after = [run for run in averaged if run not in before]
    own = _command(config.get("overrides"), config.get("name"), bool(averaged))
    named = [[_command(run.overrides, run.name, True) for run in runs] for runs in (before, after)]
    commands = [command for command in (*named[0], own, *named[1]) if command is not None]
    if averaged:
        runs = [word for run in averaged for word in ("--average", f"runs/{run.name}")]
        words = f"runs/{config.get('name')}", "out", *options, *runs
        commands.append(shell_command("minigpt", "export", *words))
    return commands


def _format_options(export: ExportConfig) -> list[str]:
    return ["--format", export.format, *(["--dtype", export.dtype] if export.dtype else [])]
