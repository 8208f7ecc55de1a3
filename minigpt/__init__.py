"""Mini GPT: train and study story language models with up to about 10 million parameters.

Train a model, measure it, generate a story, and export it for transformers:

    >>> import minigpt
    >>> config = minigpt.load_config("train", ["model=small", "budget.tokens=20e6"])
    >>> run = minigpt.train(config)
    >>> minigpt.evaluate(run).perplexity
    >>> for piece in minigpt.stream_story(run, "Once upon a time"):
    ...     print(piece, end="")
    >>> minigpt.export(run, "my-model")

The public API:

- `load_config`: settings for training or evaluation, with the same names as on the
  command line
- `train`, `TrainConfig`: train a model, or resume a run
- `Run`: a run folder or an exported model, with its settings, tokenizer and model
- `evaluate`, `EvaluationConfig`: measure perplexity and bits per byte, and generate stories
- `generate`, `stream_story`, `SamplingConfig`: generate stories
- `export`, `ExportConfig`: export a model to transformers, ONNX, GGUF (llama.cpp), safetensors
  or a web page
- `GPT`, `GPTConfig`, `Tokenizer`: the model, its shape, and its tokenizer
- `tune_process`: speed up training on a CPU, for the rest of the process
- `UserError`: error for mistakes that the user can fix

Each name is imported when it is first used (PEP 562), so `import minigpt` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigpt.cli.compose import load_config
    from minigpt.core.process import tune_process
    from minigpt.core.settings import UserError
    from minigpt.evaluation import EvaluationConfig, evaluate
    from minigpt.exporting import ExportConfig, export
    from minigpt.generation import SamplingConfig, generate, stream_story
    from minigpt.model import GPT, GPTConfig
    from minigpt.runs.folder import Run
    from minigpt.tokenizer import Tokenizer
    from minigpt.training.config import TrainConfig
    from minigpt.training.loop import train

    __version__: str

_MODULES = {
    "minigpt.cli.compose": ("load_config",),
    "minigpt.core.process": ("tune_process",),
    "minigpt.core.settings": ("UserError",),
    "minigpt.evaluation": ("EvaluationConfig", "evaluate"),
    "minigpt.exporting": ("ExportConfig", "export"),
    "minigpt.generation": ("SamplingConfig", "generate", "stream_story"),
    "minigpt.model": ("GPT", "GPTConfig"),
    "minigpt.runs.folder": ("Run",),
    "minigpt.tokenizer": ("Tokenizer",),
    "minigpt.training.config": ("TrainConfig",),
    "minigpt.training.loop": ("train",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "GPT", "EvaluationConfig", "ExportConfig", "GPTConfig", "Run", "SamplingConfig", "Tokenizer",
    "TrainConfig", "UserError", "__version__", "evaluate", "export", "generate", "load_config",
    "stream_story", "train", "tune_process",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: Any = version("minigpt")
        except PackageNotFoundError:  # in a checkout that is not installed
            value = "0.1.0"
    elif name in ("train", "evaluate"):  # Lightning fails to import if RANK is not a number
        with importlib.import_module("minigpt.core.distributed").stale_launcher_hidden():
            value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        if name == "GPTConfig":  # model.py imports nothing from the package
            value = importlib.import_module("minigpt.core.fields").documented(value)
    else:
        problem = f"module 'minigpt' has no attribute '{name}'"
        raise AttributeError(f"{problem}: choose from {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
