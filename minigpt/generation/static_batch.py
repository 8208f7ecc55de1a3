"""Decoding on a GPU with a cache of constant size, and one CUDA graph that each step replays."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minigpt.core.hardware import to_device
from minigpt.kernels.cuda_graph import recorded
from minigpt.model import GPT, KVCache


class StaticCache(KVCache):
    """KV cache for steps of one token per sequence. Its shapes and memory never change.

    Attention is computed over all `capacity` positions, but a mask excludes the positions after the
    new token.

    Args:
        layers: keys and values (2, B, nh, capacity, hs) of each layer, changed in place.
        positions: positions (B,) of the new tokens. The caller sets them before each forward pass.
    """

    def __init__(self, layers: list[Tensor], positions: Tensor) -> None:
        super().__init__(layers[0].shape[3])
        self.layers, self.positions = layers, positions[:, None]
        self._all = torch.arange(self.capacity, device=positions.device)

    def extend(self, x: Tensor) -> Tensor:
        """Return the positions (B, 1) of the new tokens, and prepare the mask."""
        self.layer = 0
        later = self._all > self.positions[..., None]
        self.mask = torch.where(later, -math.inf, 0.0)[:, None]  # (B, 1, 1, capacity)
        return self.positions

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of the new tokens for one layer.

        After `extend`, the layers call this method in order, first layer first.

        Args:
            k: keys (B, nh, 1, hs).
            v: values (B, nh, 1, hs).

        Returns:
            Keys and values (B, nh, capacity, hs) of all positions of that layer.
        """
        stored = self.layers[self.layer]
        self.layer += 1
        index = self.positions[:, None, :, None].expand_as(k)
        return stored[0].scatter_(2, index, k), stored[1].scatter_(2, index, v)


class StaticBatch:
    """Batch for a `GPT` on a GPU. The first step records a CUDA graph, and later steps replay it.

    This class implements the protocol `generation.decoder.Batch`.

    Args:
        model: a `GPT` in evaluation mode. The memory addresses of its weights must not change.
        n_sequences: number of sequences, B.
    """

    def __init__(self, model: GPT, n_sequences: int) -> None:
        weight, c = model.embedding.weight, model.config
        size = 2, n_sequences, c.n_heads, c.context_length, c.d_model // c.n_heads
        self.model = model
        self.layers = [weight.new_zeros(size) for _ in range(c.n_layers)]
        self.ids = torch.zeros(n_sequences, dtype=torch.long, device=weight.device)
        self.positions = torch.zeros_like(self.ids)
        self._run = None

    def fill(self, indices: list[int], sequences: list[Tensor]) -> None:
        """Replace the sequences at `indices`, and compute the keys and values of the new ones."""
        ids = pad_sequence(sequences, batch_first=True)  # padding at the end is overwritten later
        if not ids.shape[1]:
            return
        cache = KVCache(self.model.config.context_length)
        cache.lengths = cache.lengths.to(ids.device, non_blocking=True)
        self.model.hidden(ids, cache)
        rows = to_device(torch.tensor(indices), ids.device)
        for stored, new in zip(self.layers, cache.layers, strict=True):
            stored.index_copy_(1, rows, new)

    def step(self, ids: Tensor, positions: Tensor, end: int) -> Tensor:
        """Append one token to each sequence and return logits (B, V) of the next token."""
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        if self._run is None:
            self._run = recorded(self._step, self.ids.device)
        return self._run().clone()  # the next step overwrites the result

    def _step(self) -> Tensor:
        cache = StaticCache(self.layers, self.positions)
        return self.model(self.ids[:, None], cache)[:, -1].float()
