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
    """Non-overlapping windows over a token stream, with targets one token ahead.

    Window i has the inputs [i·T, (i+1)·T) and the targets [i·T+1, (i+1)·T+1). With `keep_tail`
    the last, shorter window is kept, filled up with id 0 and targets that the loss ignores: then
    every token but the first is predicted exactly once. Without it that window is left out.

    Args:
        tokens: ids, [n_tokens] uint16, usually a memory map.
        context_length: T.
    """

    def __init__(self, tokens: np.ndarray, context_length: int, keep_tail: bool):
        self.tokens = tokens.view(np.ndarray)  # indexing a np.memmap costs more, and gives no more
        self.context_length = context_length
        n_targets = max(0, len(tokens) - 1)
        self.n_windows = n_targets // context_length
        if keep_tail and n_targets % context_length:
            self.n_windows += 1

    def __len__(self) -> int:
        return self.n_windows

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(inputs [T], targets [T]), both int64."""
        ids, targets = self.__getitems__([index])
        return ids[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A whole batch in one gather: (inputs [B, T], targets [B, T]), both int64."""
        length = self.context_length
        positions = np.asarray(indices)[:, None] * length + np.arange(length + 1)  # [B, T + 1]
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


class BudgetSampler(Sampler[list[int]]):
    """The batches of a whole run of `n_steps`: one endless order, epoch behind epoch.

    The order is the permutation of epoch 0, then that of epoch 1, and so on. With batches of B
    on W ranks, batch s of rank r takes the positions [(s·W + r)·B, (s·W + r + 1)·B) of it. So
    every batch is full (one may straddle two epochs), every window comes once an epoch, and a
    run can go on at any step without replaying the ones before.

    Args:
        n_windows: how many windows there are to choose from.
        batch_size: B, windows per rank and step.
        n_steps: steps of the whole run, those before `start_step` included.
        seed: not negative.
        start_step: the first step to yield.

    Raises:
        UserError: fewer windows than one step needs.
    """

    def __init__(
        self,
        n_windows: int,
        batch_size: int,
        n_steps: int,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
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

    def __len__(self) -> int:
        """Steps of the whole run: Lightning counts those before a resumed checkpoint as fetched."""
        return self.n_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.n_steps):
            yield self.batch(step)

    def batch(self, step: int) -> list[int]:
        """The windows of this rank at `step`: [batch_size]."""
        first = (step * self.world_size + self.rank) * self.batch_size
        epochs, places = np.divmod(np.arange(first, first + self.batch_size), self.n_windows)
        parts = [
            epoch_permutation(self.n_windows, self.seed, int(epoch))[places[epochs == epoch]]
            for epoch in np.unique(epochs)
        ]
        return np.concatenate(parts).tolist()


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
    ):
        super().__init__()
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
        self._ready = True
        self.tokenizer, self.train, self.valid = self._prepare()

    def _prepare(self) -> tuple[Tokenizer, TokenFile, TokenFile]:
        corpus, cache_dir = open_corpus(self.config), self.config.cache_dir
        tokenizer = prepare_tokenizer(corpus, self.config)
        train = prepare_split(corpus, "train", tokenizer, cache_dir)
        return tokenizer, train, prepare_split(corpus, "valid", tokenizer, cache_dir)

    @property
    def bytes_per_token(self) -> float:
        """Of the validation split: what turns nats per token into bits per byte."""
        return self.valid.bytes_per_token

    def train_dataloader(self) -> DataLoader:
        """The batches from `start_step` to the end of the run."""
        windows = TokenWindows(self.train.array(), self.context_length, keep_tail=False)
        rank, world_size = self._rank()
        sampler = BudgetSampler(
            len(windows),
            self.config.batch_size,
            self.n_steps,
            self.seed,
            self.start_step,
            rank,
            world_size,
        )
        return _loader(windows, batch_sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        """The validation split in order, every token once; on several ranks each takes a share.

        The shares are of one length, as ranks that share weights work in step: where the windows
        do not divide, the last ones of some ranks hold no token.
        """
        windows = TokenWindows(self.valid.array(), self.context_length, keep_tail=True)
        rank, world_size = self._rank()
        mine = range(rank, -(-len(windows) // world_size) * world_size, world_size)
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
