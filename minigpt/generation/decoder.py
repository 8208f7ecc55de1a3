"""Text read into a GPT one token at a time: keys and values are kept, logits come out.

`Decoder` computes what `GPT.forward` does, written out over the bare weights: at one token a step
calls cost more than arithmetic. On a CPU with a C compiler decode.c does a step in one
call; elsewhere PyTorch does, below. Numbers: docs/generation.md.

    >>> decoder = Decoder(net, [torch.tensor([0, 17, 4])])
    >>> logits = decoder.read(torch.tensor([56]))  # (1, V): of the token after 0 17 4 56
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from minigpt.kernels import decode
from minigpt.kernels.decode import NativeBatch, NativeWeights
from minigpt.model import GPT, Block, KVCache

BLOCK = decode.PANEL  # tokens by which the room for keys and values grows


class Decoder:
    """A batch of texts of any lengths, each of which grows by a token at a step.

    Positions are absolute and the context is finite, so a text that outgrows it slides: the last
    half of the context is read again from position 0, and reading goes on from there. A text that
    is longer from the start is cut down by the same rule. Each row slides when it is full itself,
    and gives the logits that it would give alone.

    Device and dtype are those of the net, which must be in evaluation mode and must not be trained
    meanwhile. The weights of a frozen net are kept from text to text: what is written through
    `.data`, which PyTorch does not count, is not seen. On a CPU a float16 net is computed in
    float32, and one in bfloat16 too where decode.c does it: then its weights, keys and values are
    in bfloat16 and nothing else.
    """

    def __init__(self, net: GPT, texts: Sequence[Tensor]) -> None:
        """`texts`: the ids (T,) of each row, T >= 0, on the device of the net."""
        weights = _prepared(net, len(texts))
        if isinstance(weights, NativeWeights):
            self.batch = NativeBatch(weights, len(texts))
        else:
            self.batch = TorchBatch(weights.float32 or net, weights, len(texts))
        self.context = net.config.context_length
        self.half = max(1, self.context // 2)
        self.texts = texts
        self.new: deque[Tensor] = deque(maxlen=self.half)  # ids (B,) read behind `texts`
        # (B,) tokens of each row that keys and values are held of: the place of the next one.
        self.at = torch.zeros(len(texts), dtype=torch.long, device=net.embedding.weight.device)
        kept = [text if len(text) < self.context else self._tail(text) for text in texts]
        self._fill(list(range(len(texts))), kept)

    def read(self, ids: Tensor) -> Tensor:
        """Each row's text goes on with `ids` (B,): logits (B, V), float32, of what follows."""
        if self.longest == self.context:
            self._slide()
        logits = self.batch.step(ids, self.at, self.longest + 1)
        self.new.append(ids)
        self.longest += 1
        self.at += 1
        return logits

    def _slide(self) -> None:
        full = [row for row, at in enumerate(self.at.tolist()) if at == self.context]
        new = torch.stack(tuple(self.new), dim=1)  # (B, at most half)
        self._fill(full, [self._tail(torch.cat([self.texts[row], new[row]])) for row in full])

    def _tail(self, text: Tensor) -> Tensor:
        """What a slide keeps: with the token that is read next, the last half of the context."""
        return text[len(text) - (self.half - 1) :]

    def _fill(self, rows: list[int], texts: list[Tensor]) -> None:
        """Hold keys and values of `texts`, read from position 0, for `rows`."""
        self.at[rows] = torch.tensor([len(text) for text in texts], device=self.at.device)
        self.longest = int(self.at.max())
        self.batch.fill(rows, texts)


class TorchBatch:
    """The texts of a batch: their keys and values, which new tokens are added to. By PyTorch."""

    def __init__(self, net: GPT, weights: _Weights, rows: int) -> None:
        """`weights` are those of `net`."""
        self.net, self.weights, c = net, weights, net.config
        self.n_heads, self.dk, device = c.n_heads, c.d_model // c.n_heads, weights.embedding.device
        options: Any = {"dtype": weights.dtype, "device": device}
        shape = c.n_layers, rows, c.n_heads  # L, B, nh; R tokens of room
        self.keys = torch.empty(*shape, 0, self.dk, BLOCK, **options)  # (…, R / BLOCK, dk, BLOCK)
        self.values = torch.empty(*shape, 0, self.dk, **options)  # (…, R, dk)
        self.rows = torch.arange(rows, device=device)
        self.arranged = False

    def fill(self, rows: list[int], texts: list[Tensor]) -> None:
        """Keys and values of `texts` (T,), from place 0, for those `rows`."""
        ids = pad_sequence(texts, batch_first=True)  # behind the text, where it cannot look
        cache, end = KVCache(), ids.shape[1]
        self._make_room(end)
        if end:
            self.net.hidden(ids, cache)
        for layer, (k, v) in enumerate(cache.layers):  # (rows, nh, T, dk)
            blocks = F.pad(k, (0, 0, 0, -end % BLOCK)).unflatten(2, (-1, BLOCK)).transpose(3, 4)
            self.keys[layer][rows, :, : blocks.shape[2]] = blocks
            self.values[layer][rows, :, :end] = v
        self.arranged = False

    def _make_room(self, length: int) -> None:
        """Have room for `length` tokens. Little by little: rows that lie close are read faster."""
        keys, values = self.keys, self.values
        L, B, nh, room, dk = values.shape  # noqa: N806
        if length > room:
            n = math.ceil(length / BLOCK)
            # What is masked is read as well: it must be finite.
            self.keys = keys.new_zeros(L, B, nh, n, dk, BLOCK)
            self.keys[:, :, :, : keys.shape[3]] = keys
            self.values = values.new_zeros(L, B, nh, n * BLOCK, dk)
            self.values[:, :, :, :room] = values
            self.arranged = False

    def _arrange(self, at: Tensor) -> None:
        """What stays as it is until there is more room or another text. N = B · nh."""
        L, B, nh, R, dk = self.values.shape  # noqa: N806
        device = self.values.device
        self.arranged, self.together = True, bool((at == at[0]).all())
        self.key_tables = self.keys.view(L, B * nh * R // BLOCK * dk, BLOCK).unbind()
        self.value_tables = self.values.view(L, B * nh * R, dk).unbind()
        n_keys, n_values = B * nh * R // BLOCK * dk, B * nh * R
        ids = torch.arange(max(n_keys, n_values), dtype=torch.int32, device=device)
        self.of_keys = ids[:n_keys], ids[:n_keys:dk].contiguous()
        self.of_values = ids[:n_values], ids[: n_values : max(1, R)].contiguous()
        hidden = torch.arange(R, device=device) >= at[:, None]  # (B, R)
        mask = self.values.new_zeros(B, R).masked_fill_(hidden, -math.inf)
        self.mask = mask[:, None].repeat(1, nh, 1)  # (B, nh, R)

    def step(self, ids: Tensor, at: Tensor, end: int) -> Tensor:
        """Logits (B, V) behind one token `ids` (B,) of each row, at its place `at` (B,) < `end`.

        `GPT.forward` for these tokens. One place must be `end` - 1.
        """
        if end > self.values.shape[3]:
            self._make_room(end)
        if not self.arranged:
            self._arrange(at)
        scale, weights = self.dk**-0.5, self.weights
        if self.together:  # slices, which cost less than indices
            position, block, place = self.net.positions[end - 1], *divmod(end - 1, BLOCK)
            self.mask[:, :, end - 1] = 0.0
            new_keys = self.keys[:, :, :, block, :, place].unbind()  # each (B, nh, dk)
            new_values = self.values[:, :, :, end - 1].unbind()
        else:
            position = self.net.positions[at]  # (B, d)
            self.mask[self.rows, :, at] = 0.0
            new_keys, new_values = self.keys.unbind(), self.values.unbind()
        mask, n_blocks = self.mask.flatten(0, 1), self.keys.shape[3]  # (N, R)
        x = F.embedding(ids, weights.embedding) + position  # (B, d)
        for i, layer in enumerate(weights.layers):
            qkv = layer.qkv(layer.norm1(x)).view(len(ids), 3, self.n_heads, -1)
            q, k, v = qkv.unbind(1)  # each (B, nh, dk)
            if self.together:
                new_keys[i].copy_(k)
                new_values[i].copy_(v)
            else:
                new_keys[i][self.rows, :, at // BLOCK, :, at % BLOCK] = k
                new_values[i][self.rows, :, at] = v
            q = q[:, :, None].expand(-1, -1, n_blocks, -1).reshape(-1)  # one for each block
            scores = _weighted_sums(self.key_tables[i], *self.of_keys, q).view_as(mask)
            p = torch.add(mask, scores, alpha=scale).softmax(-1)
            y = _weighted_sums(self.value_tables[i], *self.of_values, p.view(-1))  # (N, dk)
            x += layer.out(y.view(x.shape))
            x += layer.down(layer.up(layer.norm2(x)))
        return weights.unembed(weights.final_norm(x)).float()


def _weighted_sums(table: Tensor, ids: Tensor, starts: Tensor, factors: Tensor) -> Tensor:
    """For each start, until the next: the sum of the rows `ids` of `table`, each times its factor.

    Attention of one query is two such sums: of the rows of kᵀ times the elements of q, and of the
    rows of v times the probabilities. On a CPU this way is up to three times as fast as `bmm`.
    """
    return torch.embedding_bag(table, ids, starts, False, 0, False, factors)[0]


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
    """What a step of PyTorch multiplies by, in the order in memory that suits the product."""

    float32: GPT | None  # the net in float32, where its own dtype is not computed in
    dtype: torch.dtype  # of keys and values
    embedding: Tensor  # (V, d), scaled
    layers: list[_Layer]
    final_norm: Rows
    unembed: Rows


class _Kept(NamedTuple):
    """The weights of a net as it was, by how they are multiplied."""

    parameters: list[Tensor]  # held, so that no new ones take their addresses
    state: list[tuple[int, int]]  # address and version of each
    weights: dict[str, _Weights | NativeWeights]


_kept: WeakKeyDictionary[GPT, _Kept] = WeakKeyDictionary()  # no value may hold its key


def _prepared(net: GPT, rows: int) -> _Weights | NativeWeights:
    """The weights of `net` for batches of `rows`. Those of a frozen net are made once.

    Not so where a parameter requires a gradient: PyTorch does not count what fused optimizers do.
    """
    how = _product(net, rows)
    parameters = [p.detach() for p in (*net.parameters(), *net.buffers())]
    if any(p.requires_grad for p in net.parameters()) or any(p.is_inference() for p in parameters):
        return _weights(net, how, kept=False)
    state = [(p.data_ptr(), p._version) for p in parameters]
    kept = _kept.get(net)
    if kept is None or kept.state != state:
        kept = _kept[net] = _Kept(parameters, state, {})
    if how not in kept.weights:
        kept.weights[how] = _weights(net, how, kept=True)
    return kept.weights[how]


def _weights(net: GPT, how: str, kept: bool) -> _Weights | NativeWeights:
    cpu, stored = net.embedding.weight.device.type == "cpu", net.embedding.weight.dtype
    dtype = torch.float32 if cpu and stored == torch.float16 else stored
    if how == "native":
        exact = net if stored == torch.float32 else copy.deepcopy(net).float()
        return NativeWeights(exact, dtype, tabulate=kept)
    float32 = None
    if dtype != stored:
        net = float32 = copy.deepcopy(net).float()
    weight = net.embedding.weight
    return _Weights(
        float32=float32,
        dtype=dtype,
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
    """Which is the fastest for B = `rows`: `native` (decode.c), `onednn` or `plain`."""
    weight = net.embedding.weight
    if weight.device.type != "cpu":
        return "plain"
    known = weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    enough = decode.is_threaded() or rows < 4 or torch.get_num_threads() == 1
    if known and enough and decode.library():
        return "native"
    if not torch.backends.mkldnn.is_available():
        return "plain"
    if weight.dtype == torch.bfloat16:
        return "onednn" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "plain"
    return "onednn" if rows >= 4 else "plain"  # float32


def _affine(weight: Tensor, bias: Tensor | None, how: str, gelu: bool = False) -> Rows:
    """x (B, in) to x @ `weight`.T + `bias`, and its GELU (but see `_Layer`); `weight` (out, in)."""
    if how == "onednn":
        return _onednn(weight, bias, gelu)
    product = _plain(weight, bias)
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
