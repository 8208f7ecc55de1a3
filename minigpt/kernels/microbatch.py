"""The loss of a batch on a CPU: one thread to each core, a few windows at a time.

Threads that share every operator wait for each other a thousand times in a step, and the tensors of
a whole batch fit no cache. So each thread takes its part of the batch through the forward and the
backward pass by itself, in shards; it needs memory for one shard and for the gradients, whatever
the batch. Numbers: docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import Any, Protocol

import torch
from torch import Tensor

from minigpt.model import GPT, IGNORE_INDEX

TOKENS = 2048  # of a shard: its activations stay near the caches


class Loss(Protocol):
    """Mean nats per token, float32."""

    def __call__(self, ids: Tensor, targets: Tensor) -> Tensor: ...  # (B, T) both


def sharded_loss(net: GPT, n_threads: int | None = None) -> Loss:
    """What `net.loss` gives, by `n_threads` threads (None: as many as PyTorch's operators take).

    Gradients are computed together with the loss, for the weights that want one, and added up in
    the same order each time. A batch of fewer windows than threads is left to `net.loss`, and so is
    every batch of a net with dropout: the threads would draw their random numbers in no order.
    """
    loss = net.loss
    if net.config.dropout:
        return loss

    def sharded(ids: Tensor, targets: Tensor) -> Tensor:
        n = n_threads or torch.get_num_threads()  # now: Lightning shares them out among processes
        if len(ids) < n:
            return loss(ids, targets)
        learns = torch.is_grad_enabled()
        weights = [p for p in net.parameters() if p.requires_grad] if learns else []
        return _ShardedLoss.apply(loss, n, ids, targets, *weights)  # type: ignore[no-any-return]

    return sharded


class _ShardedLoss(torch.autograd.Function):
    """The sum over shards of their mean loss times their share of the scored tokens."""

    @staticmethod
    def forward(
        ctx: Any, loss: Loss, n_threads: int, ids: Tensor, targets: Tensor, *weights: Tensor
    ) -> Tensor:
        size = max(1, TOKENS // ids.shape[1])  # windows of a shard
        n_scored = (targets != IGNORE_INDEX).sum()
        # A thread has its own autocast and its own grad mode.
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None

        def part(rows: tuple[Tensor, Tensor]) -> tuple[Tensor, list[Tensor]]:
            nats, gradients = torch.zeros(()), list[Tensor]()
            for shard in zip(*(x.split(size) for x in rows), strict=True):
                share = (shard[1] != IGNORE_INDEX).sum() / n_scored
                if not share:  # padding alone, whose mean is that of nothing
                    continue
                with torch.set_grad_enabled(bool(weights)):
                    with torch.autocast("cpu", dtype, dtype is not None, cache_enabled=False):
                        more = loss(*shard) * share
                    if weights:
                        _add(gradients, torch.autograd.grad(more, weights))
                nats += more.detach()
            return nats, gradients

        parts = zip(ids.chunk(n_threads), targets.chunk(n_threads), strict=True)
        run = map if n_threads == 1 else _threads(n_threads).map
        (nats, gradients), *others = run(part, parts)
        for more, more_gradients in others:
            nats += more
            _add(gradients, more_gradients)
        ctx.gradients = gradients or [torch.zeros_like(weight) for weight in weights]
        return nats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # or they would live as long as the loss
        return None, None, None, None, *(gradient.mul_(grads[0]) for gradient in gradients)


def _add(sums: list[Tensor], more: Sequence[Tensor]) -> None:
    """Add `more` to `sums`, which may be empty so far."""
    if not sums:
        sums.extend(more)
    elif more:
        for total, summand in zip(sums, more, strict=True):
            total += summand


@cache
def _threads(n: int) -> ThreadPoolExecutor:
    """`n` threads that live as long as the process, each with operators of one thread."""
    pool, before, all_there = ThreadPoolExecutor(n, "shard"), torch.get_num_threads(), Barrier(n)

    def alone() -> None:
        torch.set_num_threads(1)  # of this thread, and of each that is new
        torch.get_num_threads()  # a thread takes the number for new ones when first asked
        all_there.wait()

    for started in [pool.submit(alone) for _ in range(n)]:
        started.result()
    torch.set_num_threads(before)
    return pool
