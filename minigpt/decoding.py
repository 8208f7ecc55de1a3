"""Text read into a GPT one token at a time: keys and values are kept, logits come out.

`Decoder` computes what `GPT.forward` does, written out over the bare weights: at one token a step
the calls cost as much as the arithmetic. Numbers: docs/generation.md.

    >>> decoder = Decoder(net, [torch.tensor([0, 17, 4])])
    >>> logits = decoder.read(torch.tensor([56]))  # (1, V): of the token after 0 17 4 56
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

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
    meanwhile. A float16 net on a CPU has its weights in float16 and everything else in float32:
    a batch of one waits for its weights, and those take half the time.
    """

    def __init__(self, net: GPT, texts: Sequence[Tensor]) -> None:
        """`texts`: the ids (T,) of each row, T >= 0, on the device of the net."""
        self.weights = weights = _prepared(net, len(texts))
        self.net, self.context, self.n_heads = net, net.config.context_length, net.config.n_heads
        self.half = max(1, self.context // 2)
        self.texts = texts
        self.new: deque[Tensor] = deque(maxlen=self.half)  # ids (B,) read behind `texts`
        self.cache = KVCache(net.config, len(texts), like=weights.embedding)
        self.lengths = [0] * len(texts)  # tokens of each row in the cache
        self.rows = torch.arange(len(texts), device=weights.embedding.device)
        kept = [text if len(text) < self.context else self._tail(text) for text in texts]
        self._fill(list(range(len(texts))), kept)

    def read(self, ids: Tensor) -> Tensor:
        """Each row's text goes on with `ids` (B,): logits (B, V), float32, of what follows."""
        self._slide()
        self.new.append(ids)
        logits = self._step(ids)
        self.lengths = [length + 1 for length in self.lengths]
        self.at += 1
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
        cache = KVCache(self.weights.net.config, len(rows), self.cache.store)
        if ids.shape[1]:
            self.weights.net.hidden(ids, cache)
        if len(rows) == len(self.lengths):
            self.cache = cache
        else:
            end = cache.length
            self.cache.make_room(end)
            self.cache.store[:, :, rows, :, :end] = cache.store[:, :, :, :, :end]
        for row, text in zip(rows, texts, strict=True):
            self.lengths[row] = len(text)
        self._arrange()

    def _arrange(self) -> None:
        """Views of the cache, and a mask over its room, that stay until it grows or is filled."""
        store = self.cache.store  # (L, 2, B, nh, R, dk); R tokens of room, N = B · nh
        keys, values = store.flatten(2, 3).unbind(1)  # each (L, N, R, dk)
        self.keys, self.values = keys.transpose(2, 3).unbind(), values.unbind()
        self.at = store.new_tensor(self.lengths, dtype=torch.long)  # (B,) place of the next token
        hidden = torch.arange(store.shape[4], device=store.device) >= self.at[:, None]  # (B, R)
        mask = store.new_zeros(hidden.shape).masked_fill_(hidden, -math.inf)
        self.mask = mask[:, None].repeat(1, self.n_heads, 1)  # (B, nh, R)

    def _step(self, ids: Tensor) -> Tensor:
        """`GPT.forward` for one token of each row."""
        end = max(self.lengths) + 1
        if end > self.cache.store.shape[4]:
            self.cache.make_room(end)
            self._arrange()
        weights, store, mask, at = self.weights, self.cache.store, self.mask, self.at
        if min(self.lengths) + 1 == end:  # all texts are of one length: slices, which cost less
            mask[:, :, end - 1] = 0.0
            position = weights.net.positions[end - 1]  # (d,)
            places = store[:, :, :, :, end - 1].transpose(1, 2).unbind()  # each (B, 2, nh, dk)
        else:
            mask[self.rows, :, at] = 0.0
            position = weights.net.positions[at]  # (B, d)
            places = None
        mask = mask.view(-1, 1, mask.shape[2])  # (N, 1, R)
        scale = self.keys[0].shape[1] ** -0.5
        x = F.embedding(ids, weights.embedding) + position  # (B, d)
        for i, layer in enumerate(weights.layers):
            qkv = layer.qkv(layer.norm1(x)).view(len(ids), 3, self.n_heads, -1)  # (B, 3, nh, dk)
            if places is None:
                store[i][:, self.rows, :, at] = qkv[:, 1:]
            else:
                places[i].copy_(qkv[:, 1:])
            query = qkv[:, 0].reshape(len(mask), 1, -1)
            # Over all the room, for the products are several times slower over a part of it.
            scores = torch.baddbmm(mask, query, self.keys[i], alpha=scale)  # (N, 1, R)
            y = torch.bmm(scores.softmax(-1), self.values[i]).view(len(ids), -1)  # (B, d)
            x += layer.out(y)
            x += layer.down(layer.up(layer.norm2(x)))
        return weights.unembed(weights.final_norm(x)).float()


# ---------------------------------------------------------------------------- weights

Rows = Callable[[Tensor], Tensor]  # (B, in) to (B, out)


class _Layer(NamedTuple):
    """A block, as functions of B rows."""

    norm1: Rows
    qkv: Rows
    out: Rows
    norm2: Rows
    up: Rows  # and GELU, twice that unless oneDNN computes it
    down: Rows  # takes what `up` gives


class _Weights(NamedTuple):
    """What a step multiplies by, in the order in memory that suits the product."""

    net: GPT  # reads prompts
    embedding: Tensor  # (V, d), scaled
    layers: list[_Layer]
    final_norm: Rows
    unembed: Rows


State = list[tuple[int, int]]  # address and version of each parameter
_kept: WeakKeyDictionary[GPT, dict[str, tuple[State, list[Tensor], _Weights]]]
_kept = WeakKeyDictionary()


def _prepared(net: GPT, rows: int) -> _Weights:
    """The weights of `net` for batches of `rows`. Those of a frozen net are made once.

    Not so where a parameter requires a gradient: PyTorch does not count what fused optimizers do.
    """
    how, parameters = _product(net, rows), [p.detach() for p in net.parameters()]
    if any(p.requires_grad for p in net.parameters()) or any(p.is_inference() for p in parameters):
        return _weights(net, how)
    state = [(p.data_ptr(), p._version) for p in parameters]
    kept = _kept.setdefault(net, {})
    if how not in kept or kept[how][0] != state:
        # The parameters are held as well, so that no new ones take their addresses.
        kept[how] = state, parameters, _weights(net, how)
    return kept[how][2]


def _weights(net: GPT, how: str) -> _Weights:
    weight = net.embedding.weight
    if weight.dtype == torch.float16 and weight.device.type == "cpu":
        net = copy.deepcopy(net).float()
        weight = net.embedding.weight
    return _Weights(
        net=net,
        embedding=weight * net.scale,
        layers=[_layer(block, how) for block in net.blocks],
        final_norm=_norm(net.final_norm),
        unembed=_affine(weight, None, how),
    )


def _layer(block: nn.Module, how: str) -> _Layer:
    assert isinstance(block, Block)
    attention, mlp = block.attention, block.feed_forward
    up, half = _affine(mlp.up.weight, mlp.up.bias, how, gelu=True), 1.0 if how == "onednn" else 0.5
    return _Layer(
        norm1=_norm(block.norm1),
        qkv=_affine(attention.qkv.weight, attention.qkv.bias, how),
        out=_affine(attention.out.weight, attention.out.bias, how),
        norm2=_norm(block.norm2),
        up=up,
        down=_affine(mlp.down.weight * half, mlp.down.bias, how),
    )


def _norm(norm: nn.LayerNorm) -> Rows:
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


# ---------------------------------------------------------------------------- products


def _product(net: GPT, rows: int) -> str:
    """Which product is the fastest for B = `rows`: `onednn`, `fbgemm` or `plain`."""
    weight = net.embedding.weight
    if weight.device.type != "cpu":
        return "plain"
    if weight.dtype == torch.float16 and _has_fbgemm():
        return "fbgemm"
    if not torch.backends.mkldnn.is_available():
        return "plain"
    if weight.dtype == torch.bfloat16:
        return "onednn" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "plain"
    return "onednn" if rows >= 4 else "plain"  # float32


def _has_fbgemm() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines and hasattr(
        torch, "fbgemm_linear_fp16_weight_fp32_activation"
    )


def _affine(weight: Tensor, bias: Tensor | None, how: str, gelu: bool = False) -> Rows:
    """x (B, in) to x @ `weight`.T + `bias`, and its GELU (but see `_Layer`); `weight` (out, in)."""
    if how == "onednn":
        return _onednn(weight, bias, gelu)
    product = _fbgemm(weight, bias) if how == "fbgemm" else _plain(weight, bias)
    if not gelu:
        return product
    root = weight.new_tensor(math.sqrt(0.5))  # a number would be converted at each step

    def twice_gelu(x: Tensor) -> Tensor:
        """z (1 + erf(z / √2)); `F.gelu` takes longer for one row on a CPU."""
        z = product(x)
        return torch.addcmul(z, z, (z * root).erf_())

    return twice_gelu


def _plain(weight: Tensor, bias: Tensor | None) -> Rows:
    matrix = weight.t().contiguous()  # (in, out) is up to twice as fast for one row on a CPU
    if bias is None:
        return lambda x: torch.mm(x, matrix)
    return lambda x: torch.addmm(bias, x, matrix)


def _onednn(weight: Tensor, bias: Tensor | None, gelu: bool) -> Rows:
    """Weights packed once, where `addmm` does it at each step, by calls of torch.compile."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    multiply, then = torch.ops.mkldnn._linear_pointwise.default, "gelu" if gelu else "none"
    return lambda x: multiply(x, packed, bias, then, [], "none")


def _fbgemm(weight: Tensor, bias: Tensor | None) -> Rows:
    """Weights in float16, x, bias and sums in float32."""
    added = weight.new_zeros(len(weight)) if bias is None else bias
    with warnings.catch_warnings():  # of the deprecation; without it, `_product` takes another way
        warnings.simplefilter("ignore")
        packed = torch.fbgemm_pack_gemm_matrix_fp16(weight.contiguous())
        torch.fbgemm_linear_fp16_weight_fp32_activation(weight[:1], packed, added)
    return lambda x: torch.fbgemm_linear_fp16_weight_fp32_activation(x, packed, added)
