"""Loss of a batch on a CPU, computed in micro-batches by one thread per core.

If all threads work together on each operator, they synchronise a thousand times in a step, and the
activations of a whole batch exceed the caches. Here each thread runs the forward and the backward
pass for its own part of the batch, in micro-batches. A thread needs memory only for the activations
of one micro-batch and for its own gradients of all weights, however large the batch is.
Measurements: docs/performance.md.
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

TOKENS = 2048  # tokens per micro-batch: few enough for activations to stay in the caches


class Loss(Protocol):
    """Loss function of a model, such as `GPT.loss` or `Distillation`."""

    def __call__(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss over the scored tokens, float32, for ids and targets (B, T).

        The result is a scalar or a vector. The first element of a vector is the loss. The other
        elements are further means over the scored tokens, and have no gradient.
        """
        ...


def microbatched_loss(model: GPT, n_threads: int | None = None, loss: Loss | None = None) -> Loss:
    """Return a function equivalent to `loss` that computes in micro-batches on threads.

    If gradients are enabled, the returned function computes the loss together with the gradients of
    the trainable weights. It adds the results of the threads in a fixed order, so that the sums are
    reproducible. For a batch with fewer sequences than threads, it only calls `loss`.

    If the model has dropout, `loss` itself is returned, because threads would draw random numbers
    in an undefined order.

    Args:
        model: the model in training, on a CPU.
        n_threads: number of threads; None means the number that PyTorch uses within an operator.
        loss: the loss of `model`; None means `model.loss`.

    Returns:
        A function with the same arguments and the same result as `loss`.
    """
    whole = loss or model.loss
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return whole

    def microbatched(ids: Tensor, targets: Tensor) -> Tensor:
        n = n_threads or torch.get_num_threads()  # read here, since Lightning changes it later
        if len(ids) < n:
            return whole(ids, targets)
        trainable = [p for p in model.parameters() if p.requires_grad]
        weights = trainable if torch.is_grad_enabled() else []
        return _MicroBatchedLoss.apply(whole, n, ids, targets, *weights)  # type: ignore[no-any-return]

    return microbatched


class _MicroBatchedLoss(torch.autograd.Function):
    """Mean loss of a batch: the mean over micro-batches, weighted by numbers of scored tokens."""

    @staticmethod
    def forward(
        ctx: Any, loss: Loss, n_threads: int, ids: Tensor, targets: Tensor, *weights: Tensor
    ) -> Tensor:
        size = max(1, TOKENS // ids.shape[1])  # sequences per micro-batch
        n_scored = (targets != IGNORE_INDEX).sum()
        # Autocast and grad mode are per thread, so each thread sets them again.
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None

        def part(rows: tuple[Tensor, Tensor]) -> tuple[Tensor, list[Tensor]]:
            sums, gradients = torch.zeros(()), list[Tensor]()
            for batch in zip(*(x.split(size) for x in rows), strict=True):
                share = (batch[1] != IGNORE_INDEX).sum() / n_scored
                if not share:  # only padding, whose mean loss is undefined
                    continue
                with torch.set_grad_enabled(bool(weights)):
                    with torch.autocast("cpu", dtype, dtype is not None, cache_enabled=False):
                        term = loss(*batch) * share
                    if weights:  # materialize_grads: a subclass may have unused weights
                        first = term.flatten()[0]
                        _add(gradients, torch.autograd.grad(first, weights, materialize_grads=True))
                sums = sums + term.detach()
            return sums, gradients

        parts = zip(ids.chunk(n_threads), targets.chunk(n_threads), strict=True)
        run = map if n_threads == 1 else thread_pool(n_threads).map
        (sums, gradients), *others = run(part, parts)
        for other_sums, other_gradients in others:
            sums = sums + other_sums
            _add(gradients, other_gradients)
        ctx.gradients = gradients or [torch.zeros_like(weight) for weight in weights]
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factor = grads[0].flatten()[0]
        gradients, ctx.gradients = ctx.gradients, None  # can be freed before the loss
        return None, None, None, None, *(gradient.mul_(factor) for gradient in gradients)


def _add(sums: list[Tensor], more: Sequence[Tensor]) -> None:
    """Add `more` to `sums` in place; an empty list stands for zeros."""
    if not sums:
        sums.extend(more)
    elif more:
        for total, summand in zip(sums, more, strict=True):
            total += summand


@cache
def thread_pool(n: int) -> ThreadPoolExecutor:
    """Return the process-wide pool of `n` threads.

    Each PyTorch operation that runs in the pool uses one thread.
    """
    pool, before = ThreadPoolExecutor(n, "micro-batch"), torch.get_num_threads()
    barrier = Barrier(n)

    def use_one_thread() -> None:
        torch.set_num_threads(1)  # for this thread, and for threads that start later
        torch.get_num_threads()  # makes this thread adopt the number before it is restored below
        barrier.wait()

    for started in [pool.submit(use_one_thread) for _ in range(n)]:
        started.result()
    torch.set_num_threads(before)
    return pool
