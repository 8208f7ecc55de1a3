"""A LightningDataModule that prepares a corpus and loads batches from its token files."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from minigpt.core.console import log
from minigpt.data.config import DataConfig
from minigpt.data.device import DeviceBatches
from minigpt.data.preparation import TokenFile, prepare_split, prepare_tokenizer
from minigpt.data.sources import open_corpus
from minigpt.data.windows import BudgetSampler, StoryWindows, TokenWindows, TrainingBatches
from minigpt.tokenizer import Tokenizer

# Tokens in a validation batch on a GPU, at least: 128 windows of 256, which keep the GPU busy.
_VALIDATION_TOKENS = 32_768
_SHARE_OF_MEMORY = 0.25  # largest part of a GPU's memory that the training tokens may take


class DataModule(L.LightningDataModule):
    """Prepared corpus of a run; it loads batches of inputs and targets, each [B, T] int64.

    `setup` sets `tokenizer` and the token files `train` and `valid`.

    Args:
        config: settings of the corpus and the batches.
        context_length: number of tokens per window, T.
        n_steps: number of steps of the whole run. A step takes one batch per rank, and an update
            takes `trainer.accumulate_grad_batches` steps.
        seed: seed of the training order, at least 0.
        start_step: step of the first batch to load, above 0 if a run is resumed.
        tokenizer: tokenizer for the stories; None means that one is trained on the training split.
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
        self._fixed_tokenizer = tokenizer
        self.config, self.context_length = config, context_length
        self.n_steps, self.seed, self.start_step = n_steps, seed, start_step
        self._ready = False

    def prepare_data(self) -> None:
        """Download and encode the corpus. Lightning calls this on one rank of each node.

        Raises:
            UserError: the corpus cannot be read or downloaded, or the cache cannot be written.
        """
        if not self._ready:
            self._prepare()

    def setup(self, stage: str | None = None) -> None:
        """Open the prepared files; files that are missing are prepared first.

        Lightning calls this on every rank.

        Args:
            stage: Lightning's stage, such as "fit"; ignored.

        Raises:
            UserError: the corpus cannot be read, or the cache cannot be written.
        """
        if self._ready:
            return
        self.tokenizer, self.train, self.valid = self._prepare()
        self._ready = True

    def _prepare(self) -> tuple[Tokenizer, TokenFile, TokenFile]:
        corpus, cache_dir = open_corpus(self.config), self.config.cache_dir
        tokenizer = self._fixed_tokenizer or prepare_tokenizer(corpus, self.config)
        train = prepare_split(corpus, "train", tokenizer, cache_dir)
        return tokenizer, train, prepare_split(corpus, "valid", tokenizer, cache_dir)

    def check_batches(self, world_size: int) -> None:
        """Raise UserError if the training split is smaller than a batch of `world_size` devices."""
        self._sampler(0, world_size)

    def _sampler(self, rank: int, world_size: int) -> BudgetSampler:
        config, stories = self.config, self.config.shuffle == "stories"
        numbers = self.train.n_tokens, self.context_length, config.windows_per_batch
        order = self.n_steps, self.seed, self.start_step, rank, world_size, config.random_offset
        return BudgetSampler(*numbers, *order, stories)

    def validation_windows(self, accelerator: str) -> int:
        """Return the number of windows per device and validation batch.

        On a CUDA GPU, a validation batch is larger than a small training batch: it needs no memory
        for the backward pass, and small batches would not keep the GPU busy.

        Args:
            accelerator: kind of device, such as "cpu" or "cuda".
        """
        windows = self.config.windows_per_batch
        if accelerator != "cuda":
            return windows
        return max(windows, _VALIDATION_TOKENS // self.context_length)

    def train_dataloader(self) -> DataLoader:
        """Return a loader of this rank's batches, from `start_step` to the end of the run."""
        tokens, length, config = self.train.array(), self.context_length, self.config
        stories, sampler = config.shuffle == "stories", self._sampler(*self._rank())
        shuffled = StoryWindows(tokens, length, self.seed) if stories else None
        windows = shuffled or TokenWindows(tokens, length)
        batches = TrainingBatches(windows, sampler, config.noise, self.tokenizer.vocab_size)
        device = self._device()
        if device.type != "cuda":
            return _loader(batches, sampler=sampler, batch_size=None)
        memory = torch.cuda.get_device_properties(device).total_memory
        if tokens.nbytes > _SHARE_OF_MEMORY * memory:
            log.info("batches    from pinned memory, because the GPU has only %d GB", memory >> 30)
            return _loader(batches, sampler=sampler, batch_size=None)
        on_device = DeviceBatches(batches, device)
        return _loader(on_device, sampler=sampler, batch_size=None, pin_memory=False)

    def val_dataloader(self) -> DataLoader:
        """Return a loader of this rank's part of the validation split, in order.

        Over all ranks, each token of the split except the first is predicted exactly once. All
        ranks get the same number of windows, because under FSDP every rank must run the same number
        of forward passes. If the number of windows is not a multiple of the number of ranks, the
        last window of some ranks contains only padding.
        """
        windows = TokenWindows(self.valid.array(), self.context_length)
        rank, world_size = self._rank()
        starts, length = windows.side_by_side(), self.context_length
        per_rank = -(-len(starts) // world_size)
        share = range(rank * length, per_rank * world_size * length, world_size * length)
        batch_size = self.validation_windows(self._device().type)
        return _loader(windows, sampler=share, batch_size=batch_size)

    def _device(self) -> torch.device:
        """Return the device that trains; a CPU if there is no trainer."""
        trainer = self.trainer
        return trainer.strategy.root_device if trainer is not None else torch.device("cpu")

    def _rank(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)


def _loader(dataset: Dataset[tuple[Tensor, Tensor]], **settings: Any) -> DataLoader:
    # No worker processes: gathering a batch takes microseconds, and passing it on from a worker
    # would take longer. No collation: the items that the dataset returns are whole batches.
    settings = {"pin_memory": torch.cuda.is_available(), **settings}
    return DataLoader(dataset, collate_fn=lambda batch: batch, **settings)
