"""Logit lens and direct logit attribution: what each layer and each head says about the next token.

>>> logit_lens(model, ids).argmax(dim=-1)  # the most likely token after each block, (L + 1, T)
>>> logit_attribution(model, ids, targets).heads  # (n_layers, n_heads, T)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minigpt.analysis.activations import activations
from minigpt.core.settings import UserError
from minigpt.kernels.decode import is_plain
from minigpt.model import GPT


@torch.no_grad()
def logit_lens(model: GPT, ids: Tensor) -> Tensor:
    """Return what each layer would predict: its residual stream through final norm and lm_head.

    The method is by nostalgebraist (2020, "interpreting GPT: the logit lens").

    Args:
        model: a plain `GPT`.
        ids: token ids (1, T), int64.

    Returns:
        Log-probabilities (n_layers + 1, T, V) of the next token: first of the embeddings, then
        after each block. The last row is the prediction of the model.

    Raises:
        UserError: the class of the model changes what `GPT` computes.
        ValueError: `ids` is longer than the context.
    """
    stream = _residual_streams(model, activations(_plain(model), ids))  # (L + 1, T, d)
    logits = model.final_norm(stream) @ model.embedding.weight.T
    return logits.log_softmax(dim=-1)


def _residual_streams(model: GPT, values: dict[str, Tensor]) -> Tensor:
    names = [f"blocks.{i}.input" for i in range(model.config.n_layers)]
    return torch.cat([values[name] for name in [*names, "residual"]])


def _plain(model: GPT) -> GPT:
    if not is_plain(model):
        problem = f"{type(model).__qualname__} changes what GPT computes: choose a plain GPT"
        raise UserError(problem, "model")
    return model


@dataclass(frozen=True)
class LogitAttribution:
    """Contribution of each part of a model to a logit at each position.

    The sum of all parts is the logit of the target minus the reference.

    Attributes:
        heads: contributions (n_layers, n_heads, T) of the attention heads, without the bias.
        attention_bias: contributions (n_layers, T) of the bias of `attention.out`.
        feed_forward: contributions (n_layers, T) of the feed-forward layers.
        embedding: contributions (T,) of the token embeddings.
        positions: contributions (T,) of the position encodings.
        norm_bias: contributions (T,) of the bias of the final LayerNorm.
    """

    heads: Tensor
    attention_bias: Tensor
    feed_forward: Tensor
    embedding: Tensor
    positions: Tensor
    norm_bias: Tensor

    @property
    def total(self) -> Tensor:
        """Sum of all parts, (T,): the logit of the target minus the reference."""
        layers = self.heads.sum(dim=1) + self.attention_bias + self.feed_forward
        return layers.sum(dim=0) + self.embedding + self.positions + self.norm_bias


@torch.no_grad()
def logit_attribution(
    model: GPT, ids: Tensor, targets: Tensor, reference: Tensor | None = None
) -> LogitAttribution:
    """Split the logits of target tokens into contributions of heads, layers and embeddings.

    The residual stream is a sum, and the final LayerNorm with its standard deviation held constant
    is linear, so the logit is a sum over all parts (direct logit attribution; Elhage et al. 2021,
    "A Mathematical Framework for Transformer Circuits"). A constant that is added to all logits
    changes no probability, so logits are measured relative to a reference.

    Args:
        model: a plain `GPT`.
        ids: token ids (1, T), int64.
        targets: the token (T,) whose logit is split, for each position.
        reference: tokens (T,) whose logits are subtracted; None subtracts the mean logit of the
            vocabulary.

    Returns:
        The contributions.

    Raises:
        UserError: the class of the model changes what `GPT` computes.
        ValueError: `ids` is longer than the context.
    """
    values = activations(_plain(model), ids)
    weight, norm = model.embedding.weight, model.final_norm
    other = weight.mean(dim=0) if reference is None else weight[reference]
    direction = weight[targets] - other  # (T, d)
    residual = values["residual"][0]
    std = (residual.var(dim=-1, unbiased=False, keepdim=True) + norm.eps).sqrt()  # (T, 1)
    scaled = direction * norm.weight / std
    scaled = scaled - scaled.mean(dim=-1, keepdim=True)  # LayerNorm subtracts the mean of its input

    def contribution(part: Tensor) -> Tensor:  # part (..., T, d) of the residual stream
        return (part * scaled).sum(dim=-1)

    heads, biases, layers = [], [], []
    for i in range(model.config.n_layers):
        out: Any = model.get_submodule(f"blocks.{i}.attention.out")
        matrices = out.weight.unflatten(1, (model.config.n_heads, -1))  # (d, nh, hs)
        z = values[f"blocks.{i}.attention.heads"][0]  # (T, nh, hs)
        heads.append(contribution(torch.einsum("tnh,dnh->ntd", z, matrices)))
        biases.append(contribution(out.bias))
        layers.append(contribution(values[f"blocks.{i}.feed_forward"][0]))
    return LogitAttribution(
        heads=torch.stack(heads),
        attention_bias=torch.stack(biases),
        feed_forward=torch.stack(layers),
        embedding=contribution(model.embedding(ids[0]) * model.scale),
        positions=contribution(model.positions[: ids.shape[1]]),
        norm_bias=(norm.bias * direction).sum(dim=-1),
    )
