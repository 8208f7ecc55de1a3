"""Checks of the arguments of functions that read a model's activations."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from minigpt.core.settings import UserError
from minigpt.generation.decoder import takes_cache
from minigpt.model import GPT

_INTEGERS = (torch.int64, torch.int32)  # dtypes that an embedding accepts


def readable_view(model: GPT) -> GPT:
    """Return a copy of a model without dropout that shares the weights of the model.

    Args:
        model: the model, which is not changed.

    Raises:
        UserError: `forward` or `hidden` of the model does not accept the argument `cache`.
    """
    if not takes_cache(model):
        name = type(model).__qualname__
        raise UserError(f"{name}.forward and {name}.hidden must have a parameter named cache")
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()


def check_ids(model: GPT, ids: Tensor, name: str = "ids", only_one: bool = False) -> None:
    """Check that a model can read token ids.

    Args:
        model: the model.
        ids: the ids.
        name: name of the argument, for the error.
        only_one: whether `ids` must be a single sequence.

    Raises:
        UserError: `ids` is not an integer tensor of shape (B, T), or (1, T) with `only_one`; it is
            empty or longer than the context; or an id is not in the vocabulary.
    """
    shape, context = model.config, model.config.context_length
    wanted = "one sequence, of shape (1, T)" if only_one else "sequences, of shape (B, T)"
    is_matrix = isinstance(ids, Tensor) and ids.dtype in _INTEGERS and ids.dim() == 2
    if not is_matrix or not ids.numel() or (only_one and len(ids) != 1):
        found = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        problem = f"must be int64 token ids of {wanted}, not {found}"
        raise UserError(f"{problem}: use encode_prompt(tokenizer, text)", name)
    if ids.shape[1] > context:
        problem = f"{ids.shape[1]} tokens exceed context_length {context}"
        raise UserError(f"{problem}: use {name}[:, -{context}:]", name)
    _check_range(ids, shape.vocab_size, name)


def check_targets(model: GPT, ids: Tensor, targets: Tensor, name: str = "targets") -> None:
    """Check that there is one token of the vocabulary for each position of `ids`.

    Args:
        model: the model.
        ids: token ids (1, T).
        targets: the tokens.
        name: name of the argument, for the error.

    Raises:
        UserError: `targets` is not an integer tensor of shape (T,), or an id is not in the
            vocabulary.
    """
    length = ids.shape[1]
    is_row = isinstance(targets, Tensor) and targets.dtype in _INTEGERS
    if not is_row or targets.shape != (length,):
        problem = f"must be int64 token ids of shape ({length},), one for each position of ids"
        raise UserError(f"{problem}: to predict the text itself, use ids[0].roll(-1)", name)
    _check_range(targets, model.config.vocab_size, name)


def _check_range(ids: Tensor, vocab_size: int, name: str) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        problem = f"{wrong} is not a token: ids must be from 0 to {vocab_size - 1}"
        raise UserError(f"{problem}; use the tokenizer of the model", name)


def checked_heads(model: GPT, heads: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return pairs (block, head) as a list, after checking that a model has these heads.

    Args:
        model: the model.
        heads: pairs of a block and a head, both counted from 0.

    Raises:
        UserError: `heads` does not consist of such pairs, or the model has no such head.
    """
    shape = model.config
    blocks, numbers = range(shape.n_layers), range(shape.n_heads)
    allowed = f"block 0 to {shape.n_layers - 1} and head 0 to {shape.n_heads - 1}"
    pairs = list(heads)
    for pair in pairs:
        try:
            block, head = pair
            exists = block in blocks and head in numbers
        except (TypeError, ValueError):  # not a pair
            exists = False
        if not exists:
            raise UserError(f"choose pairs of {allowed}, such as [(0, 1)]", "heads", pair)
    return pairs
