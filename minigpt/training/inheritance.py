"""What a new run takes from other runs: a tokenizer, a model shape, a vocabulary size."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from minigpt.core.console import log
from minigpt.core.settings import UserError
from minigpt.data.config import DataConfig
from minigpt.model import GPTConfig
from minigpt.runs.folder import Run
from minigpt.runs.names import CHECKPOINTS, SNAPSHOTS, TOKENIZER
from minigpt.tokenizer import Tokenizer
from minigpt.training.config import TrainConfig


def typed_tokenizer(data: DataConfig) -> Tokenizer | None:
    """Return the tokenizer at the path `data.tokenizer`; None if this setting is None.

    Raises:
        UserError: the tokenizer is missing or damaged.
    """
    name = "data.tokenizer"
    if data.tokenizer is None:
        return None
    path = Path(data.tokenizer)
    if path.suffix in (".ckpt", ".safetensors"):
        inside = path.parent.name in (CHECKPOINTS, SNAPSHOTS)
        path = path.parent.parent if inside else path.parent
    file = path if path.suffix == ".json" else path / TOKENIZER
    if not file.is_file():
        message = f"there is no {file}; give a run folder, a checkpoint, an export or a {TOKENIZER}"
        raise UserError(message, name, data.tokenizer)
    try:
        return Tokenizer.load(file)
    except UserError as error:
        raise UserError(error.message, name, data.tokenizer) from None


def common_tokenizer(
    tokenizers: dict[str, tuple[str | None, Tokenizer | None]],
) -> Tokenizer | None:
    """Return the tokenizer to which all given settings refer; None if no setting is given.

    Args:
        tokenizers: (value, tokenizer) by setting name. The tokenizer is the one to which the value
            refers, or None if the setting is not given.

    Raises:
        UserError: the tokenizers differ.
    """
    named = [(key, value, tok) for key, (value, tok) in tokenizers.items() if tok is not None]
    for key, value, tokenizer in named[:-1]:
        other, other_value, last = named[-1]
        if tokenizer.fingerprint != last.fingerprint:
            problem = f"its tokenizer differs from that of {other}={other_value}"
            problem += ": leave out one of them"
            raise UserError(problem, key, value)
    return named[-1][2] if named else None


def with_dependent_settings(config: TrainConfig) -> TrainConfig:
    """Return `config` with the settings whose defaults follow other settings.

    model.vocab_size follows data.vocab_size, except with `init_from`, and data.download_tokens
    follows budget.tokens. In conf/, interpolations do the same. In a config from Python, a value
    that equals the default of its dataclass counts as not set.
    """
    data, model = config.data, config.model
    default_rows = config.init_from is None and model.vocab_size == GPTConfig.vocab_size
    if default_rows and not _types(config, "model.vocab_size"):
        model = dataclasses.replace(model, vocab_size=data.vocab_size)
    default_text = data.download_tokens == DataConfig.download_tokens
    downloads = data.source in ("tinystories", "hf")
    if downloads and default_text and not _types(config, "data.download_tokens"):
        data = dataclasses.replace(data, download_tokens=config.budget.tokens)
    return dataclasses.replace(config, data=data, model=model)


def with_vocabulary_of(tokenizer: Tokenizer, config: TrainConfig) -> TrainConfig:
    """Return `config` with the vocabulary size of `tokenizer`.

    Raises:
        UserError: the user has set data.vocab_size to another size.
    """
    data, model, size = config.data, config.model, tokenizer.vocab_size
    default = None if _types(config, "data.vocab_size") else DataConfig.vocab_size
    if data.vocab_size not in (size, default):
        source = data.tokenizer or config.teacher.runs[0]
        message = f"the tokenizer of {source} has {size} tokens: leave this setting out"
        raise UserError(message, "data.vocab_size", data.vocab_size)
    if model.vocab_size == data.vocab_size and not _types(config, "model.vocab_size"):
        model = dataclasses.replace(model, vocab_size=size)
    data = dataclasses.replace(data, vocab_size=size)
    return dataclasses.replace(config, data=data, model=model)


def with_rows_of(trained: GPTConfig, config: TrainConfig) -> TrainConfig:
    """Return `config` with the `vocab_size` of the model `trained`, unless the user has set one."""
    if config.model.vocab_size != DataConfig.vocab_size or _types(config, "model.vocab_size"):
        return config
    model = dataclasses.replace(config.model, vocab_size=trained.vocab_size)
    return dataclasses.replace(config, model=model)


def _types(config: TrainConfig, name: str) -> bool:
    """Return whether the user has typed the setting `name` on the command line."""
    return any(word.lstrip("+").startswith(f"{name}=") for word in config.overrides)


def check_division(data: DataConfig, before: Any, name: str, path: str) -> None:
    """Raise UserError if validation stories of the new run were training stories of another run.

    The last stories that are read of a Hub dataset are held out. So the other run has read some of
    the new run's validation stories if its training split is longer.

    Args:
        data: settings of the new run.
        before: data settings of the other run, from its config.yaml.
        name: setting that names the other run.
        path: value of this setting.
    """
    if data.valid_split is not None or not isinstance(before, dict):
        return
    same = all(
        before.get(key) == getattr(data, key) for key in ("source", "dataset", "subset", "split")
    )
    if not same or before.get("valid_split") is not None:
        return
    earlier = before.get("download_tokens"), before.get("holdout", DataConfig.holdout)
    lengths = [
        (1 - holdout) * (math.inf if tokens is None else tokens)
        for tokens, holdout in (earlier, (data.download_tokens, data.holdout))
    ]
    if lengths[1] < lengths[0] or (lengths[1] == math.inf and data.holdout > earlier[1]):
        problem = "that run was trained on some of the stories that the new run holds out"
        fix = {"data.download_tokens": earlier[0], "data.holdout": earlier[1]}
        raise UserError(problem, name, path, fix)


def warn_of_seen_stories(data: DataConfig, before: Any, path: str) -> None:
    """Log a warning if the run at `path` may have been trained on the tuning stories of a new run.

    Args:
        data: settings of the new run.
        before: data settings of the other run, from its config.yaml.
        path: path of the other run.
    """
    if data.valid == "tuning" and not (
        isinstance(before, dict) and before.get("valid") == "tuning"
    ):
        problem = "the tuning stories may be training stories of %s: losses on them are too low"
        log.warning(problem, path)


def check_shape(config: TrainConfig, trained: GPTConfig, run: Run) -> None:
    """Raise UserError if the model's shape differs from `trained`, the shape of the parent `run`.

    The context length may differ, because positions are computed, not learned. Dropout may differ,
    because it has no weights. `residual_init` may differ, because it affects only random weights.
    """
    free = "context_length", "dropout", "residual_init"
    fix = {
        f"model.{name}": value
        for name, value in dataclasses.asdict(trained).items()
        if name not in free and getattr(config.model, name, None) != value
    }
    size = run.config.get("size")
    if fix and size not in (None, "gpt", config.size):
        fix = {"model": size}
    if fix:
        problem = "the model of that run differs in shape from the new model"
        raise UserError(problem, "init_from", config.init_from, fix)
