"""Batches from token files: shifted windows, the training order, and the LightningDataModule."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from minigpt.data.config import DataConfig
from minigpt.data.preparation import TokenFile, prepare_split, prepare_tokenizer
from minigpt.data.sources import open_corpus
from minigpt.data.windows import BudgetSampler, StoryWindows, TokenWindows
from minigpt.tokenizer import Tokenizer


class DataModule(L.LightningDataModule):
    """Prepares a corpus and hands out its batches, (inputs [B, T], targets [B, T]) int64.

    After `setup`: `tokenizer`, and the token files `train` and `valid`.

    Args:
        config: what to read.
        context_length: T, tokens per window.
        n_steps: optimizer steps of the whole run: what `train_dataloader` has batches for.
        seed: of the training order.
        start_step: the step at which a resumed run goes on.
        tokenizer: encodes the stories; None: one that is trained on the training split.
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
        tokenizer: Tokenizer | None = None,
    ):
        super().__init__()
        self._given = tokenizer
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
        tokenizer = self._given or prepare_tokenizer(corpus, self.config)
        train = prepare_split(corpus, "train", tokenizer, cache_dir)
        return tokenizer, train, prepare_split(corpus, "valid", tokenizer, cache_dir)

    @property
    def bytes_per_token(self) -> float:
        """Of the validation split: what turns nats per token into bits per byte."""
        return self.valid.bytes_per_token

    def train_dataloader(self) -> DataLoader:
        """The batches from `start_step` to the end of the run."""
        tokens, length, config = self.train.array(), self.context_length, self.config
        stories = config.shuffle == "stories"
        order = self.n_steps, self.seed, self.start_step, *self._rank(), config.random_offset
        sampler = BudgetSampler(len(tokens), length, config.windows_per_batch, *order, stories)
        if stories:
            return _loader(StoryWindows(tokens, length, self.seed), batch_sampler=sampler)
        return _loader(TokenWindows(tokens, length), batch_sampler=sampler)

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
        return _loader(windows, sampler=mine, batch_size=self.config.windows_per_batch)

    def _rank(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)


def _loader(windows: TokenWindows, **how: Any) -> DataLoader:
    # No workers: a batch is gathered in microseconds, less than handing it to another process.
    # TokenWindows.__getitems__ has already put it together.
    pin_memory = torch.cuda.is_available()
    return DataLoader(windows, collate_fn=lambda batch: batch, pin_memory=pin_memory, **how)
