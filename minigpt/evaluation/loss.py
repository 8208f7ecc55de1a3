"""Loss of a model on a split of tokens."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from minigpt.core.hardware import gpu_memory_for
from minigpt.core.progress import track
from minigpt.core.settings import UserError
from minigpt.data.windows import TokenWindows
from minigpt.kernels.choice import sequences_at_once
from minigpt.model import GPT, IGNORE_INDEX, perplexity

WINDOWS = 32  # number of windows to score at a time, except on a CUDA GPU


@dataclass(frozen=True)
class Score:
    """Loss on one set of stories."""

    n_stories: int
    n_tokens: int  # number of tokens that were scored
    nats_per_token: float
    perplexity: float
    bits_per_byte: float


@dataclass(frozen=True)
class Loss:
    """Sum of the cross-entropy over `n_tokens` predictions, in nats."""

    nats: float
    n_tokens: int

    @property
    def nats_per_token(self) -> float:
        """Mean cross-entropy per token, in nats."""
        return self.nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        """Exponential of the mean cross-entropy."""
        return perplexity(self.nats_per_token)

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """Return the loss in bits per UTF-8 byte.

        In this unit, the losses of models with different tokenizers can be compared.

        Args:
            bytes_per_token: mean number of UTF-8 bytes per token of the split that was scored.

        Returns:
            Bits per byte.
        """
        return self.nats_per_token / math.log(2) / bytes_per_token

    def score(self, n_stories: int, bytes_per_token: float) -> Score:
        """Return the loss as the score of `n_stories` stories; for `bytes_per_token`, see above."""
        in_bits = self.bits_per_byte(bytes_per_token)
        return Score(n_stories, self.n_tokens, self.nats_per_token, self.perplexity, in_bits)


def evaluate_loss(
    model: GPT,
    tokens: np.ndarray,
    batch_size: int | None = None,
    stride: int | None = None,
    precision: str = "32-true",
    console: Console | None = None,
) -> Loss:
    """Return the loss of `model` on a split; each token except the first is scored once.

    Args:
        model: the model; its context length is the window length, T.
        tokens: ids [n_tokens] uint16, usually a memory map.
        batch_size: number of windows to score at a time; None means 32, or more on a CUDA GPU.
        stride: number of tokens from the start of one window to the next, from 1 to T; None means
            T, as in the validation of a training run. A window scores only the tokens after the end
            of the previous window. So each token after the first window has at least T - stride
            tokens of context.
        precision: precision in Lightning's notation; only `*-mixed` uses autocast.
        console: console for the progress; None means that no progress is shown.

    Returns:
        The total loss in nats, and the number of scored tokens.

    Raises:
        UserError: the stride is not from 1 to the context length, or the GPU does not have enough
            memory.
    """
    context, device = model.config.context_length, model.embedding.weight.device
    stride = checked_stride(stride, context)
    batch_size = batch_size or sequences_at_once(model, on_cpu=WINDOWS)
    batches = window_batches(len(tokens), context, stride, batch_size)
    half = torch.float16 if precision == "16-mixed" else torch.bfloat16
    mixed = torch.autocast(device.type, half, enabled=precision.endswith("-mixed"))
    losses: list[Tensor] = []  # on the device, so that a batch does not wait for the one before
    counts: list[int] = []
    with torch.inference_mode(), mixed, contextlib.ExitStack() as at_exit:
        at_exit.callback(model.train, model.training)
        model.eval()
        for batch in track(batches, "validation split", console):
            ids, targets = windows(tokens, batch, context, stride)
            counts.append(int((targets != IGNORE_INDEX).sum()))
            with gpu_memory_for("batch_size", batch_size):
                losses.append(model.loss(ids.to(device), targets.to(device)))
    means = torch.stack(losses).tolist()
    return Loss(sum(n * mean for n, mean in zip(counts, means, strict=True)), sum(counts))


def checked_stride(stride: int | None, context: int) -> int:
    """Return the stride; None means `context`, the context length of the model.

    Raises:
        UserError: the stride is not from 1 to the context length.
    """
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        problem = f"must be from 1 to {context}, the context length of this model"
        raise UserError(problem, "stride", stride, fix={"stride": max(1, context // 2)})
    return stride


def window_batches(n_tokens: int, context: int, stride: int, batch_size: int) -> list[range]:
    """Return the indices of all windows of `n_tokens` tokens, `batch_size` at a time."""
    n_windows = 1 + max(0, math.ceil((n_tokens - 1 - context) / stride))
    return [range(n_windows)[i : i + batch_size] for i in range(0, n_windows, batch_size)]


def windows(
    tokens: np.ndarray, indices: Iterable[int], context: int, stride: int
) -> tuple[Tensor, Tensor]:
    """Return the windows at `indices`; window i starts at token i * `stride`.

    Args:
        tokens: ids [n_tokens] uint16.
        indices: indices of the windows, from 0.
        context: number of tokens per window, T.
        stride: number of tokens from the start of one window to the next, from 1 to T.

    Returns:
        Inputs and targets, each [B, T] int64. Targets that an earlier window scores, and targets
        past the end of `tokens`, are IGNORE_INDEX.
    """
    starts = [index * stride for index in indices]
    ids, targets = TokenWindows(tokens, context).__getitems__(starts)
    overlapping = torch.tensor(starts) > 0
    targets[overlapping, : context - stride] = IGNORE_INDEX
    return ids, targets
