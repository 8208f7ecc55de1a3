"""Head ablation and activation patching: change one activation, and measure the effect.

>>> logits = ablate_heads(model, ids, [(2, 0)])  # without head 0 of block 2
>>> patch_heads(model, clean_ids, corrupted_ids, lambda logits: logits[0, -1, answer].item())
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from minigpt.analysis.activations import activations
from minigpt.analysis.inputs import check_ids, checked_heads
from minigpt.core.settings import UserError
from minigpt.model import GPT

Metric = Callable[[Tensor], float]


def ablate_heads(model: GPT, ids: Tensor, heads: Iterable[tuple[int, int]]) -> Tensor:
    """Return the logits of a model without some of its attention heads (zero ablation).

    Args:
        model: the model, which is not changed.
        ids: token ids (B, T), int64.
        heads: pairs (block, head), both counted from 0. The outputs of these heads are set to 0.

    Returns:
        Logits (B, T, V).

    Raises:
        UserError: the model cannot read `ids`, or has no head with the indices of a pair.
    """
    removed: dict[str, list[int]] = {}
    for block, head in checked_heads(model, heads):
        removed.setdefault(f"blocks.{block}.attention.heads", []).append(head)
    edits = {name: _zeroed(torch.tensor(indices)) for name, indices in removed.items()}
    return activations(model, ids, edits)["logits"]


def _zeroed(heads: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x.index_fill(2, heads.to(x.device), 0)


def patch_residual(model: GPT, clean: Tensor, corrupted: Tensor, metric: Metric) -> Tensor:
    """Return a metric after patching the residual stream, for each block and position.

    This is activation patching (Meng et al. 2022, arXiv 2202.05262): the model reads `corrupted`
    once for each block and position. Each time, the residual stream before this block and at this
    position is replaced by the one that the model computes for `clean`.

    Args:
        model: the model, which is not changed.
        clean: token ids (B, T), int64.
        corrupted: token ids of the same shape.
        metric: function that is called with the logits (B, T, V) and returns a number, such as the
            difference of two logits.

    Returns:
        Value of the metric for each patch, (n_layers, T) float64.

    Raises:
        UserError: the model cannot read `clean` or `corrupted`, or they differ in shape.
    """
    return _patched(model, clean, corrupted, metric, "input", dim=1)


def patch_heads(model: GPT, clean: Tensor, corrupted: Tensor, metric: Metric) -> Tensor:
    """Return a metric after patching an attention head, for each head.

    This is activation patching: the model reads `corrupted` once for each head. Each time, the
    output of this head at all positions is replaced by its output for `clean`.

    Args:
        model: the model, which is not changed.
        clean: token ids (B, T), int64.
        corrupted: token ids of the same shape.
        metric: function that is called with the logits (B, T, V) and returns a number, such as the
            difference of two logits.

    Returns:
        Value of the metric for each patch, (n_layers, n_heads) float64.

    Raises:
        UserError: the model cannot read `clean` or `corrupted`, or they differ in shape.
    """
    return _patched(model, clean, corrupted, metric, "attention.heads", dim=2)


def _patched(
    model: GPT, clean: Tensor, corrupted: Tensor, metric: Metric, point: str, dim: int
) -> Tensor:
    """Return the metric after each patch, (n_layers, size of dimension `dim`) float64.

    For each patch, the model reads `corrupted`. In one layer and at one index of dimension `dim`,
    the activation `point` is replaced by the activation for `clean`.
    """
    check_ids(model, clean, "clean")
    check_ids(model, corrupted, "corrupted")
    if clean.shape != corrupted.shape:
        problem = f"must have the shape of clean, {tuple(clean.shape)}: use as many tokens"
        raise UserError(problem, "corrupted", tuple(corrupted.shape))
    source = activations(model, clean)
    results = []
    for layer in range(model.config.n_layers):
        name = f"blocks.{layer}.{point}"
        for i in range(source[name].shape[dim]):
            edit = _replaced(source[name], dim, i)
            results.append(metric(activations(model, corrupted, {name: edit})["logits"]))
    return torch.tensor(results, dtype=torch.float64).view(model.config.n_layers, -1)


def _replaced(values: Tensor, dim: int, index: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.clone().index_copy_(
        dim, torch.tensor([index], device=x.device), values.narrow(dim, index, 1)
    )
