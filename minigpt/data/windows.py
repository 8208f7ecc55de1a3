"""Shifted windows over a token file, and the order in which training reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from minigpt.core.settings import UserError
from minigpt.model import IGNORE_INDEX


class TokenWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of T tokens over a stream, asked for by the token they start at.

    Window s has the inputs [s, s + T) and the targets [s + 1, s + 1 + T). Places behind the end of
    the stream hold id 0 and targets that the loss ignores.

    Args:
        tokens: ids, [n_tokens] uint16, usually a memory map.
        context_length: T.
    """

    def __init__(self, tokens: np.ndarray, context_length: int):
        self.tokens = tokens.view(np.ndarray)  # indexing a np.memmap costs more, and gives no more
        self.context_length = context_length

    def side_by_side(self) -> range:
        """Starts of the windows that together predict every token but the first, once."""
        return range(0, max(0, len(self.tokens) - 1), self.context_length)

    def __getitem__(self, start: int) -> tuple[Tensor, Tensor]:
        """(inputs [T], targets [T]), both int64."""
        ids, targets = self.__getitems__([start])
        return ids[0], targets[0]

    def __getitems__(self, starts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A whole batch in one gather: (inputs [B, T], targets [B, T]), both int64."""
        positions = np.asarray(starts)[:, None] + np.arange(self.context_length + 1)  # [B, T + 1]
        inside = positions < len(self.tokens)
        rows = self.tokens[np.where(inside, positions, 0)].astype(np.int64)
        ids, targets = np.where(inside, rows, 0), np.where(inside, rows, IGNORE_INDEX)
        parts = ids[:, :-1], targets[:, 1:]
        inputs, shifted = (torch.from_numpy(np.ascontiguousarray(part)) for part in parts)
        return inputs, shifted


@lru_cache(maxsize=2)  # a batch touches at most two epochs
def epoch_permutation(n_windows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the windows in an epoch: [n_windows], a function of its arguments alone."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    order = generator.permutation(n_windows)
    order.setflags(write=False)
    return order


def epoch_offset(context_length: int, seed: int, epoch: int) -> int:
    """The token that the first window of an epoch starts at: 0 in epoch 0, then any below T."""
    if epoch == 0:
        return 0
    return int(np.random.default_rng([seed, epoch, 1]).integers(context_length))


class BudgetSampler(Sampler[list[int]]):
    """The batches of a whole run of `n_steps`, as starts of windows: epoch behind epoch.

    In an epoch the windows lie side by side over the stream, in the order of its permutation. With
    `random_offset` they begin at another token in each: text that comes again is cut at other
    places, so that every token has another context and another position. With batches of B
    on W ranks, batch s of rank r takes the positions [(s·W + r)·B, (s·W + r + 1)·B) of it. So
    every batch is full (one may straddle two epochs), every window comes once an epoch, and a
    run can go on at any step without replaying the ones before.

    Args:
        n_tokens: of the stream.
        context_length: T, tokens of a window.
        batch_size: B, windows per rank and step.
        n_steps: steps of the whole run, those before `start_step` included.
        seed: not negative.
        start_step: the first step to yield.

    Raises:
        UserError: fewer windows than one step needs.
    """

    def __init__(
        self,
        n_tokens: int,
        context_length: int,
        batch_size: int,
        n_steps: int,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        random_offset: bool = False,
    ):
        last_offset = context_length - 1 if random_offset else 0
        n_windows = max(0, n_tokens - 1 - last_offset) // context_length  # as many in each epoch
        if n_windows < batch_size * world_size:
            fits = n_windows // world_size
            fix = {"data.batch_size": fits} if fits else None
            few = f"the training split has {n_windows} windows for {world_size} device(s)"
            problem = f"{few}; more text or a smaller model.context_length gives more"
            raise UserError(problem, "data.batch_size", batch_size, fix)
        self.n_windows, self.batch_size, self.seed = n_windows, batch_size, seed
        self.n_steps, self.start_step = n_steps, start_step
        self.rank, self.world_size = rank, world_size
        self.context_length, self.random_offset = context_length, random_offset

    def __len__(self) -> int:
        """Steps of the whole run: Lightning counts those before a resumed checkpoint as fetched."""
        return self.n_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.n_steps):
            yield self.batch(step)

    def batch(self, step: int) -> list[int]:
        """Where the windows of this rank at `step` start: [batch_size]."""
        first = (step * self.world_size + self.rank) * self.batch_size
        epochs, places = np.divmod(np.arange(first, first + self.batch_size), self.n_windows)
        parts = [self._starts(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(parts).tolist()

    def _starts(self, epoch: int) -> np.ndarray:  # [n_windows]
        order = epoch_permutation(self.n_windows, self.seed, epoch)
        offset = self.random_offset and epoch_offset(self.context_length, self.seed, epoch)
        return order * self.context_length + offset
