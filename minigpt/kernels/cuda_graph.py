"""Loss of a batch on a GPU, with forward and backward pass recorded as one CUDA graph.

A step of a small model launches several hundred short kernels, and starting them one by one takes
longer than running them. A recorded graph starts them all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

from minigpt.kernels.microbatch import Loss
from minigpt.model import GPT

T = TypeVar("T")
_recording = Lock()  # all recordings use the same stream, and the web page has several threads
_WARM_UP = 3  # number of runs before the recording; libraries allocate workspaces in these runs


def graphed_loss(model: GPT, loss: Loss, whole: Loss) -> Loss:
    """Return a function equivalent to `loss` that replays a graph of the forward and backward pass.

    The function computes the gradients of trainable weights together with the loss. The first call
    for each shape of the batch and each dtype of autocast records a graph.

    Args:
        model: the model in training, without dropout. Its weights must keep their memory addresses.
            The Python code of the model runs only when a graph is recorded.
        loss: the loss of `model`. It must not wait for the device.
        whole: loss to use if gradients are disabled, as in validation.

    Returns:
        A function with the same arguments and the same result as `loss`.
    """
    graphs: dict[tuple[Any, ...], _GraphedStep] = {}

    def graphed(ids: Tensor, targets: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return whole(ids, targets)
        weights = [p for p in model.parameters() if p.requires_grad]
        kind = ids.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = ids.shape, dtype
        if key not in graphs:
            graphs[key] = _GraphedStep(loss, weights, ids, targets, dtype)
        return _GraphedLoss.apply(graphs[key], ids, targets, *weights)  # type: ignore[no-any-return]

    return graphed


class _GraphedStep:
    """Graph that computes the loss and the gradients; a call overwrites the previous results."""

    def __init__(
        self, loss: Loss, weights: Sequence[Tensor], ids: Tensor, targets: Tensor,
        dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        self.ids, self.targets = ids.clone(), targets.clone()

        def step() -> tuple[Tensor, tuple[Tensor, ...]]:
            # Without the cache of autocast: a replay would not convert cached weights again.
            autocast = torch.autocast(ids.device.type, dtype, dtype is not None, False)
            with torch.enable_grad(), autocast:
                values = loss(self.ids, self.targets)
                first = values.flatten()[0]
            gradients = torch.autograd.grad(first, weights, materialize_grads=True)
            return values.detach(), gradients

        self.run = recorded(step, ids.device)

    def __call__(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        self.ids.copy_(ids)
        self.targets.copy_(targets)
        return self.run()


def recorded(step: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """Return a function that replays a CUDA graph of `step`; without CUDA, return `step` itself.

    Args:
        step: function that computes on `device` without waiting for it. It runs several times
            before the recording, so running it again must not change its result.
        device: the device.

    Returns:
        The function. On a GPU, each call overwrites the results of the previous call.
    """
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream(device)  # a recording must not start on the default stream
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads, such as those of loggers, may use CUDA at the same time.
    with _recording, torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = step()

    def replay() -> T:
        graph.replay()
        return outputs

    return replay


class _GraphedLoss(torch.autograd.Function):
    """Autograd function that returns the loss of a batch; `forward` also computes the gradients."""

    @staticmethod
    def forward(
        ctx: Any, step: _GraphedStep, ids: Tensor, targets: Tensor, *weights: Tensor
    ) -> Tensor:
        values, ctx.gradients = step(ids, targets)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        # Copies, because the next replay overwrites the originals, but gradients may accumulate.
        return None, None, None, *torch._foreach_mul(gradients, grads[0].flatten()[0])  # type: ignore[attr-defined]
