"""Causal self-attention for training and evaluation on CPUs, one block of queries at a time.

The results equal those of model.py up to rounding. The backward pass is implemented by hand. Under
autocast, both passes compute in the dtype of autocast. Measurements: docs/performance.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from minigpt.kernels.cross_entropy import chunked_cross_entropy, softmax
from minigpt.model import Kernels

BLOCK = 64  # queries per block: small enough to skip most of the masked half of the scores


def block_attention(qkv: Tensor, n_heads: int) -> Tensor:
    """Return causal self-attention, computed for one block of queries at a time.

    A block needs no keys after its last query. So with n blocks, only (n + 1) / (2 n) of the score
    matrix is computed. At T = 256, there are four blocks, so the fraction is 5/8.

    Args:
        qkv: queries, keys and values (B, T, 3 d), concatenated.
        n_heads: number of heads, a divisor of d.

    Returns:
        The attention output of all heads, concatenated (B, T, d).
    """
    return _BlockAttention.apply(qkv, n_heads)  # type: ignore[no-any-return]


class _BlockAttention(torch.autograd.Function):
    """Attention by batched matrix products, with batch and heads flattened to N = B · nh.

    The b queries of a block attend to e keys. The forward pass computes the attention weights
    P = softmax(q kᵀ / √hs + mask), of shape (N, b, e), and the output y = P v. The backward pass
    starts from dy and computes dP = dy vᵀ, dS = P ∘ (dP − rowsum(P ∘ dP)), dq = dS k / √hs,
    dk += dSᵀ q / √hs, dv += Pᵀ dy.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_heads: int) -> Tensor:
        q, k, v = (_dense(x) for x in _split_heads(qkv, n_heads))  # (N, T, hs)
        q *= q.shape[2] ** -0.5
        T, y = q.shape[1], torch.empty_like(q)  # noqa: N806
        mask = torch.full((BLOCK, BLOCK), -math.inf, dtype=q.dtype).triu(1)
        probabilities = []
        for s in range(0, T, BLOCK):
            e = min(s + BLOCK, T)
            keys = k[:, :e].contiguous()  # otherwise oneDNN makes a slow transposed copy
            scores = torch.bmm(q[:, s:e], keys.transpose(1, 2))  # (N, b, e)
            scores[:, :, s:e] += mask[: e - s, : e - s]
            p = softmax(scores)
            y[:, s:e] = torch.bmm(p, v[:, :e])
            probabilities.append(p)
        ctx.save_for_backward(qkv, *probabilities)
        ctx.n_heads = n_heads
        return y.unflatten(0, (-1, n_heads)).transpose(1, 2).flatten(2)  # (B, T, d)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        qkv, *probabilities = ctx.saved_tensors
        dqkv, heads = torch.empty_like(qkv), (-1, ctx.n_heads)
        q, k, v = (_dense(x) for x in _split_heads(qkv, ctx.n_heads))  # (N, T, hs)
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
        for target, x in zip(_split_heads(dqkv, ctx.n_heads), (dq, dk, dv), strict=True):
            target.copy_(x.unflatten(0, heads))
        return dqkv, None


def _split_heads(qkv: Tensor, n_heads: int) -> Tensor:
    """Return queries, keys and values as one view (3, B, nh, T, hs) of `qkv` (B, T, 3 d)."""
    return qkv.unflatten(-1, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)


def _dense(x: Tensor) -> Tensor:
    """Return a contiguous copy of `x` (B, nh, T, hs) with the shape (B · nh, T, hs)."""
    return x.clone(memory_format=torch.contiguous_format).flatten(0, 1)


CPU = Kernels("cpu", block_attention, chunked_cross_entropy)
