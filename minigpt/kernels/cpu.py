"""Attention and loss as a CPU computes them several times faster than PyTorch's own operators.

They give the same numbers as those of model.py, up to rounding. Both write out their backward pass,
in the dtype of autocast where it is on. Numbers: docs/performance.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.model import IGNORE_INDEX, Kernels

BLOCK = 64  # queries at a time: small enough to skip most of the masked half
TINY = torch.finfo(torch.float32).tiny  # a probability that underflows costs 87 nats, not infinity
CHUNK = 2048  # tokens whose logits are held at a time: (CHUNK, V) stays near the caches


# ---------------------------------------------------------------------------- attention


def block_attention(qkv: Tensor, n_heads: int) -> Tensor:
    """Compute causal self-attention of (B, T, 3 d), block of queries by block: (B, T, d).

    A block of queries sees no keys behind its own last one, so with n blocks only (n + 1) / 2n of
    the score matrix is computed: five eighths at T = 256.
    """
    return _BlockAttention.apply(qkv, n_heads)  # type: ignore[no-any-return]


class _BlockAttention(torch.autograd.Function):
    """Batched matrix products, with heads and batch folded into N = B · nh.

    For a block of b queries and the e keys it may see: P = softmax(q kᵀ / √dk + mask) (N, b, e) and
    y = P v. Backward, from dy: dP = dy vᵀ, dS = P ∘ (dP − rowsum(P ∘ dP)), and then dq = dS k,
    dk += dSᵀ q, dv += Pᵀ dy, the first two over √dk.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_heads: int) -> Tensor:
        q, k, v = (_dense(x) for x in _split_heads(qkv, n_heads))  # (N, T, dk)
        q *= q.shape[2] ** -0.5
        T, y = q.shape[1], torch.empty_like(q)  # noqa: N806
        mask = torch.full((BLOCK, BLOCK), -math.inf, dtype=q.dtype).triu(1)
        probabilities = []
        for s in range(0, T, BLOCK):
            e = min(s + BLOCK, T)
            keys = k[:, :e].contiguous()  # or oneDNN copies it while it is transposed, slowly
            scores = torch.bmm(q[:, s:e], keys.transpose(1, 2))  # (N, b, e)
            scores[:, :, s:e] += mask[: e - s, : e - s]
            p = _softmax(scores)
            y[:, s:e] = torch.bmm(p, v[:, :e])
            probabilities.append(p)
        ctx.save_for_backward(qkv, *probabilities)
        ctx.n_heads = n_heads
        return y.unflatten(0, (-1, n_heads)).transpose(1, 2).flatten(2)  # (B, T, d)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        qkv, *probabilities = ctx.saved_tensors
        dqkv, heads = torch.empty_like(qkv), (-1, ctx.n_heads)
        q, k, v = (_dense(x) for x in _split_heads(qkv, ctx.n_heads))  # (N, T, dk)
        dy = _dense(grads[0].unflatten(-1, (ctx.n_heads, -1)).transpose(1, 2))
        T, scale = q.shape[1], q.shape[2] ** -0.5  # noqa: N806
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for s, p in zip(range(0, T, BLOCK), probabilities, strict=True):
            e = min(s + BLOCK, T)
            dp = torch.bmm(dy[:, s:e], v[:, :e].contiguous().transpose(1, 2))  # (N, b, e)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, s:e] = torch.bmm(ds, k[:, :e])
            dk[:, :e] += torch.bmm(ds.transpose(1, 2), q[:, s:e])
            dv[:, :e] += torch.bmm(p.transpose(1, 2), dy[:, s:e])
        dq *= scale
        dk *= scale
        for into, x in zip(_split_heads(dqkv, ctx.n_heads), (dq, dk, dv), strict=True):
            into.copy_(x.unflatten(0, heads))
        return dqkv, None


def _split_heads(qkv: Tensor, n_heads: int) -> Tensor:
    """View (B, T, 3 d) as queries, keys and values, (3, B, nh, T, dk)."""
    return qkv.unflatten(-1, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)


def _dense(x: Tensor) -> Tensor:
    """A copy of (B, nh, T, dk) as (N, T, dk), laid out in that order."""
    return x.clone(memory_format=torch.contiguous_format).flatten(0, 1)


def _softmax(x: Tensor) -> Tensor:
    """Over the last dimension, in the dtype of `x` even under autocast."""
    return torch.ops.aten._softmax(x, -1, False)


# ---------------------------------------------------------------------------- loss


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean loss without the logits of all tokens in memory at once.

    `hidden` (B, T, d), `weight` (V, d), `targets` (B, T); the result is in nats and float32. With
    gradients on, they are computed together with the loss: the softmax is the larger part of both.
    Without, the log-softmax is taken in float32.
    """
    rows, wanted = hidden.flatten(0, 1), targets.flatten()
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        rows, weight = rows.to(dtype), weight.to(dtype)
    if torch.is_grad_enabled():
        return _ChunkedCrossEntropy.apply(rows, weight, wanted)  # type: ignore[no-any-return]
    nats = torch.zeros(())
    for h, t in zip(rows.split(CHUNK), wanted.split(CHUNK), strict=True):
        logits = F.linear(h, weight).float()
        nats += F.cross_entropy(logits, t, ignore_index=IGNORE_INDEX, reduction="sum")
    return nats / (wanted != IGNORE_INDEX).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """With P = softmax(h Wᵀ) and Y the one-hot targets: dh = (P − Y) W / n, dW = (P − Y)ᵀ h / n.

    In bfloat16 the loss is the mean of −log of probabilities that were rounded to nearest: each is
    off by up to 0.2 %, either way, and their mean over a batch by about 2e-5 nats.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        nats = torch.zeros(())
        drows = torch.empty_like(rows)
        dweight = torch.zeros(weight.shape)  # float32: the sum over all chunks
        scored = targets != IGNORE_INDEX
        n = scored.sum()
        for s in range(0, len(rows), CHUNK):
            h, keep = rows[s : s + CHUNK], scored[s : s + CHUNK]
            p = _softmax(h @ weight.t())  # (CHUNK, V)
            target = torch.arange(len(h)), targets[s : s + CHUNK].clamp_min(0)
            right = p[target]  # the probability of each target
            nats -= torch.where(keep, right.float().clamp_min(TINY).log(), 0.0).sum()
            p.index_put_(target, right - 1)  # now P - Y
            if not keep.all():
                p *= keep[:, None]
            torch.mm(p, weight, out=drows[s : s + CHUNK])
            dweight += p.t() @ h
        ctx.save_for_backward(drows, dweight, n)
        return nats / n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        drows, dweight, n = ctx.saved_tensors
        factor = grads[0] / n
        return drows * factor, dweight * factor, None


CPU = Kernels("cpu", block_attention, chunked_cross_entropy)
