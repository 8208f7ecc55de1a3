"""Attention and loss for training on CPUs, several times faster than PyTorch's own operators.

The results equal those of model.py up to rounding. Both functions implement their backward pass by
hand. If autocast is on, they compute in its dtype. Measurements: docs/performance.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.model import IGNORE_INDEX, Kernels

BLOCK = 64  # queries per block: small enough to skip most of the masked half of the scores
TINY = torch.finfo(torch.float32).tiny  # after an underflow, a loss is 87 nats, not infinity
CHUNK = 2048  # tokens per chunk: few enough for their logits to stay in the CPU caches


# ---------------------------------------------------------------------------- attention


def block_attention(qkv: Tensor, n_heads: int) -> Tensor:
    """Return causal self-attention, computed for one block of queries at a time.

    A block needs no keys after its last query. So with n blocks, only (n + 1) / (2 n) of the score
    matrix is computed: five eighths at T = 256.

    Args:
        qkv: queries, keys and values (B, T, 3 d), concatenated.
        n_heads: number of heads, a divisor of d.

    Returns:
        The attention output of all heads, concatenated (B, T, d).
    """
    return _BlockAttention.apply(qkv, n_heads)  # type: ignore[no-any-return]


class _BlockAttention(torch.autograd.Function):
    """Attention by batched matrix products, with batch and heads flattened to N = B · nh.

    The b queries of a block attend to e keys. Forward: P = softmax(q kᵀ / √hs + mask) (N, b, e) and
    y = P v. Backward, given dy: dP = dy vᵀ, dS = P ∘ (dP − rowsum(P ∘ dP)), dq = dS k / √hs,
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
    """Return a view of (B, T, 3 d) as queries, keys and values, (3, B, nh, T, hs)."""
    return qkv.unflatten(-1, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)


def _dense(x: Tensor) -> Tensor:
    """Return a contiguous copy of (B, nh, T, hs) as (N, T, hs)."""
    return x.clone(memory_format=torch.contiguous_format).flatten(0, 1)


def _softmax(x: Tensor) -> Tensor:
    """Return the softmax over the last dimension in the dtype of `x`, even under autocast."""
    return torch.ops.aten._softmax(x, -1, False)


# ---------------------------------------------------------------------------- loss


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss, computed in chunks of CHUNK tokens to limit the memory for logits.

    If gradients are enabled, the forward pass also computes the gradients, because the loss and the
    gradients need the same softmax. If gradients are disabled, the log-softmax is computed in
    float32.

    Args:
        hidden: hidden states (B, T, d).
        weight: output projection (V, d).
        targets: ids (B, T) of the next tokens; IGNORE_INDEX is not scored.

    Returns:
        Nats per scored token, a float32 scalar.
    """
    rows, targets = hidden.flatten(0, 1), targets.flatten()  # (B · T, d), (B · T,)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        rows, weight = rows.to(dtype), weight.to(dtype)
    if torch.is_grad_enabled():
        return _ChunkedCrossEntropy.apply(rows, weight, targets)  # type: ignore[no-any-return]
    nats = torch.zeros(())
    for h, t in zip(rows.split(CHUNK), targets.split(CHUNK), strict=True):
        logits = F.linear(h, weight).float()
        nats += F.cross_entropy(logits, t, ignore_index=IGNORE_INDEX, reduction="sum")
    return nats / (targets != IGNORE_INDEX).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy whose forward pass also computes the gradients.

    P is softmax(h Wᵀ), Y the one-hot targets and n the number of scored targets. The gradients are
    dh = (P − Y) W / n and dW = (P − Y)ᵀ h / n. In bfloat16, the loss is computed from rounded
    probabilities. The relative error of a probability is at most 0.2 %, and the error of the mean
    loss of a batch is about 2e-5 nats.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        nats = torch.zeros(())
        drows = torch.empty_like(rows)
        dweight = torch.zeros(weight.shape)  # float32: the sum over all chunks
        scored = targets != IGNORE_INDEX
        n = scored.sum()
        for s in range(0, len(rows), CHUNK):
            h, mask = rows[s : s + CHUNK], scored[s : s + CHUNK]
            p = _softmax(h @ weight.t())  # (CHUNK, V)
            target = torch.arange(len(h)), targets[s : s + CHUNK].clamp_min(0)
            likelihood = p[target]  # (CHUNK,)
            nats -= torch.where(mask, likelihood.float().clamp_min(TINY).log(), 0.0).sum()
            p.index_put_(target, likelihood - 1)  # now P − Y
            if not mask.all():
                p *= mask[:, None]
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
