"""Where each token looks: the attention weights of every layer and head over a text.

>>> weights = attention_weights(net, encode_prompt(tokenizer, "Tom had a dog. He"))
>>> weights[layer, head, i, j]  # the share of its attention that token i gives to token j
"""

from __future__ import annotations

import torch
from torch import Tensor

from minigpt.core.settings import UserError
from minigpt.generation.decoder import takes_cache
from minigpt.model import GPT, KVCache


@torch.inference_mode()
def attention_weights(net: GPT, ids: Tensor) -> Tensor:
    """Return the weights (n_layers, n_heads, T, T) over `ids` (1, T), float32; rows sum to one.

    They are those of the model's own attention in one pass of `net.forward`, kept by its cache.
    Nothing is changed in the model, so several threads may ask at once.

    Raises:
        ValueError: the tokens are more than the context.
        UserError: the model is of a subclass whose forward takes no cache.
    """
    if not takes_cache(net):
        raise UserError(f"{type(net).__qualname__}.forward takes no cache, which keeps the weights")
    cache = KVCache(ids.shape[1], keep_weights=True)
    net(ids, cache=cache)
    assert cache.weights is not None
    return torch.cat(cache.weights).float()
