"""Attention weights of every layer and head, and scores that show what a head attends to.

>>> weights = attention_weights(net, encode_prompt(tokenizer, "Tom had a dog. He"))
>>> weights[layer, head, i, j]  # weight with which token i attends to token j
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt.analysis.inputs import check_ids, readable_view
from minigpt.core.settings import UserError
from minigpt.model import GPT, KVCache

MAX_REPEATED = 50  # maximum length of the random sequence that `head_scores` repeats


@torch.inference_mode()
def attention_weights(net: GPT, ids: Tensor) -> Tensor:
    """Return the attention weights of every layer and head over one sequence of tokens.

    One call of `net.forward` computes the weights, and a `KVCache` records them. Dropout is off.
    The model is not changed, so several threads may call this function at once.

    Args:
        net: the model.
        ids: token ids (1, T).

    Returns:
        Weights (n_layers, n_heads, T, T) in float32, or in float64 for a model in float64. Each row
        sums to one.

    Raises:
        UserError: `ids` is not an integer tensor (1, T), is empty or longer than the context, or
            has an id that is not in the vocabulary; or `net.forward` or `net.hidden` does not
            accept the argument `cache`.
    """
    check_ids(net, ids, only_one=True)
    cache = KVCache(ids.shape[1], keep_weights=True)
    readable_view(net)(ids, cache=cache)
    assert cache.weights is not None
    weights = torch.cat(cache.weights)
    return weights if weights.dtype == torch.float64 else weights.float()


@dataclass(frozen=True)
class HeadScores:
    """Two scores from 0 to 1 for every attention head, as tensors (n_layers, n_heads).

    Olsson et al. (2022, arXiv 2209.11895) describe induction heads.

    Attributes:
        previous_token: mean attention to the previous token.
        induction: mean attention from a repeated token to the token after its first occurrence. The
            mean is over all positions with a repeated token.
    """

    previous_token: Tensor
    induction: Tensor


def head_scores(net: GPT, seed: int = 0) -> HeadScores:
    """Return the previous-token score and the induction score of every head.

    Both scores are measured on one sequence: id 0, n random different ids, and these n ids again.
    The model can predict the second half only by attending to the first half. n is MAX_REPEATED
    (50), or the largest n that a shorter context or a smaller vocabulary allows.

    Args:
        net: the model.
        seed: seed of the random ids.

    Returns:
        The scores.

    Raises:
        UserError: the context or the vocabulary is too small for n = 2; or `net.forward` or
            `net.hidden` does not accept the argument `cache`.
    """
    ids = repeated_ids(net, seed)
    n = (ids.shape[1] - 1) // 2
    weights = attention_weights(net, ids)
    return HeadScores(
        previous_token=weights.diagonal(-1, -2, -1).mean(dim=-1),
        # Position i > n holds the same token as position i - n; the next token is at i - n + 1.
        induction=weights.diagonal(1 - n, -2, -1)[..., 2:].mean(dim=-1),
    )


def repeated_ids(net: GPT, seed: int = 0) -> Tensor:
    """Return the input of `head_scores`: id 0, n different random ids, and the same n ids again.

    Args:
        net: the model; n depends on its context length and its vocabulary, as in `head_scores`.
        seed: seed of the random ids.

    Returns:
        Ids (1, 2 n + 1), int64.

    Raises:
        UserError: the context or the vocabulary is too small for n = 2.
    """
    shape = net.config
    n = min(MAX_REPEATED, (shape.context_length - 1) // 2, shape.vocab_size - 1)
    if n < 2:
        raise UserError("must have context_length >= 5 and vocab_size >= 3", "net")
    generator = torch.Generator().manual_seed(seed)
    half = 1 + torch.randperm(shape.vocab_size - 1, generator=generator)[:n]
    ids = torch.cat([torch.zeros(1, dtype=torch.long), half, half])[None]
    return ids.to(net.embedding.weight.device)
