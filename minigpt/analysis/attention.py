"""Where each token looks: the attention weights of every layer and head over a text.

>>> weights = attention_weights(net, encode_prompt(tokenizer, "Tom had a dog. He"))
>>> weights[layer, head, i, j]  # the share of its attention that token i gives to token j
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from minigpt.model import (
    GPT,
    Block,
    causal_mask,
    split_heads,
)


@torch.inference_mode()
def attention_weights(net: GPT, ids: Tensor) -> Tensor:
    """The weights (n_layers, n_heads, T, T) over `ids` (1, T), float32; each row sums to one.

    They are computed beside the model's own attention, which does not keep them. Nothing is
    changed in the net, so several threads may ask at once.

    Raises:
        ValueError: the tokens are more than the context.
    """
    T = ids.shape[1]  # noqa: N806
    if net.config.context_length < T:
        raise ValueError(f"{T} tokens do not fit the context of {net.config.context_length}")
    x = net.embedding(ids) * net.scale + net.positions[:T]  # (1, T, d), as in GPT.hidden
    layers = []
    for block in cast("Iterable[Block]", net.blocks):
        q, k, _ = split_heads(block.attention.qkv(block.norm1(x)), net.config.n_heads)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (1, nh, T, T)
        layers.append((scores + causal_mask(T, T, scores)).softmax(dim=-1)[0])
        x = block(x)
    return torch.stack(layers).float()
