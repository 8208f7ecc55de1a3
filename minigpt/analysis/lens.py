"""Logit lens and direct logit attribution: what each layer and each head says about the next token.

>>> logit_lens(model, ids).argmax(dim=-1)  # most likely token at each depth, (n_layers + 1, T)
>>> logit_attribution(model, ids, targets).heads  # (n_layers, n_heads, T)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minigpt.analysis.activations import activations
from minigpt.analysis.inputs import check_ids, check_targets
from minigpt.core.settings import UserError
from minigpt.kernels.choice import is_plain
from minigpt.model import GPT


@torch.no_grad()
def logit_lens(model: GPT, ids: Tensor) -> Tensor:
    """Return the predictions from the residual stream before the first block and after each block.

    The final LayerNorm and the output projection of the model are applied to the residual stream
    (nostalgebraist 2020, "interpreting GPT: the logit lens").

    Args:
        model: a `GPT`, not an instance of a subclass.
        ids: token ids (1, T), int64.

    Returns:
        Log-probabilities (n_layers + 1, T, V) of the next token. In the first dimension, index 0
        is the prediction before the first block, and index i is the prediction after i blocks. So
        the last index is the prediction of the model itself.

    Raises:
        UserError: `model` is an instance of a subclass, or has hooks or replaced parts; or `ids` is
            not an integer tensor (1, T), is empty or longer than the context, or has an id that is
            not in the vocabulary.
    """
    check_ids(model, ids, only_one=True)
    stream = _residual_streams(model, activations(_plain(model), ids))  # (L + 1, T, d)
    logits = model.final_norm(stream) @ model.embedding.weight.T
    return logits.log_softmax(dim=-1)


def _residual_streams(model: GPT, values: dict[str, Tensor]) -> Tensor:
    names = [f"blocks.{i}.input" for i in range(model.config.n_layers)]
    return torch.cat([values[name] for name in [*names, "residual"]])


def _plain(model: GPT) -> GPT:
    if not is_plain(model):
        problem = f"{type(model).__qualname__} changes what GPT computes: choose an unmodified GPT"
        raise UserError(problem, "model")
    return model


@dataclass(frozen=True)
class LogitAttribution:
    """Contribution of each part of a model to the logit of a target token, for each position.

    The sum of all contributions is the logit of the target minus a reference logit, such as the
    mean logit of the vocabulary (see `logit_attribution`).

    Attributes:
        heads: contributions (n_layers, n_heads, T) of the attention heads, without the bias of
            `attention.out`.
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
        """Sum of all contributions, (T,): the logit of the target minus the reference logit."""
        layers = self.heads.sum(dim=1) + self.attention_bias + self.feed_forward
        return layers.sum(dim=0) + self.embedding + self.positions + self.norm_bias


@torch.no_grad()
def logit_attribution(
    model: GPT, ids: Tensor, targets: Tensor, reference: Tensor | None = None
) -> LogitAttribution:
    """Split the logits of target tokens into contributions of heads, layers and embeddings.

    The residual stream is a sum of the outputs of these parts. The final LayerNorm is affine if its
    standard deviation is held constant. So a logit is a sum of one contribution for each part
    (direct logit attribution; Elhage et al. 2021, "A Mathematical Framework for Transformer
    Circuits"). A constant that is added to all logits changes no probability, so a reference, such
    as the mean logit, is subtracted from each logit.

    Args:
        model: a `GPT`, not an instance of a subclass.
        ids: token ids (1, T), int64.
        targets: ids (T,) of the target tokens, one for each position.
        reference: ids (T,) of the tokens whose logits are the references, one for each position.
            None means that the reference is the mean logit of the vocabulary.

    Returns:
        The contributions.

    Raises:
        UserError: `model` is an instance of a subclass, or has hooks or replaced parts; or `ids`,
            `targets` or `reference` has another shape or an id that is not in the vocabulary.
    """
    check_ids(model, ids, only_one=True)
    check_targets(model, ids, targets)
    if reference is not None:
        check_targets(model, ids, reference, "reference")
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
