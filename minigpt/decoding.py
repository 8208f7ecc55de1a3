"""Text read into a GPT one token at a time: keys and values are kept, logits come out.

`Decoder` computes what `GPT.forward` does, written out over the bare weights: at one token a step
the calls cost as much as the arithmetic. Numbers: docs/generation.md.

    >>> decoder = Decoder(net, [torch.tensor([0, 17, 4])])
    >>> logits = decoder.read(torch.tensor([56]))  # (1, V): of the token after 0 17 4 56
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
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
        self.embedding = weight * net.scale
        self.layers = [_layer(block) for block in net.blocks]
        self.final_norm = _norm(net.final_norm)
        self.unembed = _affine(weight.t(), None)
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
        cache = KVCache(self.net.config, len(rows), self.cache.store)
        if ids.shape[1]:
            self.net.hidden(ids, cache)
        if len(rows) == len(self.lengths):
            self.cache = cache
        else:
            end = cache.length
            self.cache.make_room(end)
            self.cache.store[:, :, rows, :, :end] = cache.store[:, :, :, :, :end]
        for row, text in zip(rows, texts, strict=True):
            self.lengths[row] = len(text)

    def _step(self, ids: Tensor) -> Tensor:
        """`GPT.forward` for one token of each row. B rows, N = B · heads, room for R tokens."""
        end = max(self.lengths) + 1
        self.cache.make_room(end)
        store = self.cache.store  # (L, 2, B, nh, R, dk)
        at = store.new_tensor(self.lengths, dtype=torch.long)  # (B,) place of each token
        hidden = torch.arange(store.shape[4], device=at.device) > at[:, None]  # (B, R)
        mask = store.new_zeros(hidden.shape).masked_fill_(hidden, -math.inf)
        mask = mask[:, None].expand(-1, self.n_heads, -1).reshape(-1, 1, hidden.shape[1])
        held = store.flatten(2, 3).unbind(1)  # keys and values, each (L, N, R, dk)
        keys, values = held[0].transpose(2, 3).unbind(), held[1].unbind()
        ragged = min(self.lengths) + 1 < end
        places = (store if ragged else store[:, :, :, :, end - 1].transpose(1, 2)).unbind()
        x = F.embedding(ids, self.embedding) + self.net.positions[at]  # (B, d)
        for layer, place, key, value in zip(self.layers, places, keys, values, strict=True):
            qkv = layer.qkv(layer.norm1(x)).view(len(ids), 3, self.n_heads, -1)  # (B, 3, nh, dk)
            if ragged:
                place[:, self.rows, :, at] = qkv[:, 1:]
            else:
                place.copy_(qkv[:, 1:])
            # Over all the room, for the products are several times slower over a part of it.
            scores = torch.baddbmm(mask, qkv[:, 0].reshape(len(key), 1, -1), key)  # (N, 1, R)
            y = torch.bmm(scores.softmax(-1), value).view(len(ids), -1)  # (B, d)
            x += layer.out(y)
            u = layer.up(layer.norm2(x))
            x += layer.down(torch.addcmul(u, u, u.erf()))
        return self.unembed(self.final_norm(x)).float()


# ---------------------------------------------------------------------------- weights

Rows = Callable[[Tensor], Tensor]  # (B, in) to (B, out)


class _Layer(NamedTuple):
    """A block, with what its formulas multiply by folded into the matrices."""

    norm1: Rows
    qkv: Rows  # queries come out divided by √dk
    out: Rows
    norm2: Rows
    up: Rows  # comes out as u = z / √2: GELU(z) = z (1 + erf(z / √2)) / 2 = √½ (u + u erf u)
    down: Rows  # takes u + u erf u


def _layer(block: nn.Module) -> _Layer:
    assert isinstance(block, Block)
    attention, mlp = block.attention, block.feed_forward
    d_model = attention.qkv.in_features
    dk_scale = torch.ones_like(attention.qkv.bias)
    dk_scale[:d_model] = math.sqrt(attention.n_heads / d_model)  # dk^-½
    half = math.sqrt(0.5)
    return _Layer(
        norm1=_norm(block.norm1),
        qkv=_affine(attention.qkv.weight.t() * dk_scale, attention.qkv.bias * dk_scale),
        out=_affine(attention.out.weight.t(), attention.out.bias),
        norm2=_norm(block.norm2),
        up=_affine(mlp.up.weight.t() * half, mlp.up.bias * half),
        down=_affine(mlp.down.weight.t() * half, mlp.down.bias),
    )


def _norm(norm: nn.LayerNorm) -> Rows:
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


def _affine(matrix: Tensor, bias: Tensor | None) -> Rows:
    """x (B, in) to x @ `matrix` (in, out) + `bias`.

    The matrix is kept as (in, out): with few rows that is twice as fast as (out, in) on a CPU.
    """
    matrix = matrix.contiguous()
    if bias is None:
        return lambda x: torch.mm(x, matrix)
    return lambda x: torch.addmm(bias, x, matrix)
