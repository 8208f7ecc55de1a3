"""Cross-entropy for a large vocabulary, computed in chunks of tokens, for CPUs and GPUs.

Logits are computed for at most `chunk_size` tokens at a time, so the logits (B · T, V) of a larger
batch are never all in memory. In training under autocast, the matrix products and the softmax are
computed in the dtype of autocast.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.model import IGNORE_INDEX

TINY = torch.finfo(torch.float32).tiny  # a probability that underflows gives 87 nats, not infinity
CHUNK = 2048  # tokens per chunk on a CPU: few enough for their logits to stay in the caches
_CHUNK_ON_GPU = 8192  # enough rows to keep all multiprocessors busy


def chunk_size(device: torch.device) -> int:
    """Return the number of tokens whose logits are computed at a time."""
    return CHUNK if device.type == "cpu" else _CHUNK_ON_GPU


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss, computed in chunks of tokens to limit the memory for logits.

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
    kind, size = rows.device.type, chunk_size(rows.device)
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        rows, weight = rows.to(dtype), weight.to(dtype)
    if torch.is_grad_enabled():
        return _ChunkedCrossEntropy.apply(rows, weight, targets)  # type: ignore[no-any-return]
    nats = torch.zeros((), device=rows.device)
    for h, t in zip(rows.split(size), targets.split(size), strict=True):
        logits = F.linear(h, weight).float()
        nats += F.cross_entropy(logits, t, ignore_index=IGNORE_INDEX, reduction="sum")
    return nats / (targets != IGNORE_INDEX).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Autograd function for the mean cross-entropy; `forward` also computes the gradients.

    Let h be the hidden states, W the output projection, P = softmax(h Wᵀ), Y the one-hot targets
    and n the number of scored targets. The gradients are dh = (P − Y) W / n and
    dW = (P − Y)ᵀ h / n. In bfloat16, the loss is computed from rounded
    probabilities. The relative error of a probability is at most 0.2 %, and the error of the mean
    loss of a batch is about 2e-5 nats.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        device, size = rows.device, chunk_size(rows.device)
        nats = torch.zeros((), device=device)
        drows = torch.empty_like(rows)
        dweight = torch.zeros(weight.shape, device=device)  # float32: the sum over all chunks
        scored = targets != IGNORE_INDEX
        n = scored.sum()
        for s in range(0, len(rows), size):
            part = slice(s, s + size)
            h, mask = rows[part], scored[part]
            logits = h @ weight.t()
            p = softmax(logits)  # (CHUNK, V)
            target = torch.arange(len(h), device=device), targets[part].clamp_min(0)
            nats -= torch.where(mask, log_likelihood(logits, p, target), 0.0).sum()
            p.index_put_(target, p[target] - 1)  # now P − Y
            if may_have_padding(mask):
                p *= mask[:, None]
            torch.mm(p, weight, out=drows[part])
            dweight += p.t() @ h
        ctx.save_for_backward(drows, dweight, n)
        return nats / n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        drows, dweight, n = ctx.saved_tensors
        factor = grads[0] / n
        return drows * factor, dweight * factor, None


def softmax(x: Tensor) -> Tensor:
    """Return the softmax over the last dimension in the dtype of `x`, even under autocast."""
    return torch.ops.aten._softmax(x, -1, False)


def log_likelihood(logits: Tensor, p: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    """Return the logarithm of p[target], (n,) float32.

    Args:
        logits: logits (n, V).
        p: softmax of the logits, (n, V).
        target: index of one element in each row, as row numbers (n,) and column numbers (n,).
    """
    if p.dtype != torch.float16:
        return p[target].float().clamp_min(TINY).log()
    # float16 has no probability below 6e-8, so compute logit − log partition. The log partition
    # follows from the logit and the probability of the most likely token.
    log_partition = logits.amax(-1).float() - p.amax(-1).float().log()
    return logits[target].float() - log_partition


def may_have_padding(mask: Tensor) -> bool:
    """Return whether `mask` may contain False.

    On a GPU, the result is always True. The mask is not read there, because reading it would make
    the CPU wait for the GPU.
    """
    return mask.device.type != "cpu" or not mask.all()
