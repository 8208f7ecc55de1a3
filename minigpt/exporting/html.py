"""Export to one HTML file that generates stories in a browser, without a server or a network.

The script in story.html.j2 has a tokenizer and a decoder of its own. `make test-browser` runs the
script in Chromium, and compares its greedy stories with those that the Python code generates.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from minigpt.core.files import write_text
from minigpt.generation.sampling import SamplingConfig
from minigpt.model import GPT
from minigpt.tokenizer import Tokenizer

PAGE = "story.html"
PROMPT = "Once upon a time, there was a dog"


def write_html(
    model: GPT, tokenizer: Tokenizer, folder: Path, title: str, dtype: torch.dtype
) -> None:
    """Write story.html, which contains the weights, the tokenizer and a script to run the model.

    Args:
        model: a `GPT`, not an instance of a subclass.
        tokenizer: the tokenizer of the model.
        folder: the output folder.
        title: heading of the page.
        dtype: type of the weights in the file, float32 or bfloat16.
    """
    c, weights = model.config, model.state_dict()
    bpe = json.loads(tokenizer.to_json())["model"]
    content = {
        "shape": {
            "width": c.d_model,
            "layers": c.n_layers,
            "heads": c.n_heads,
            "hidden": c.d_ff,
            "context": c.context_length,
            "scale": model.scale,
            "eps": model.final_norm.eps,
        },
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": [[name, weight.numel()] for name, weight in weights.items()],
        "tokenizer": {
            "tokens": sorted(bpe["vocab"], key=bpe["vocab"].__getitem__),
            "merges": [" ".join(pair) for pair in bpe["merges"]],
        },
    }
    flat = torch.cat([weight.flatten() for weight in weights.values()]).to(dtype)
    loader = PackageLoader("minigpt.exporting", "")
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    text = page.get_template("story.html.j2").render(
        title=title,
        prompt=PROMPT,
        temperature=SamplingConfig().temperature,
        parameters=model.n_parameters,
        model=content,
        weights=base64.b64encode(flat.view(torch.uint8).numpy().tobytes()).decode("ascii"),
    )
    write_text(folder / PAGE, text)
