"""The README.md of an exported model: what it is, what it was trained on, how well it does."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from importlib import metadata, resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from minigpt.records import human_time, tokens_before

CORPORA = {
    "tinystories_sample": "the 14,849 stories of the bundled sample",
    "tinystories": "the V2 training file of the full corpus",
}
USAGE = {
    "hf": """\
```python
from transformers import pipeline

tell = pipeline("text-generation", model="{place}")
print(tell("Once upon a time")[0]["generated_text"])
```""",
    "safetensors": """\
With the code of Mini GPT, for which this folder is a run:

```sh
{download}minigpt generate {place} --prompt "Once upon a time"
python evaluate.py ckpt={place}
```""",
    "onnx": """\
```python
import numpy as np, onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
ids = np.array([[0, *tokenizer.encode("Once upon a time").ids]])
logits = onnxruntime.InferenceSession("model.onnx").run(None, {{"ids": ids}})[0]
print(tokenizer.decode([int(logits[0, -1].argmax())]))  # the likeliest next token
```""",
    "gguf": """\
```sh
llama-completion -m model.gguf -no-cnv --temp 0.8 --top-k 0 -p "Once upon a time"
```""",
}
FORMAT_NOTES = {
    "hf": " Here in the layout of GPT-2, which computes the same: the positions are a table,"
    " the scale of the embedding is part of its weights.",
    "safetensors": "",
    "onnx": " As one ONNX graph, for any batch and length up to the context.",
    "gguf": " As a GPT-2 for llama.cpp, whose approximate GELU changes the logits slightly.",
}


def model_card(
    name: str,
    format: str,
    dtype: str,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    n_parameters: int,
    vocabulary: int,
    license: str | None = None,
) -> str:
    """The text of README.md.

    Args:
        name: of the model: its folder's, or user/name on the Hub.
        format: one of the keys of USAGE.
        dtype: of the weights.
        config: the run's settings.
        summary: the run's summary.json; {} when it left none.
        evaluation: evaluation.json as measured on these very weights; None: not measured.
        n_parameters: the tied matrix counts once.
        vocabulary: tokens of the tokenizer.
        license: of the weights; None: that of the code for TinyStories, else left to say.
    """
    source = config["data"]["source"]
    template = resources.files("minigpt").joinpath("resources/model_card.md.j2")
    environment = Environment(  # noqa: S701 (Markdown, not HTML)
        undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        name=name,
        format=format,
        format_note=FORMAT_NOTES[format],
        model={**config["model"], "parameters": n_parameters},
        vocabulary=vocabulary,
        facts=_facts(dtype, config, summary, evaluation),
        usage=_usage(name, format),
        tinystories=source.startswith("tinystories"),
        license=license or ("mit" if source.startswith("tinystories") else None),
        corpus=CORPORA.get(source, source),
        command=training_command(config, summary),
        version=metadata.version("minigpt"),
        commit=summary.get("commit") or "not recorded",
    )


def _usage(name: str, format: str) -> str:
    """How the model is used from where it lies: on the Hub if its name is user/name."""
    if "/" not in name:
        return USAGE[format].format(place=f"path/to/{name}", download="")
    here = name.split("/")[1]
    download = f"hf download {name} --local-dir {here}\n"
    return USAGE[format].format(place=name if format == "hf" else here, download=download)


def _facts(
    dtype: str,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
) -> dict[str, str]:
    unknown = "not recorded"
    tokens, seconds = summary.get("tokens"), summary.get("seconds")
    before = tokens_before(summary)
    seen = f"{before + tokens:,}" if tokens else unknown
    if tokens and before:
        seen += f": {before:,} by {summary['init_from']['name']}, whose weights it began with"
    facts = {
        "weights": dtype,
        "tokens seen in training": seen,
        "trained for": f"{human_time(seconds)} on {_devices(summary)}" if seconds else unknown,
        "precision of training": summary.get("precision", unknown),
        "seed": str(config["seed"]),
    }
    if evaluation is None:
        how = "not measured on these weights"
        return facts | {"validation perplexity": how, "bits per byte": how}
    return facts | {
        "validation perplexity": f"**{evaluation['perplexity']:.3f}**",
        "bits per byte": f"**{evaluation['bits_per_byte']:.4f}**",
        "measured on": f"the validation split of {evaluation['data']['source']}: "
        f"{evaluation['n_stories']:,} stories, {evaluation['n_tokens']:,} tokens, windows side by "
        f"side, {evaluation['precision']} on {evaluation['device']}",
    }


def _devices(summary: Mapping[str, Any]) -> str:
    n = summary.get("devices", 1) * summary.get("num_nodes", 1)
    return summary["device"] if n == 1 else f"{n} × {summary['device']}"


def training_command(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """The train.py command, over several lines, that has all settings which decide the weights.

    What was found on the machine, such as the precision, is as `summary` has it. A run that began
    with the weights of another has that run's command before its own.
    """
    data, source = config["data"], config["data"]["source"]
    elsewhere = ("source", "train_files", "valid_files", "cache_dir")  # in the first line, or paths
    first = [f"model={config['size']}", f"data={source}", f"seed={config['seed']}"]
    init_from = summary.get("init_from")
    if init_from:
        first.append(f"init_from=runs/{init_from['name']}")
    if source == "text":
        first.append("data.train_files=[your-stories.txt]")
    if "name" in config["optimizer"]:
        first.append(f"optimizer={config['optimizer']['name']}")
    deciding = (
        *("devices", "num_nodes", "strategy", "precision", "accumulate_grad_batches"),
        "n_validations",  # the best of these is kept
    )
    trainer = {key: summary.get(key) or config["trainer"][key] for key in deciding}
    sections = {
        "model": {key: value for key, value in config["model"].items() if key != "attention"},
        "data": {key: value for key, value in data.items() if key not in elsewhere},
        "optimizer": config["optimizer"],
        "trainer": trainer,
        "budget": config["budget"],
    }
    lines = [" ".join(map(shlex.quote, first))]
    lines += [" ".join(_overrides(section, values)) for section, values in sections.items()]
    command = " \\\n  ".join(["python train.py", *lines])
    return f"{init_from['command']}\n{command}" if init_from else command


def _overrides(section: str, values: Mapping[str, Any]) -> list[str]:
    # ++ also sets what the chosen config file leaves to the default of the code.
    return [shlex.quote(f"++{section}.{key}={_typed(value)}") for key, value in values.items()]


def _typed(value: Any) -> str:
    """A plain value as Hydra reads it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not re.fullmatch(r"[\w-]+", value):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)
