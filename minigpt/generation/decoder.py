"""Texts continued token by token: keys and values are kept, logits of the next token come out.

`Decoder` decodes by `GPT.forward` and a `KVCache`. On a CPU with a C compiler `kernels/decode.c`
computes the same faster, for a model that is exactly a GPT. Numbers: docs/generation.md.

    >>> decoder = Decoder(model, [torch.tensor([0, 17, 4])])
    >>> logits = decoder.read(torch.tensor([56]))  # (1, V): of the token after 0 17 4 56
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minigpt.core.settings import UserError
from minigpt.model import GPT, KVCache

try:
    from minigpt.kernels import decode
except ImportError:  # it is optional: without it PyTorch decodes
    decode = None

log = logging.getLogger(__name__)

Backend = Literal["auto", "torch", "c"]


class Batch(Protocol):
    """Sequences that are continued together, as a backend holds them."""

    def fill(self, rows: list[int], texts: list[Tensor]) -> None:
        """Let the sequences `rows` be `texts`, ids (T,) each."""
        ...

    def step(self, ids: Tensor, at: Tensor, end: int) -> Tensor:
        """Append `ids` (B,) at positions `at` (B,), the largest being `end` - 1: logits (B, V)."""
        ...


class Decoder:
    """A batch of texts of any lengths, each of which grows by a token at a step.

    Positions are absolute and the context is finite, so a text that outgrows it is shifted: the
    last half of the context is read again from position 0, and reading continues from there. A text
    that is longer from the start is cut down by the same rule. Each text is shifted when it is full
    itself, and gives the logits that it would give alone.

    The model must be in evaluation mode and must not be trained meanwhile. The "c" backend keeps
    the packed weights of a frozen model from text to text; what is written through `.data`, which
    PyTorch does not count, is not seen. On a CPU a float16 model is computed in float32, and "c"
    computes a bfloat16 one in float32 with weights, keys and values in bfloat16.

    Args:
        net: the model; a subclass is decoded by its own `forward`.
        texts: ids (T,) of each text, T >= 0, on the device of the model.
        backend: "torch" decodes by `net.forward`, "c" by kernels/decode.c; "auto" takes "c" where
            it is possible.

    Raises:
        UserError: the backend is "c" and cannot decode this model here.
    """

    def __init__(self, net: GPT, texts: Sequence[Tensor], backend: Backend = "auto") -> None:
        self.batch = _batch(net, len(texts), backend)
        self.context = net.config.context_length
        self.half = max(1, self.context // 2)
        self.texts = texts
        self.new: deque[Tensor] = deque(maxlen=self.half)  # ids (B,) read behind `texts`
        # (B,) tokens held of each text: the position of the next one.
        self.at = torch.zeros(len(texts), dtype=torch.long, device=net.embedding.weight.device)
        kept = [text if len(text) < self.context else self._tail(text) for text in texts]
        self._fill(list(range(len(texts))), kept)

    def read(self, ids: Tensor) -> Tensor:
        """Continue each text by one of `ids` (B,): logits (B, V), float32, of what follows."""
        if ids.shape != self.at.shape:
            raise ValueError(f"ids of shape {tuple(ids.shape)} for {len(self.at)} texts")
        if self.longest == self.context:
            self._shift()
        logits = self.batch.step(ids, self.at, self.longest + 1)
        self.new.append(ids)
        self.longest += 1
        self.at += 1
        return logits

    def _shift(self) -> None:
        full = [row for row, at in enumerate(self.at.tolist()) if at == self.context]
        new = torch.stack(tuple(self.new), dim=1)  # (B, at most half)
        self._fill(full, [self._tail(torch.cat([self.texts[row], new[row]])) for row in full])

    def _tail(self, text: Tensor) -> Tensor:
        """What a shift keeps: with the token that is read next, the last half of the context."""
        return text[len(text) - (self.half - 1) :]

    def _fill(self, rows: list[int], texts: list[Tensor]) -> None:
        self.at[rows] = torch.tensor([len(text) for text in texts], device=self.at.device)
        self.longest = int(self.at.max())
        self.batch.fill(rows, texts)


class CachedBatch:
    """A batch that is decoded by `net.forward` and a KVCache."""

    def __init__(self, net: GPT, rows: int) -> None:
        self.net, self.rows, self.cache = net, rows, KVCache(net.config.context_length)

    def fill(self, rows: list[int], texts: list[Tensor]) -> None:
        cache = KVCache(self.net.config.context_length)
        ids = pad_sequence(texts, batch_first=True)  # behind a text, where it cannot look
        if ids.shape[1] and type(self.net).forward is GPT.forward:
            self.net.hidden(ids, cache)  # no logits, which nobody asks for here
        elif ids.shape[1]:
            self.net(ids, cache=cache)
        lengths = self.cache.lengths.expand(self.rows).tolist()
        for row, text in zip(rows, texts, strict=True):
            lengths[row] = len(text)
        if len(rows) == self.rows:
            self.cache = cache
        else:
            # The texts that are filled may all be empty: then `cache` has no layers.
            for held, new in zip(self.cache.layers, cache.layers, strict=False):
                held[:, rows, :, : cache.length] = new[:, :, :, : cache.length]
        self.cache.truncate(lengths)

    def step(self, ids: Tensor, at: Tensor, end: int) -> Tensor:
        logits = self.net(ids[:, None], cache=self.cache)[:, -1].float()
        if self.cache.length != end:
            raise UserError(f"{type(self.net).__qualname__}.forward takes a cache, but keeps none")
        return logits


class UncachedBatch:
    """A batch of a model whose forward takes no cache: each step is a full pass over the texts."""

    def __init__(self, net: GPT, rows: int) -> None:
        self.net, self.texts = net, [torch.empty(0)] * rows

    def fill(self, rows: list[int], texts: list[Tensor]) -> None:
        for row, text in zip(rows, texts, strict=True):
            self.texts[row] = text

    def step(self, ids: Tensor, at: Tensor, end: int) -> Tensor:
        texts = [torch.cat([text, new[None]]) for text, new in zip(self.texts, ids, strict=True)]
        logits: list[Tensor] = list(ids)
        for length in {len(text) for text in texts}:  # those of one length together: no padding
            rows = [row for row, text in enumerate(texts) if len(text) == length]
            last = self.net(torch.stack([texts[row] for row in rows]))[:, -1].float()
            for row, of_row in zip(rows, last, strict=True):
                logits[row] = of_row
        self.texts = texts
        return torch.stack(logits)


# ---------------------------------------------------------------------------- choice of backend


def c_backend() -> Any | None:
    """Return the module that calls decode.c; None without it or without a C compiler."""
    return decode if decode is not None and decode.library() is not None else None


def takes_cache(net: GPT) -> bool:
    """Whether `net.forward` decodes with a KVCache: that of a subclass may take none."""
    return all(
        "cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for parameters in (inspect.signature(f).parameters for f in (net.forward, net.hidden))
    )


def _batch(net: GPT, rows: int, backend: Backend) -> Batch:
    """Return an empty batch of the backend that is asked for, or of the fastest one."""
    if backend != "torch":
        batch, reason = _c_batch(net, rows, backend)
        if batch is not None:
            return batch
        if backend == "c":
            raise UserError(f"decode.c is of no use: {reason}", "backend", fix={"backend": "torch"})
        if type(net) is not GPT and c_backend() is not None:
            _say_once(f"PyTorch decodes {type(net).__qualname__}: decode.c knows GPT alone")
    if net.embedding.weight.dtype == torch.float16 and net.embedding.weight.device.type == "cpu":
        net = copy.deepcopy(net).float()
    if takes_cache(net):
        return CachedBatch(net, rows)
    _say_once(f"{type(net).__qualname__} takes no cache: each token costs a pass over the text")
    return UncachedBatch(net, rows)


def _c_batch(net: GPT, rows: int, backend: Backend) -> tuple[Batch | None, str]:
    """Return a batch for decode.c, or None and the reason."""
    if decode is None:
        return None, "minigpt.kernels.decode is missing"
    if (reason := decode.unsupported(net)) is not None:
        return None, reason
    if backend == "auto" and rows >= 4 and torch.get_num_threads() > 1 and not decode.is_threaded():
        return None, "it works on one thread, and PyTorch on several"
    if (weights := decode.prepared(net)) is None:
        return None, "its logits are not those of GPT.forward on this machine"
    return decode.Batch(weights, rows), ""


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)
