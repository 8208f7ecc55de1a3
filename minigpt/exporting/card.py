"""The README.md of an exported model: what it is, what it was trained on, how well it does."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from minigpt.core.text import BAR, human_time
from minigpt.runs.provenance import Origin

DECIDING = (
    *("devices", "num_nodes", "strategy", "precision", "accumulate_grad_batches"),
    "n_validations",  # the best of these is kept
)
# What the card tells of the files of a run, with its type there, for `records.check_facts`.
CONFIG_FACTS = {
    "size": str,
    "seed": int,
    "model": {},
    "data": {"source": str},
    "optimizer": {},
    "trainer": dict.fromkeys(DECIDING, int | str),
    "budget": {},
}
SUMMARY_FACTS = {
    **dict.fromkeys(("device", "precision", "commit"), str | None),
    **dict.fromkeys(("tokens", "devices", "num_nodes"), int | None),
    "seconds": int | float | None,
}
EVALUATION_FACTS = {
    **dict.fromkeys(("nats_per_token", "perplexity", "bits_per_byte"), int | float),
    **dict.fromkeys(("n_stories", "n_tokens"), int),
    **dict.fromkeys(("device", "precision"), str),
    "data": {"source": str},
}
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
    origin: Origin | None = None,
) -> str:
    """The text of README.md.

    What the files of the run say was checked with `check_facts` before.

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
        origin: the run whose weights this one began with.
    """
    every: list[str] = [*(origin.sources if origin else []), config["data"]["source"]]
    sources = list(dict.fromkeys(every))
    stories = [source for source in sources if source.startswith("tinystories")]
    commits = (summary.get("commit") or "not recorded").split(", ")
    if origin is not None:
        commits = [*origin.commits, *commits]
    template = resources.files("minigpt").joinpath("exporting/card.md.j2")
    environment = Environment(  # noqa: S701 (Markdown, not HTML)
        undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        name=name,
        format=format,
        format_note=FORMAT_NOTES[format],
        model={**config["model"], "parameters": n_parameters},
        vocabulary=vocabulary,
        facts={
            key: fact.replace("|", BAR)
            for key, fact in _facts(dtype, config, summary, evaluation, origin).items()
        },
        usage=_usage(name, format),
        tinystories=bool(stories),
        others=len(stories) < len(sources),
        license=license or ("mit" if stories == sources else None),
        corpus=" and ".join(CORPORA.get(source, source) for source in stories),
        command=training_commands(config, summary, origin),
        version=metadata.version("minigpt"),
        commit=", ".join(dict.fromkeys(commits)),
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
    origin: Origin | None,
) -> dict[str, str]:
    unknown = "not recorded"
    tokens, seconds = summary.get("tokens"), summary.get("seconds")
    seen = f"{tokens:,}" if tokens else unknown
    took = f"{human_time(seconds)} on {_devices(summary)}" if seconds else unknown
    if origin is not None:
        before = "an unknown number" if origin.tokens is None else f"{origin.tokens:,}"
        seen = f"{before} (as {origin.name}) + {seen}"
        before = "an unknown time" if origin.seconds is None else human_time(origin.seconds)
        took = f"{before} (as {origin.name}) + {took}"
        if _averaged(summary, origin):
            dtype += f", the average of the final ones and those of {origin.name}"
    facts = {
        "weights": dtype,
        "tokens seen in training": seen,
        "trained for": took,
        "precision of training": summary.get("precision") or unknown,
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
    n = (summary.get("devices") or 1) * (summary.get("num_nodes") or 1)
    device = summary.get("device") or "an unknown device"
    return device if n == 1 else f"{n} × {device}"


def training_commands(
    config: Mapping[str, Any], summary: Mapping[str, Any], origin: Origin | None
) -> str:
    """The train.py commands that make the weights: those of the runs it began with, and its own."""
    commands = [*(origin.commands if origin else []), training_words(config, summary, origin)]
    lines = list(map(_over_lines, commands))
    if _averaged(summary, origin):
        lines[-1] += " \\\n  name=continued"
        lines.append("minigpt export runs/continued out --format safetensors --average")
    return "\n".join(lines)


def training_words(
    config: Mapping[str, Any], summary: Mapping[str, Any], origin: Origin | None = None
) -> list[str]:
    """A train.py command, as words, that has all settings which decide the weights.

    What was found on the machine, such as the precision, is as `summary` has it.
    """
    data, source = config["data"], config["data"]["source"]
    elsewhere = ("source", "train_files", "valid_files", "cache_dir")  # among the first, or paths
    words = ["python", "train.py", f"model={config['size']}", f"data={source}"]
    words.append(f"seed={config['seed']}")
    if source == "text":
        words.append("data.train_files=[your-stories.txt]")
    if "name" in config["optimizer"]:
        words.append(f"optimizer={config['optimizer']['name']}")
    if origin is not None:
        words.append(f"init_from={hydra_text(origin.path)}")
    trainer = {key: summary.get(key) or config["trainer"][key] for key in DECIDING}
    sections = {
        "model": {key: value for key, value in config["model"].items() if key != "attention"},
        "data": {key: value for key, value in data.items() if key not in elsewhere},
        "optimizer": config["optimizer"],
        "trainer": trainer,
        "budget": config["budget"],
    }
    # ++ also sets what the chosen config file leaves to the default of the code.
    return words + [
        f"++{section}.{key}={hydra_text(value)}"
        for section, values in sections.items()
        for key, value in values.items()
    ]


def _over_lines(words: Sequence[str]) -> str:
    """A shell command with a line for each section of its settings."""
    sections = itertools.groupby(words, lambda word: word.startswith("++") and word.split(".")[0])
    first, *lines = [" ".join(map(_shell_word, section)) for _, section in sections]
    program, settings = first[: len("python train.py")], first[len("python train.py") :].strip()
    return " \\\n  ".join([program, settings, *lines])


def _shell_word(word: str) -> str:
    """`word` for bash or zsh, on one line: a separator of stories may be a line break."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{''.join(c if c.isprintable() else _ansi_c(c) for c in escaped)}'"


def _ansi_c(character: str) -> str:
    """A character as $'...' has it, where \\x stands for a byte."""
    code = ord(character)
    return ascii(character)[1:-1] if code < 128 else f"\\U{code:08x}"


def _averaged(summary: Mapping[str, Any], origin: Origin | None) -> bool:
    """Whether the weights were made by `minigpt export --average`."""
    return origin is not None and summary.get("averaged") is True


def hydra_text(value: Any) -> str:
    """A plain value as Hydra reads it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not re.fullmatch(r"[\w/-]+", value):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)
