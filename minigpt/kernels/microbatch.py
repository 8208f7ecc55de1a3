"""The loss of a batch on a CPU: one thread per core, a few windows at a time.

Threads that share every operator wait for each other a thousand times in a step, and the tensors of
a whole batch fit no cache. So each thread takes its part of the batch through the forward and the
backward pass by itself, in micro-batches; it needs memory for one micro-batch and for the
gradients, whatever the batch. Numbers: docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minigpt.model import GPT, IGNORE_INDEX

TOKENS = 2048  # of a micro-batch: its activations stay near the caches


class Loss(Protocol):
    """Mean nats per token, float32."""

    def __call__(self, ids: Tensor, targets: Tensor) -> Tensor: ...  # (B, T) both


def microbatched_loss(net: GPT, n_threads: int | None = None) -> Loss:
    """Return a function that gives what `net.loss` gives, computed by `n_threads` threads.

    None means as many as PyTorch's operators take. Gradients are computed together with the loss,
    for the weights that require one, and added up in the same order each time. A batch of fewer
    windows than threads is left to `net.loss`, and so is every batch of a model with dropout: the
    threads would draw their random numbers in no order.
    """
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in net.modules()):
        return net.loss

    def microbatched(ids: Tensor, targets: Tensor) -> Tensor:
        n = n_threads or torch.get_num_threads()  # now: Lightning shares them out among processes
        if len(ids) < n:
            return net.loss(ids, targets)
        learns = torch.is_grad_enabled()
        weights = [p for p in net.parameters() if p.requires_grad] if learns else []
        return _MicroBatchedLoss.apply(net.loss, n, ids, targets, *weights)  # type: ignore[no-any-return]

    return microbatched


class _MicroBatchedLoss(torch.autograd.Function):
    """The sum over micro-batches of their mean loss times their share of the scored tokens."""

    @staticmethod
    def forward(
        ctx: Any, loss: Loss, n_threads: int, ids: Tensor, targets: Tensor, *weights: Tensor
    ) -> Tensor:
        size = max(1, TOKENS // ids.shape[1])  # windows of a micro-batch
        n_scored = (targets != IGNORE_INDEX).sum()
        # A thread has its own autocast and its own grad mode.
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None

        def part(rows: tuple[Tensor, Tensor]) -> tuple[Tensor, list[Tensor]]:
            nats, gradients = torch.zeros(()), list[Tensor]()
            for batch in zip(*(x.split(size) for x in rows), strict=True):
                share = (batch[1] != IGNORE_INDEX).sum() / n_scored
                if not share:  # padding alone, whose mean is that of nothing
                    continue
                with torch.set_grad_enabled(bool(weights)):
                    with torch.autocast("cpu", dtype, dtype is not None, cache_enabled=False):
                        more = loss(*batch) * share
                    if weights:  # a subclass may have weights that its loss does not depend on
                        _add(gradients, torch.autograd.grad(more, weights, materialize_grads=True))
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
    """Return a pool of `n` threads that lives as long as the process; each runs operators alone."""
    pool, before = ThreadPoolExecutor(n, "micro-batch"), torch.get_num_threads()
    barrier = Barrier(n)

    def use_one_thread() -> None:
        torch.set_num_threads(1)  # of this thread, and of each that is new
        torch.get_num_threads()  # a thread takes the number for new ones when first asked
        barrier.wait()

    for started in [pool.submit(use_one_thread) for _ in range(n)]:
        started.result()
    torch.set_num_threads(before)
    return pool
