"""Batches from token files: shifted windows, the training order, and the LightningDataModule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from minigpt.config import UserError
from minigpt.model import IGNORE_INDEX
from minigpt.preparation import (
    DataConfig,
    TokenFile,
    open_corpus,
    prepare_split,
    prepare_tokenizer,
)
from minigpt.tokenizer import Tokenizer

__all__ = [
    "BudgetSampler",
    "DataConfig",
    "DataModule",
    "TokenFile",
    "TokenWindows",
    "epoch_permutation",
    "open_corpus",
    "prepare_split",
    "prepare_tokenizer",
]

# ---------------------------------------------------------------------------- windows


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
        return (
            torch.from_numpy(np.ascontiguousarray(ids[:, :-1])),
            torch.from_numpy(np.ascontiguousarray(targets[:, 1:])),
        )


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
            smaller = f"data.batch_size={fits}, " if fits else ""
            devices = f" on each of {world_size} devices" if world_size > 1 else ""
            raise UserError(
                f"the training split has {n_windows} windows, fewer than one batch of "
                f"{batch_size}{devices}: use {smaller}a smaller model.context_length or more text"
            )
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


# ---------------------------------------------------------------------------- data module


class DataModule(L.LightningDataModule):
    """Prepares a corpus and hands out its batches, (inputs [B, T], targets [B, T]) int64.

    After `setup`: `tokenizer`, and the token files `train` and `valid`.

    Args:
        config: what to read.
        context_length: T, tokens per window.
        n_steps: optimizer steps of the whole run: what `train_dataloader` has batches for.
        seed: of the training order.
        start_step: the step at which a resumed run goes on.
        given: encode by this tokenizer; None: by one trained on the training split.
    """

    tokenizer: Tokenizer
    train: TokenFile
    valid: TokenFile

    def __init__(
        self,
        config: DataConfig,
        context_length: int,
        n_steps: int,
        seed: int,
        start_step: int = 0,
        given: Tokenizer | None = None,
    ):
        super().__init__()
        self.given = given
        self.config, self.context_length = config, context_length
        self.n_steps, self.seed, self.start_step = n_steps, seed, start_step
        self._ready = False

    def prepare_data(self) -> None:
        """Download and encode. Lightning calls this on one rank of each node."""
        if not self._ready:
            self._prepare()

    def setup(self, stage: str | None = None) -> None:
        """Open what `prepare_data` left. Lightning calls this on every rank."""
        if self._ready:
            return
        self.tokenizer, self.train, self.valid = self._prepare()
        self._ready = True

    def _prepare(self) -> tuple[Tokenizer, TokenFile, TokenFile]:
        corpus, cache_dir = open_corpus(self.config), self.config.cache_dir
        tokenizer = self.given
        if tokenizer is None:
            tokenizer = prepare_tokenizer(corpus, self.config)
        train = prepare_split(corpus, "train", tokenizer, cache_dir)
        return tokenizer, train, prepare_split(corpus, "valid", tokenizer, cache_dir)

    @property
    def bytes_per_token(self) -> float:
        """Of the validation split: what turns nats per token into bits per byte."""
        return self.valid.bytes_per_token

    def train_dataloader(self) -> DataLoader:
        """The batches from `start_step` to the end of the run."""
        windows = TokenWindows(self.train.array(), self.context_length)
        rank, world_size = self._rank()
        sampler = BudgetSampler(
            self.train.n_tokens,
            self.context_length,
            self.config.batch_size,
            self.n_steps,
            self.seed,
            self.start_step,
            rank,
            world_size,
            self.config.random_offset,
        )
        return _loader(windows, batch_sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        """The validation split in order, every token once; on several ranks each takes a share.

        The shares are of one length, as ranks that share weights work in step: where the windows
        do not divide, the last ones of some ranks hold no token.
        """
        windows = TokenWindows(self.valid.array(), self.context_length)
        rank, world_size = self._rank()
        starts, length = windows.side_by_side(), self.context_length
        each = -(-len(starts) // world_size)
        mine = range(rank * length, each * world_size * length, world_size * length)
        return _loader(windows, sampler=mine, batch_size=self.config.batch_size)

    def _rank(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)


def _loader(windows: TokenWindows, **how: Any) -> DataLoader:
    # No workers: a batch is gathered in microseconds, less than handing it to another process.
    return DataLoader(
        windows,
        collate_fn=_as_it_is,
        num_workers=0,
        pin_memory=torch.cuda.is_available(),
        **how,
    )


def _as_it_is(batch: Any) -> Any:
    return batch  # TokenWindows.__getitems__ has already put it together
