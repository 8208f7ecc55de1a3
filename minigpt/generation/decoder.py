"""Incremental decoding: each step reads a token per sequence and predicts the next token.

`Decoder` uses `GPT.forward` with a `KVCache`, or the faster kernels/decode.c. The latter needs a
CPU, a C compiler and a model of the class `GPT` itself. docs/generation.md has measurements.

    >>> decoder = Decoder(model, [torch.tensor([0, 17, 4])])
    >>> logits = decoder.read(torch.tensor([56]))  # (1, V), of the token after 0, 17, 4, 56
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

from minigpt.core.hardware import to_device
from minigpt.core.settings import UserError
from minigpt.generation.static_batch import StaticBatch
from minigpt.kernels.choice import is_plain
from minigpt.kernels.sampler import Sampler
from minigpt.model import GPT, KVCache

try:  # decode.py and decode.c are optional; all other modules take `decode` from here
    from minigpt.kernels import decode
except ImportError:
    decode = None

log = logging.getLogger(__name__)

Backend = Literal["auto", "torch", "c"]


class Batch(Protocol):
    """Sequences that are decoded together by one backend."""

    def fill(self, indices: list[int], sequences: list[Tensor]) -> None:
        """Replace the sequences at `indices` with `sequences`, each a tensor of ids (T,)."""
        ...

    def step(self, ids: Tensor, positions: Tensor, end: int) -> Tensor:
        """Append one token to each sequence and return the logits of the next token.

        Args:
            ids: the new tokens (B,).
            positions: positions of the new tokens (B,).
            end: the largest of `positions`, plus one.

        Returns:
            Logits (B, V), float32.
        """
        ...


class Decoder:
    """Batch of sequences of any lengths. Each step appends one token to every sequence.

    When a sequence fills the context, its context is shifted: the last context/2 - 1 tokens are
    read again from position 0, and decoding continues after them. Of a prompt that fills or exceeds
    the context, only the last context/2 - 1 tokens are read. Sequences shift independently, so
    batching does not change the logits of a sequence except by rounding.

    The model must be in evaluation mode and must not be trained while the decoder is in use. The
    "c" backend caches a copy of the weights of a frozen model. In-place writes through `.data` do
    not change PyTorch's version counter, so they do not invalidate this cache. On a CPU, the
    computation for a float16 model is in float32. The "c" backend stores the weights, keys and
    values of a bfloat16 model in bfloat16, and computes in float32.

    Args:
        model: a `GPT`. A subclass is decoded with its own `forward`.
        prompts: ids (T,) of each sequence, T >= 0, on the device of the model.
        backend: "torch" uses `model.forward`, "c" uses kernels/decode.c. "auto" selects "c" if
            decode.c can decode this model on this machine, with one exception: for 4 or more
            sequences, "auto" selects "torch" if PyTorch runs on several threads and decode.c on
            only one.

    Raises:
        UserError: the backend is "c" and cannot decode this model on this machine.
    """

    def __init__(self, model: GPT, prompts: Sequence[Tensor], backend: Backend = "auto") -> None:
        self.batch = _batch(model, len(prompts), backend)
        self.context = model.config.context_length
        self.half = max(1, self.context // 2)
        self.prompts = prompts
        self.new: deque[Tensor] = deque(maxlen=self.half)  # ids (B,) of the last steps
        # offsets[i] + n_read is the number of tokens of sequence i in the batch. So the host knows
        # the lengths without waiting for the device.
        self.offsets, self.n_read = [0] * len(prompts), 0
        self.device = model.embedding.weight.device
        fitting = [ids if len(ids) < self.context else self._truncated(ids) for ids in prompts]
        self._fill(list(range(len(prompts))), fitting)

    def read(self, ids: Tensor) -> Tensor:
        """Append one token to each sequence and return the logits of the next token.

        Args:
            ids: the new tokens (B,), on the device of the model.

        Returns:
            Logits (B, V), float32.

        Raises:
            ValueError: `ids` does not have one id per sequence.
            IndexError: on a CPU, an id is not in the vocabulary. No id is appended.
        """
        if ids.shape != self.positions.shape:
            shapes = f"{tuple(self.positions.shape)}, not {tuple(ids.shape)}"
            raise ValueError(f"ids must have one id per sequence: expected shape {shapes}")
        self.capacity()
        logits = self.batch.step(ids, self.positions, self.longest + 1)
        self._append(ids[None])
        return logits

    def generate(self, ids: Tensor, sampler: Sampler, points: Tensor) -> tuple[Tensor, Tensor]:
        """Append `ids`, then generate one or more further tokens per sequence with decode.c.

        The decoder must use the "c" backend. The last generated token of each sequence is not
        appended: pass these tokens as `ids` to the next call.

        Args:
            ids: the new tokens (B,), on a CPU.
            sampler: sampling settings, and the state of the sampling, which is updated.
            points: uniform random numbers (steps, B) in [0, 1), one for each token to generate;
                the number of steps is from 1 to `capacity()`.

        Returns:
            The generated tokens (n, B), int64, and the logits (n, B, V) of the model, float32. The
            number n of steps is less than that of `points` if all sequences end earlier.
        """
        assert decode is not None
        assert isinstance(self.batch, decode.Batch)
        steps = self.batch.generate(ids, self.positions, self.longest + 1, sampler, points)
        self._append(torch.cat([ids[None], steps[0][:-1]]))
        return steps

    @property
    def uses_c(self) -> bool:
        """Whether the backend is "c", so that `generate` can be called."""
        return decode is not None and isinstance(self.batch, decode.Batch)

    def capacity(self) -> int:
        """Shift each context that is full, and return how many tokens fit before the next shift."""
        if self.longest == self.context:
            self._shift()
        return self.context - self.longest

    def _append(self, ids: Tensor) -> None:
        """Record that the batch has read `ids` (T, B), which are T tokens of each sequence."""
        self.new.extend(ids)
        self.n_read += len(ids)
        self.longest += len(ids)
        self.positions += len(ids)

    def _shift(self) -> None:
        full = [i for i, n in enumerate(self.offsets) if n + self.n_read == self.context]
        new = torch.stack(tuple(self.new), dim=1)  # (B, at most half)
        self._fill(full, [self._truncated(torch.cat([self.prompts[i], new[i]])) for i in full])

    def _truncated(self, ids: Tensor) -> Tensor:
        """Return the last context/2 - 1 ids. With the next token, they fill half of the context."""
        return ids[len(ids) - (self.half - 1) :]

    def _fill(self, indices: list[int], sequences: list[Tensor]) -> None:
        for i, ids in zip(indices, sequences, strict=True):
            self.offsets[i] = len(ids) - self.n_read
        lengths = torch.tensor(self.offsets) + self.n_read
        self.longest = int(lengths.max())
        self.positions = to_device(lengths, self.device)  # (B,) positions of the next tokens
        self.batch.fill(indices, sequences)


class CachedBatch:
    """Batch that is decoded with `model.forward` and a `KVCache`."""

    def __init__(self, model: GPT, n_sequences: int) -> None:
        self.model, self.n_sequences = model, n_sequences
        self.cache = KVCache(model.config.context_length)

    def fill(self, indices: list[int], sequences: list[Tensor]) -> None:
        """Replace the sequences at `indices`, and compute the keys and values of the new ones."""
        cache = KVCache(self.model.config.context_length)
        ids = pad_sequence(sequences, batch_first=True)  # padding at the end is never attended to
        if ids.shape[1] and type(self.model).forward is GPT.forward:
            self.model.hidden(ids, cache)  # `forward` would also compute logits, unused here
        elif ids.shape[1]:
            self.model(ids, cache=cache)
        lengths = self.cache.lengths.expand(self.n_sequences).tolist()
        for index, sequence in zip(indices, sequences, strict=True):
            lengths[index] = len(sequence)
        if len(indices) == self.n_sequences:
            self.cache = cache
        else:
            # Not strict: if all new sequences are empty, `cache` has no layers.
            for stored, new in zip(self.cache.layers, cache.layers, strict=False):
                stored[:, indices, :, : cache.length] = new[:, :, :, : cache.length]
        self.cache.truncate(lengths)

    def step(self, ids: Tensor, positions: Tensor, end: int) -> Tensor:
        """Append one token to each sequence and return logits (B, V) of the next token."""
        logits = self.model(ids[:, None], cache=self.cache)[:, -1].float()
        if self.cache.length != end:
            problem = f"{type(self.model).__qualname__}.forward has a parameter `cache` but does"
            fix = "pass it to super().forward, or remove the parameter"
            raise UserError(f"{problem} not append to it: {fix}")
        return logits


class UncachedBatch:
    """Batch for a model whose `forward` takes no cache; each step processes whole sequences."""

    def __init__(self, model: GPT, n_sequences: int) -> None:
        self.model, self.sequences = model, [torch.empty(0)] * n_sequences

    def fill(self, indices: list[int], sequences: list[Tensor]) -> None:
        """Replace the sequences at `indices` with `sequences`."""
        for index, sequence in zip(indices, sequences, strict=True):
            self.sequences[index] = sequence

    def step(self, ids: Tensor, positions: Tensor, end: int) -> Tensor:
        """Append one token to each sequence and return logits (B, V) of the next token."""
        sequences = [torch.cat([s, new[None]]) for s, new in zip(self.sequences, ids, strict=True)]
        logits: list[Tensor] = list(ids)
        for length in {len(s) for s in sequences}:  # one pass per length, without padding
            indices = [i for i, s in enumerate(sequences) if len(s) == length]
            last = self.model(torch.stack([sequences[i] for i in indices]))[:, -1].float()
            for i, row in zip(indices, last, strict=True):
                logits[i] = row
        self.sequences = sequences
        return torch.stack(logits)


# ---------------------------------------------------------------------------- choice of backend


def c_backend() -> Any | None:
    """Return the Python binding of decode.c; None if decode.c cannot be used on this machine."""
    return None if decode is None or decode.library() is None else decode


def takes_cache(model: GPT) -> bool:
    """Return whether `model.forward` and `model.hidden` both accept the argument `cache`.

    A subclass of `GPT` may define these methods without this argument.
    """
    return all(
        "cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for parameters in (inspect.signature(f).parameters for f in (model.forward, model.hidden))
    )


def _batch(model: GPT, n_sequences: int, backend: Backend) -> Batch:
    """Return a batch of `n_sequences` empty sequences; `Decoder` describes `backend`."""
    name, weight = type(model).__qualname__, model.embedding.weight
    if backend != "torch":
        batch, reason = _c_batch(model, n_sequences, backend)
        if batch is not None:
            return batch
        if backend == "c":
            problem = f"decode.c cannot decode this model on this machine ({reason})"
            raise UserError(problem, "backend", backend, fix={"backend": "torch"})
        if type(model) is not GPT and c_backend() is not None:
            _warn_once(f"PyTorch decodes {name} more slowly than decode.c, which supports only GPT")
    if weight.dtype == torch.float16 and weight.device.type == "cpu":
        model = copy.deepcopy(model).float()
    if weight.device.type == "cuda" and is_plain(model):
        return StaticBatch(model, n_sequences)
    if takes_cache(model):
        return CachedBatch(model, n_sequences)
    _warn_once(f"{name} takes no `cache`, so each new token needs a pass over the whole sequence")
    return UncachedBatch(model, n_sequences)


def _c_batch(model: GPT, n_sequences: int, backend: Backend) -> tuple[Batch | None, str]:
    """Return (batch, "") for decode.c, or (None, reason) if decode.c is not used."""
    if decode is None:
        return None, "minigpt/kernels/decode.py is missing"
    if (reason := decode.unsupported(model)) is not None:
        return None, reason
    threads = torch.get_num_threads()
    if backend == "auto" and n_sequences >= 4 and threads > 1 and not decode.is_threaded():
        return None, "it runs on one thread, and PyTorch on several"
    if (weights := decode.packed_weights(model)) is None:
        return None, decode.MISMATCH
    return decode.Batch(weights, n_sequences), ""


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)
