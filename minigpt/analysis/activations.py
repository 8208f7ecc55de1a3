"""Record activations of a forward pass with hooks, and optionally replace some activations.

>>> values = activations(model, encode_prompt(tokenizer, "Tom had a dog. He"))
>>> values["blocks.2.input"].shape
torch.Size([1, 7, 256])

A model with L blocks has the following activations, in the order of their computation. i runs from
0 to L - 1, and d_ff is the width of the hidden layer; model.py explains the other letters.

| name                         | shape           | content                                        |
|------------------------------|-----------------|------------------------------------------------|
| blocks.i.input               | (B, T, d)       | residual stream before the block               |
| blocks.i.attention.weights   | (B, nh, T, T)   | attention weights; each row sums to 1          |
| blocks.i.attention.heads     | (B, T, nh, hs)  | weighted sum of the values, for each head      |
| blocks.i.attention           | (B, T, d)       | output of attention, added to the stream       |
| blocks.i.middle              | (B, T, d)       | residual stream after attention                |
| blocks.i.feed_forward.hidden | (B, T, d_ff)    | hidden units after GELU                        |
| blocks.i.feed_forward        | (B, T, d)       | output of the feed-forward layer               |
| residual                     | (B, T, d)       | residual stream after the last block           |
| final_norm                   | (B, T, d)       | output of the final LayerNorm                  |
| logits                       | (B, T, V)       | logits of the next token                       |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minigpt.analysis.inputs import check_ids, readable_view
from minigpt.core.settings import UserError
from minigpt.model import GPT, KVCache

Edit = Callable[[Tensor], Tensor]
WEIGHTS = "attention.weights"
# Activations of a block: the module, and whether the activation is the input of this module. If
# not, the activation is the output.
_POINTS = {
    "input": ("", True),
    WEIGHTS: ("attention", False),  # recorded by the cache instead of a hook
    "attention.heads": ("attention.out", True),
    "attention": ("attention", False),
    "middle": ("norm2", True),
    "feed_forward.hidden": ("feed_forward.down", True),
    "feed_forward": ("feed_forward", False),
}


@torch.no_grad()
def activations(
    model: GPT, ids: Tensor, edits: Mapping[str, Edit] | None = None
) -> dict[str, Tensor]:
    """Return all activations of a forward pass.

    The hooks are added to a copy of the model, which shares the weights of the model. So the model
    itself is not changed, and several threads may call this function at once. Dropout is off.

    Args:
        model: the model. A subclass of `GPT` must keep the modules of `GPT`, and its methods
            `forward` and `hidden` must accept the argument `cache`.
        ids: token ids (B, T), int64.
        edits: functions by name of an activation. Each function is called with the activation of
            that name, and returns a tensor that replaces it; later activations are computed from
            this tensor. Attention weights and logits cannot be replaced. None replaces nothing.

    Returns:
        Tensors by name; the table at the top of this module has names, order and shapes.

    Raises:
        UserError: `ids` is not an integer tensor (B, T), is empty or longer than the context, or
            has an id that is not in the vocabulary; `edits` names an activation that does not exist
            or cannot be replaced, or an edit does not return a tensor of the same shape; or the
            class of the model lacks a module or does not accept `cache`.
    """
    check_ids(model, ids)
    view = readable_view(model)
    names, edits = activation_names(model), edits or {}
    replaceable = [name for name in names if not name.endswith(("weights", "logits"))]
    for name in edits:
        if name not in replaceable:
            problem = f"{name} is not an activation that can be replaced"
            raise UserError(f"{problem}; choose from {', '.join(replaceable[:3])}, ...", "edits")
    recorded: dict[str, Tensor] = {}
    n_heads = model.config.n_heads

    def record(name: str, x: Tensor) -> Tensor:
        split = name.endswith(".heads")
        x = x.unflatten(-1, (n_heads, -1)) if split else x
        recorded[name] = _edited(x, name, edits)
        return recorded[name].flatten(2) if split else recorded[name]

    for name in names:
        if not name.endswith(("weights", "logits")):
            _add_hook(view, name, record)
    cache = KVCache(ids.shape[1], keep_weights=True)
    recorded["logits"] = view(ids, cache=cache)
    assert cache.weights is not None
    for i, weights in enumerate(cache.weights):
        recorded[f"blocks.{i}.{WEIGHTS}"] = weights
    return {name: recorded[name] for name in names}


def _edited(x: Tensor, name: str, edits: Mapping[str, Edit]) -> Tensor:
    if name not in edits:
        return x
    edited = edits[name](x)
    if not isinstance(edited, Tensor) or edited.shape != x.shape:
        found = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
        raise UserError(
            f"{name} must return a tensor of shape {tuple(x.shape)}, not {found}", "edits"
        )
    return edited


def activation_names(model: GPT) -> list[str]:
    """Return the names of all activations of a model, in the order of their computation.

    Args:
        model: the model.

    Returns:
        The names; the table at the top of this module explains them.
    """
    blocks = [f"blocks.{i}.{point}" for i in range(model.config.n_layers) for point in _POINTS]
    return [*blocks, "residual", "final_norm", "logits"]


def _add_hook(view: GPT, name: str, record: Callable[[str, Tensor], Tensor]) -> None:
    """Add to `view` a hook that replaces the activation `name` by `record(name, activation)`."""
    path, is_input = ("final_norm", True) if name == "residual" else (name, False)
    is_middle = name.endswith(".middle")
    if name.startswith("blocks."):
        _, block, point = name.split(".", 2)
        part, is_input = _POINTS[point]
        path = ".".join(filter(None, ("blocks", block, part)))
    try:
        module = view.get_submodule(path)
    except AttributeError:
        problem = f"{type(view).__qualname__} has no module {path}: choose a model that has it"
        raise UserError(problem, "model") from None

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = record(name, inputs[0])
        if is_middle:  # the block adds the output of the feed-forward layer to this same tensor
            inputs[0].copy_(x.clone())
        return x, *inputs[1:]

    def after(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return record(name, output)

    if is_input:
        module.register_forward_pre_hook(before)
    else:
        module.register_forward_hook(after)
