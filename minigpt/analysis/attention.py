"""Attention weights of every layer and head for a sequence of tokens.

>>> weights = attention_weights(net, encode_prompt(tokenizer, "Tom had a dog. He"))
>>> weights[layer, head, i, j]  # the attention that token i pays to token j
"""

from __future__ import annotations

import torch
from torch import Tensor

from minigpt.core.settings import UserError
from minigpt.generation.decoder import takes_cache
from minigpt.model import GPT, KVCache


@torch.inference_mode()
def attention_weights(net: GPT, ids: Tensor) -> Tensor:
    """Return the attention weights of every layer and head over one sequence of tokens.

    One call of `net.forward` computes the weights, and a `KVCache` records them. The model is not
    changed, so several threads may call this function at once.

    Args:
        net: the model.
        ids: token ids (1, T).

    Returns:
        Weights (n_layers, n_heads, T, T) in float32. Each row sums to one.

    Raises:
        ValueError: `ids` is longer than the context.
        UserError: the class of `net` has a `forward` without the parameter `cache`.
    """
    if not takes_cache(net):
        raise UserError(f"{type(net).__qualname__}.forward must have a parameter named cache")
    cache = KVCache(ids.shape[1], keep_weights=True)
    net(ids, cache=cache)
    assert cache.weights is not None
    return torch.cat(cache.weights).float()
