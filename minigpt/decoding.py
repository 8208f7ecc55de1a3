"""Text read into a GPT one token at a time: keys and values are kept, logits come out.

`Decoder` computes what `GPT.forward` does, written out over the bare weights: at one token a step
the calls cost as much as the arithmetic. Numbers: docs/generation.md.

    >>> decoder = Decoder(net, [torch.tensor([0, 17, 4])])
    >>> logits = decoder.read(torch.tensor([56]))  # (1, V): of the token after 0 17 4 56
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from minigpt.model import GPT, Block, KVCache


class Decoder:
    """A batch of texts of any lengths, each of which grows by a token at a step.

    Positions are absolute and the context is finite, so a text that outgrows it slides: the last
    half of the context is read again from position 0, and reading goes on from there. A text that
    is longer from the start is cut down by the same rule. Each row slides when it is full itself,
    and gives the logits that it would give alone.

    Device and dtype are those of the net, which must be in evaluation mode and must not be trained
    meanwhile.
    """

    def __init__(self, net: GPT, texts: Sequence[Tensor]) -> None:
        """`texts`: the ids (T,) of each row, T >= 0, on the device of the net."""
        weight = net.embedding.weight
        self.net, self.context, self.n_heads = net, net.config.context_length, net.config.n_heads
        self.half = max(1, self.context // 2)
        self.texts = texts
        self.new: deque[Tensor] = deque(maxlen=self.half)  # ids (B,) read behind `texts`
        self.cache = KVCache(net.config, len(texts), like=weight)
        self.lengths = [0] * len(texts)  # tokens of each row in the cache
        self.rows = torch.arange(len(texts), device=weight.device)
        self.embedding, self.unembedding = weight * net.scale, weight.t().contiguous()
        self.layers = [_layer(block) for block in net.blocks]
        kept = [text if len(text) < self.context else self._tail(text) for text in texts]
        self._fill(list(range(len(texts))), kept)

    def read(self, ids: Tensor) -> Tensor:
        """Each row's text goes on with `ids` (B,): logits (B, V), float32, of what follows."""
        self._slide()
        self.new.append(ids)
        logits = self._step(ids)
        self.lengths = [length + 1 for length in self.lengths]
        return logits

    def _slide(self) -> None:
        full = [row for row, length in enumerate(self.lengths) if length == self.context]
        if full:
            new = torch.stack(tuple(self.new), dim=1)  # (B, at most half)
            self._fill(full, [self._tail(torch.cat([self.texts[row], new[row]])) for row in full])

    def _tail(self, text: Tensor) -> Tensor:
        """What a slide keeps: with the token that is read next, the last half of the context."""
        return text[len(text) - (self.half - 1) :]

    def _fill(self, rows: list[int], texts: list[Tensor]) -> None:
        """Have the cache hold `texts`, read from position 0, for `rows`."""
        ids = pad_sequence(list(texts), batch_first=True)  # behind the text, where it cannot look
        every = len(rows) == len(self.lengths)
        cache = self.cache if every else KVCache(self.net.config, len(rows), self.cache.store)
        cache.length = 0
        if ids.shape[1]:
            self.net.hidden(ids, cache)
            if not every:
                end = ids.shape[1]
                self.cache.store[:, :, rows, :, :end] = cache.store[:, :, :, :, :end]
        for row, text in zip(rows, texts, strict=True):
            self.lengths[row] = len(text)

    def _step(self, ids: Tensor) -> Tensor:
        """`GPT.forward` for one token of each row. B rows, N = B · heads, S tokens in the cache."""
        at = self.cache.store.new_tensor(self.lengths, dtype=torch.long)  # (B,) place of each token
        end = max(self.lengths) + 1  # S
        ragged = min(self.lengths) + 1 < end
        store = self.cache.store[:, :, :, :, :end]  # (L, 2, B, nh, S, dk)
        keys = store[:, 0].flatten(1, 2).transpose(2, 3).unbind()  # L of (N, dk, S)
        values = store[:, 1].flatten(1, 2).unbind()  # L of (N, S, dk)
        hidden = torch.arange(end, device=at.device) > at[:, None] if ragged else None  # (B, S)
        x = F.embedding(ids, self.embedding) + self.net.positions[at]  # (B, d)
        for layer, kept, key, value in zip(self.layers, store, keys, values, strict=True):
            qkv = torch.addmm(layer.qkv_bias, layer.norm1(x), layer.qkv)
            qkv = qkv.view(len(ids), 3, self.n_heads, -1)  # (B, 3, nh, dk)
            if ragged:
                kept[:, self.rows, :, at] = qkv[:, 1:]
            else:
                kept[:, :, :, end - 1] = qkv[:, 1:].transpose(0, 1)
            scores = torch.bmm(qkv[:, 0].reshape(len(key), 1, -1), key)  # (N, 1, S)
            if hidden is not None:
                scores.view(len(ids), -1, end).masked_fill_(hidden[:, None], -math.inf)
            y = torch.bmm(scores.softmax(-1), value).view(len(ids), -1)  # (B, d)
            x += torch.addmm(layer.out_bias, y, layer.out)
            h = F.gelu(torch.addmm(layer.up_bias, layer.norm2(x), layer.up))
            x += torch.addmm(layer.down_bias, h, layer.down)
        return torch.mm(self.net.final_norm(x), self.unembedding).float()


class _Layer(NamedTuple):
    """A block. Its matrices are (in, out): products with a few rows are faster so on a CPU."""

    norm1: nn.LayerNorm
    qkv: Tensor  # queries come out divided by √dk
    qkv_bias: Tensor
    out: Tensor
    out_bias: Tensor
    norm2: nn.LayerNorm
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor


def _layer(block: nn.Module) -> _Layer:
    assert isinstance(block, Block)
    attention, mlp = block.attention, block.feed_forward
    d_model = attention.qkv.in_features
    scale = torch.ones_like(attention.qkv.bias)
    scale[:d_model] = math.sqrt(attention.n_heads / d_model)  # dk^-½
    return _Layer(
        block.norm1,
        (attention.qkv.weight.t() * scale).contiguous(),
        attention.qkv.bias * scale,
        attention.out.weight.t().contiguous(),
        attention.out.bias,
        block.norm2,
        mlp.up.weight.t().contiguous(),
        mlp.up.bias,
        mlp.down.weight.t().contiguous(),
        mlp.down.bias,
    )
