"""Windows over a token file, and the order in which training reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from minigpt.core.settings import UserError
from minigpt.model import IGNORE_INDEX
from minigpt.tokenizer import Tokenizer

_CHUNK = 1 << 24  # tokens to search at a time for the ends of stories
_CONSTANT_NOISE = 0.8  # fraction of a run after which noise decreases


class TokenWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of T tokens over a token file, indexed by the position of their first token.

    The inputs of window s are the tokens at positions [s, s + T), and its targets are those at
    [s + 1, s + 1 + T). Past the end of the file, inputs are id 0 and targets are IGNORE_INDEX.

    Args:
        tokens: ids [n_tokens] uint16, usually a memory map.
        context_length: number of tokens per window, T.
    """

    def __init__(self, tokens: np.ndarray, context_length: int):
        self.tokens = tokens.view(np.ndarray)  # indexing is slower on a np.memmap
        self.context_length = context_length

    def side_by_side(self) -> range:
        """Return the starts of windows that cover the file without gaps or overlaps.

        Together, these windows predict each token except the first exactly once.
        """
        return range(0, max(0, len(self.tokens) - 1), self.context_length)

    def __getitem__(self, start: int) -> tuple[Tensor, Tensor]:
        """Return one window: inputs and targets, [T] int64."""
        ids, targets = self.__getitems__([start])
        return ids[0], targets[0]

    def __getitems__(self, starts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a batch, gathered in one operation: inputs and targets, [B, T] int64."""
        positions = np.asarray(starts)[:, None] + np.arange(self.context_length + 1)  # [B, T + 1]
        inside = positions < len(self.tokens)
        rows = self.tokens[np.where(inside, positions, 0)].astype(np.int64)
        return _shifted(np.where(inside, rows, 0), np.where(inside, rows, IGNORE_INDEX))


class StoryWindows(TokenWindows):
    """Windows over a token file; each epoch has the stories in a different order.

    Epochs are concatenated: position `epoch * n_tokens + i` is token i of that epoch. The order of
    the stories depends only on their number, the seed and the epoch. The token file is not
    reordered: a table with 16 bytes per story maps positions in an epoch to positions in the file.
    The tables of two epochs are held in memory, because a batch has windows from at most two
    epochs.

    Args:
        tokens: ids [n_tokens] uint16, story₁ EOT ... storyₙ EOT, usually a memory map.
        context_length: number of tokens per window, T. The caller must request only windows that
            lie, with their targets, within one epoch.
        seed: seed of the order, at least 0.
    """

    def __init__(self, tokens: np.ndarray, context_length: int, seed: int):
        super().__init__(tokens, context_length)
        self.seed = seed
        self._starts = story_starts(self.tokens)
        self._table = lru_cache(maxsize=2)(self.epoch_table)

    def __getitems__(self, starts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a batch, gathered in one operation: inputs and targets, [B, T] int64."""
        epochs, firsts = np.divmod(np.asarray(starts), len(self.tokens))
        positions = firsts[:, None] + np.arange(self.context_length + 1)  # [B, T + 1]
        for epoch in np.unique(epochs):
            begins, shifts = self._table(int(epoch))
            rows = epochs == epoch
            stories = np.searchsorted(begins, positions[rows], "right") - 1
            positions[rows] += shifts[stories]
        rows = self.tokens[positions].astype(np.int64)
        return _shifted(rows, rows)

    def epoch_table(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return two arrays [n_stories] that locate the stories, in the order of an epoch.

        Args:
            epoch: number of the epoch, from 0.

        Returns:
            For each story, the position in the epoch at which it starts, and its shift: the number
            to add to a position in the epoch to get the position in the file.
        """
        order = story_permutation(len(self._starts), self.seed, epoch)
        lengths = np.diff(self._starts, append=len(self.tokens))[order]
        begins = np.cumsum(lengths) - lengths
        return begins, self._starts[order] - begins


def _shifted(inputs: np.ndarray, targets: np.ndarray) -> tuple[Tensor, Tensor]:
    """Drop the last column of `inputs` and the first of `targets`: [B, T + 1] -> [B, T]."""
    parts = inputs[:, :-1], targets[:, 1:]
    ids, shifted = (torch.from_numpy(np.ascontiguousarray(part)) for part in parts)
    return ids, shifted


def story_starts(tokens: np.ndarray) -> np.ndarray:
    """Return the position of the first token of each story, [n_stories] int64.

    The tokens are read in chunks, so memory use grows with the number of stories, not of tokens.
    """
    chunks = range(0, len(tokens), _CHUNK)
    ends = [np.flatnonzero(tokens[i : i + _CHUNK] == Tokenizer.end_of_text) + i for i in chunks]
    starts = np.concatenate([[0], *(end + 1 for end in ends)]).astype(np.int64)
    return starts[starts < len(tokens)]


def story_permutation(n_stories: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the stories in an epoch, [n_stories].

    Equal arguments give the same order.
    """
    return np.random.Generator(np.random.PCG64([seed, epoch, 2])).permutation(n_stories)


@lru_cache(maxsize=2)  # a batch contains windows from at most two epochs
def epoch_permutation(n_windows: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the windows in an epoch, [n_windows].

    Equal arguments give the same order.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    order = generator.permutation(n_windows)
    order.setflags(write=False)
    return order


def epoch_offset(context_length: int, seed: int, epoch: int) -> int:
    """Return by how many tokens the windows of an epoch are shifted.

    The offset is 0 for epoch 0. For each later epoch, it is a random number from 0 to
    `context_length` - 1; equal arguments give the same number.
    """
    if epoch == 0:
        return 0
    return int(np.random.default_rng([seed, epoch, 1]).integers(context_length))


class BudgetSampler(Sampler[int]):
    """Sampler that yields the steps of a run; `batch` returns the windows of a step.

    In each epoch, the tokens are cut into windows that follow each other without gaps. The windows
    are read in a random order. They are shuffled even if the stories are shuffled too. If only the
    stories were shuffled, a batch would contain fewer stories, because neighbouring windows often
    share a story. With `random_offset`, the windows start at a random offset in each epoch after
    the first, so the context of a token and its position in the window change.

    The windows of all epochs form one sequence. With B windows per batch and W ranks, batch s of
    rank r has the windows [(s·W + r)·B, (s·W + r + 1)·B) of this sequence. So each batch is full
    (a batch may span two epochs), each window is read once per epoch, and a run can resume at any
    step without reading the batches before that step.

    Args:
        n_tokens: number of tokens in the file.
        context_length: number of tokens per window, T.
        batch_size: number of windows per rank and step, B.
        n_steps: number of steps of the whole run, including those before `start_step`.
        seed: seed of the order, at least 0.
        start_step: step of the first batch to yield.
        rank: rank of this process, from 0.
        world_size: number of ranks, W.
        random_offset: whether windows start at a random offset in each epoch after the first.
        stories: whether the stories are shuffled. With shuffled stories, `batch` returns positions
            that are counted from the start of the first epoch, as in `StoryWindows`. With stories
            in their original order, `batch` returns positions in the token file.

    Raises:
        UserError: there are fewer windows than one step needs.
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
        stories: bool = False,
    ):
        last_offset = context_length - 1 if random_offset else 0
        n_windows = max(0, n_tokens - 1 - last_offset) // context_length  # same in each epoch
        if n_windows < batch_size * world_size:
            largest = n_windows // world_size
            fix = {"data.batch_size": largest} if largest else None
            few = f"the training split has only {n_windows} windows for {world_size} device(s)"
            problem = f"{few}; add text, or reduce model.context_length or this value"
            raise UserError(problem, "data.batch_size", batch_size, fix)
        self.n_windows, self.batch_size, self.seed = n_windows, batch_size, seed
        self.n_steps, self.start_step = n_steps, start_step
        self.rank, self.world_size = rank, world_size
        self.context_length, self.random_offset = context_length, random_offset
        self.epoch_length = n_tokens if stories else 0

    def __len__(self) -> int:
        """Return the number of steps of the whole run.

        In a resumed run, Lightning counts the steps before `start_step` as already loaded.
        """
        return self.n_steps

    def __iter__(self) -> Iterator[int]:
        """Yield the steps from `start_step` to the end of the run."""
        return iter(range(self.start_step, self.n_steps))

    @property
    def n_windows_of_run(self) -> int:
        """Number of windows in the batches of all steps and ranks."""
        return self.n_steps * self.world_size * self.batch_size

    def numbers(self, step: int) -> np.ndarray:
        """Return the numbers of the windows in this rank's batch at `step`, [B].

        The windows of the run are numbered from 0 in the order in which the run reads them.

        Args:
            step: step of the run, from 0.
        """
        first = (step * self.world_size + self.rank) * self.batch_size
        return np.arange(first, first + self.batch_size)

    def batch(self, step: int) -> list[int]:
        """Return the start positions of the windows in this rank's batch at `step`.

        Args:
            step: step of the run, from 0.

        Returns:
            `batch_size` positions. Without `stories`, these are positions in the token file. With
            `stories`, they are counted from the start of the first epoch, as in `StoryWindows`.
        """
        epochs, indices = np.divmod(self.numbers(step), self.n_windows)
        parts = [
            self.starts(int(epoch), indices[epochs == epoch]) + int(epoch) * self.epoch_length
            for epoch in np.unique(epochs)
        ]
        return np.concatenate(parts).tolist()

    def starts(self, epoch: int, indices: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return the start positions of windows in an epoch, in the order of the epoch.

        Args:
            epoch: number of the epoch, from 0.
            indices: numbers of the windows in that order, from 0; the default means all windows.

        Returns:
            One position per window, counted from the start of the epoch.
        """
        order = epoch_permutation(self.n_windows, self.seed, epoch)[indices]
        offset = self.random_offset and epoch_offset(self.context_length, self.seed, epoch)
        return order * self.context_length + offset


class TrainingBatches(Dataset[tuple[Tensor, Tensor]]):
    """Training batches of a run, indexed by step, with random tokens in place of some inputs.

    The targets stay unchanged. The fraction of replaced inputs is constant for 80 % of the run and
    then falls linearly to zero at the end of the run. Chen, Zhang and Wang (2026, arXiv 2606.16246)
    compare random replacement with other augmentations for training on repeated text.

    Args:
        windows: windows of the training split.
        order: sampler that selects the windows of each step.
        noise: fraction of the input tokens to replace in the first 80 % of the run, from 0 to below
            1. END_OF_TEXT is never replaced.
        vocab_size: number of tokens of the tokenizer. The random tokens are uniformly distributed
            over the vocabulary without END_OF_TEXT.
    """

    def __init__(self, windows: TokenWindows, order: BudgetSampler, noise: float, vocab_size: int):
        self.windows, self.order = windows, order
        self.noise, self.vocab_size = noise, vocab_size

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the batch of a step: inputs and targets, [B, T] int64."""
        ids, targets = self.windows.__getitems__(self.order.batch(step))
        if self.noise:
            ids = with_noise(ids, torch.from_numpy(self.random_tokens(step)))
        return ids, targets

    def random_tokens(self, step: int) -> np.ndarray:
        """Return the random token for each input of a step, [B, T] int64; 0 keeps the input.

        Args:
            step: step of the run, from 0.
        """
        numbers = self.order.numbers(step)
        fraction = self.noise * noise_factor(numbers / self.order.n_windows_of_run)[:, None]
        size = len(numbers), self.windows.context_length
        bits = noise_bits(self.order.seed, int(numbers[0]), *size)
        random = 1 + ((bits & 0xFFFFFFFF) * (self.vocab_size - 1) >> 32)  # every id except 0
        return np.where(bits >> 32 < fraction * 2**32, random.astype(np.int64), 0)


def with_noise(ids: Tensor, random_tokens: Tensor) -> Tensor:
    """Return a copy of `ids` [B, T] in which some ids are replaced by `random_tokens` [B, T].

    An id is kept if it is END_OF_TEXT, or if the random token at its position is 0.
    """
    replaced = (random_tokens != 0) & (ids != Tokenizer.end_of_text)
    return torch.where(replaced, random_tokens, ids)


def noise_factor(progress: np.ndarray) -> np.ndarray:
    """Return the noise as a fraction of the initial noise.

    `progress` is the part of the run that is complete, from 0 to below 1.
    """
    return np.minimum(1, (1 - progress) / (1 - _CONSTANT_NOISE))


def noise_bits(seed: int, first: int, n_windows: int, context_length: int) -> np.ndarray:
    """Return 64 random bits for each token of consecutive windows, [n_windows, T] uint64.

    The bits of a window depend only on the seed and the number of the window in the run, so they
    are the same for any batch size and any number of ranks. They come from the counter-based
    generator Philox4x64 (Salmon et al. 2011, doi 10.1145/2063384.2063405).

    Args:
        seed: seed of the run, at least 0.
        first: number of the first of these windows, counted from 0 at the start of the run.
        n_windows: number of windows.
        context_length: number of tokens per window, T.
    """
    n_counters = -(-context_length // 4)  # per window; each counter value gives four numbers
    philox = np.random.Philox(key=[seed, 3], counter=first * n_counters)
    bits = philox.random_raw(4 * n_counters * n_windows).reshape(n_windows, -1)
    return bits[:, :context_length]
