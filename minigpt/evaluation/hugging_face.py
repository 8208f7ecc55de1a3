"""Loss of a causal language model in Hugging Face's format, on the stories of `evaluate`.

>>> evaluate_hf("models/gpt2").bits_per_byte  # comparable with evaluate("runs/my-run")

The unit bits per byte does not depend on the tokenizer, so models with different tokenizers can be
compared.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from minigpt.core.files import user_path, write_json
from minigpt.core.gpu_memory import is_out_of_memory
from minigpt.core.hardware import Hardware, gpu_memory_for
from minigpt.core.progress import track
from minigpt.core.settings import UserError
from minigpt.data.config import DataConfig
from minigpt.data.corpus import Corpus
from minigpt.evaluation.config import EvaluationConfig
from minigpt.evaluation.corpora import Scores, score_corpora
from minigpt.evaluation.loss import WINDOWS, Loss, Score, checked_stride, window_batches, windows
from minigpt.evaluation.results import check_writable, file_name
from minigpt.model import IGNORE_INDEX
from minigpt.runs.names import CONFIG
from minigpt.tokenizer import utf8_length

_CHUNK = 1024  # tokens of a window per forward pass; the key/value cache holds earlier tokens
MAX_CONTEXT = 2048  # tokens per window, unless a setting or the model says otherwise
_LENGTHS = (  # names of the context length in configs; some models have none
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len",
)  # fmt: skip
_MAX_LOGITS = 1 << 27  # maximum number of logits per forward pass, 512 MB
_ONLY_OURS = ("seed", "stories", "words", "analogies")  # settings that need a Mini GPT


@dataclass(frozen=True)
class HFEvaluation(Scores):
    """Loss of a Hugging Face model."""

    model: str  # path of the model
    parameters: int
    vocabulary: int  # number of tokens of the tokenizer
    context: int  # number of tokens per window
    stride: int | None
    device: str


def evaluate_hf(
    folder: str | Path,
    config: EvaluationConfig | None = None,
    console: Console | None = None,
    out: str | Path | None = None,
) -> HFEvaluation:
    """Measure the loss of a causal language model in Hugging Face's format, in float32.

    The stories are joined as in `evaluate`: the model's own tokenizer encodes each story, and an
    end-of-sequence token follows each story. Each token except the first is scored once, in windows
    of the context length of the model, but of at most MAX_CONTEXT tokens unless `config.context` is
    set. The model is read from local files only, and no code from
    its folder is run. The loss is also written to a file; `evaluation_hf_name` gives its name.

    Args:
        folder: folder that `from_pretrained` of transformers can load.
        config: settings; only `data`, `valid`, `context`, `stride` and `batch_size` apply. None
            means the defaults. If `config.data` is None, the bundled sample is scored.
        console: console for the progress; None means that no progress is shown.
        out: folder for the file with the loss; None means the working directory.

    Returns:
        The loss. If the validation stories of both TinyStories V2 and V1 were scored, the result is
        the loss for V2, and its field `valid_v1` is the loss for V1. For the bundled sample, both
        are scored by default.

    Raises:
        UserError: transformers is missing, `folder` does not contain a causal language model, a
            setting is out of range or does not apply, the data cannot be read, the GPU does not
            have enough memory, or the output folder cannot be written.
    """
    folder, config = user_path(folder, "hf"), config or EvaluationConfig()
    out = user_path(out or ".", "out")
    path = out / evaluation_hf_name(folder, config)
    _check_settings(config)
    check_writable(out, path.name)
    model, tokenizer = _load(folder)
    context = _context(model.config, config.context)
    stride = checked_stride(config.stride, context)
    device = Hardware.single("32-true").accelerator
    model = _moved(model, device, folder)

    def score(corpus: Corpus) -> Score:
        ids, n_stories, n_bytes = _encoded(corpus, tokenizer)
        loss = _loss(model, ids, context, stride, config.batch_size or WINDOWS, console)
        return loss.score(n_stories, n_bytes / len(ids))

    scores = score_corpora(config.data or DataConfig(), config.valid, score)
    evaluation = HFEvaluation(
        **vars(scores),
        model=str(folder),
        parameters=model.num_parameters(),
        vocabulary=len(tokenizer),
        context=context,
        stride=config.stride,
        device=device,
    )
    write_json(path, dataclasses.asdict(evaluation))
    return evaluation


def evaluation_hf_name(folder: Path, config: EvaluationConfig) -> str:
    """Return the name of the file for the results of the model in `folder`.

    For a checkpoint of the Hugging Face trainer, such as out/checkpoint-500, the name contains the
    names of both folders. The settings add the same parts to the name as in `evaluation_name`.
    """
    is_tuning = config.valid is None and config.data is not None and config.data.valid == "tuning"
    folder = folder.resolve()
    is_checkpoint = re.fullmatch(r"checkpoint-\d+", folder.name) is not None
    name = f"{folder.parent.name}-{folder.name}" if is_checkpoint else folder.name
    return file_name(f"evaluation-hf-{name}", config, is_tuning, config.valid)


def _check_settings(config: EvaluationConfig) -> None:
    for name in _ONLY_OURS:
        if getattr(config, name) != getattr(EvaluationConfig(), name):
            problem = "does not apply to a Hugging Face model: leave it out, or evaluate a run"
            raise UserError(problem, name)


def _load(folder: Path) -> tuple[Any, Any]:
    """Return the model, in evaluation mode, and its tokenizer.

    Raises:
        UserError: transformers is missing, transformers cannot load a causal language model from
            the folder, or the tokenizer has no end-of-sequence token.
    """
    if (folder / CONFIG).is_file():
        problem = "this is a model of Mini GPT: evaluate it by ckpt instead of hf"
        raise UserError(problem, "hf", str(folder), command=("evaluate", {"ckpt": str(folder)}))
    if not (folder / "config.json").is_file():
        example = "download a model with hf download NAME --local-dir FOLDER"
        problem = f"this is not a folder with a Hugging Face model: {example}"
        raise UserError(problem, "hf", str(folder))
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        problem = "this needs the package transformers: run pip install transformers"
        raise UserError(problem, "hf") from None
    transformers.logging.disable_progress_bar()
    offline = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **offline)
        factory = transformers.AutoModelForCausalLM
        model = factory.from_pretrained(folder, dtype=torch.float32, **offline)
    except Exception as error:  # transformers and its parts raise many kinds
        reason = " ".join(str(error).split())[:300]
        problem = f"transformers cannot load this model ({reason}): choose another folder"
        raise UserError(problem, "hf", str(folder)) from None
    if tokenizer.eos_token_id is None:
        problem = "its tokenizer has no end-of-sequence token, which separates the stories"
        raise UserError(f"{problem}: choose another model", "hf", str(folder))
    return model.eval(), tokenizer


def _moved(model: Any, device: str, folder: Path) -> Any:
    """Return the model on the device; raise UserError if the GPU has too little memory."""
    try:
        return model.to(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        remedy = "to use the CPU, put CUDA_VISIBLE_DEVICES= before the command"
        raise UserError(f"not enough GPU memory: {remedy}", "hf", str(folder)) from None


def _context(config: Any, typed: int | None) -> int:
    """Return the number of tokens per window of a model.

    Args:
        config: config of the model, of transformers.
        typed: the setting `context`; None means the context length in `config`, but at most
            MAX_CONTEXT.

    Raises:
        UserError: `typed` is larger than the context length in `config`.
    """
    text = config.get_text_config()
    lengths = [getattr(text, name, None) for name in _LENGTHS]
    length = next((n for n in lengths if isinstance(n, int) and n > 0), None)
    if typed is None:
        return min(length or MAX_CONTEXT, MAX_CONTEXT)
    if length is not None and typed > length:
        problem = f"the model reads at most {length} tokens"
        raise UserError(problem, "context", typed, fix={"context": length})
    return typed


def _encoded(corpus: Corpus, tokenizer: Any) -> tuple[np.ndarray, int, int]:
    """Return the ids of the validation stories, and the numbers of stories and UTF-8 bytes."""
    pieces = [*corpus.pieces("valid")]
    if not pieces:
        raise UserError("the valid split contains no story; add more text", "data.source")
    rows = tokenizer(
        [text for text, _ in pieces], add_special_tokens=False, split_special_tokens=True
    )["input_ids"]
    end = [tokenizer.eos_token_id]
    parts: list[Iterable[int]] = []
    for ids, (_, is_last) in zip(rows, pieces, strict=True):
        parts += [ids, end] if is_last else [ids]
    n_stories = sum(is_last for _, is_last in pieces)
    n_bytes = sum(utf8_length(text) for text, _ in pieces)
    return np.concatenate([np.array(ids, dtype=np.int64) for ids in parts]), n_stories, n_bytes


@torch.inference_mode()
def _loss(
    model: Any, ids: np.ndarray, context: int, stride: int, batch_size: int,
    console: Console | None,
) -> Loss:  # fmt: skip
    """Return the loss of a model on `ids`. Each id is scored once, except the very first one."""
    chunk = min(context, _CHUNK) if _cache_argument(model) else context
    vocabulary = model.config.get_text_config().vocab_size
    size = max(1, min(batch_size, _MAX_LOGITS // (chunk * vocabulary)))
    batches = window_batches(len(ids), context, stride, size)
    nats, n_tokens = 0.0, 0
    for batch in track(batches, "validation split", console):
        inputs, targets = (part.to(model.device) for part in windows(ids, batch, context, stride))
        cache = {"use_cache": False} if context == chunk else _cache(model)
        for start in range(0, context, chunk):
            part = slice(start, start + chunk)
            with gpu_memory_for("batch_size", size):
                nats += _sum(model(inputs[:, part], **cache).logits, targets[:, part])
        n_tokens += int((targets != IGNORE_INDEX).sum())
    return Loss(nats, n_tokens)


def _cache_argument(model: Any) -> str | None:
    """Return the name of the argument for a key/value cache; None if the model takes no cache."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), None)


def _cache(model: Any) -> dict[str, Any]:
    """Return arguments that make each forward pass append to a cache, which is empty at first."""
    cache = importlib.import_module("transformers").DynamicCache(config=model.config)
    return {str(_cache_argument(model)): cache, "use_cache": True}


def _sum(logits: Tensor, targets: Tensor) -> float:
    flat = logits.float().flatten(0, 1), targets.flatten()
    return F.cross_entropy(*flat, ignore_index=IGNORE_INDEX, reduction="sum").item()
