"""Training batches that are gathered on the device, so that no step waits for a copy."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from minigpt.core.hardware import to_device
from minigpt.data.windows import StoryWindows, TrainingBatches, with_noise


class DeviceBatches(Dataset[tuple[Tensor, Tensor]]):
    """The same batches as in `TrainingBatches`, bit for bit, but gathered on a device.

    The device holds all tokens of the training split, 2 bytes each. For at most two epochs, it also
    holds the order of the windows and, if the stories are shuffled, of the stories. The order of an
    epoch is copied when the epoch starts. If the setting `data.noise` replaces input tokens by
    random ones, the random tokens of each step are drawn on the host and copied. The host waits
    only for the copy of the training split, at the start.

    Args:
        batches: the batches to gather.
        device: the device, such as `torch.device("cuda")`.
    """

    def __init__(self, batches: TrainingBatches, device: torch.device):
        self.batches, self.device = batches, device
        # PyTorch can index int16, but not uint16. The array is copied once, so it is not pinned.
        self._tokens = torch.from_numpy(np.array(batches.windows.tokens).view(np.int16)).to(device)
        self._window = torch.arange(batches.windows.context_length + 1, device=device)
        self._epoch = lru_cache(maxsize=2)(self._epoch_order)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and the targets of a step, each [B, T] int64, on the device."""
        order, parts = self.batches.order, list[Tensor]()
        first = int(order.numbers(step)[0])
        end = first + order.batch_size
        while first < end:  # a batch may span two epochs
            epoch, i = divmod(first, order.n_windows)
            j = min(i + end - first, order.n_windows)
            parts.append(self._positions(epoch, i, j))
            first += j - i
        rows = self._tokens[torch.cat(parts)].long() & 0xFFFF  # [B, T + 1]
        ids, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        if self.batches.noise:
            ids = with_noise(ids, self._upload(self.batches.random_tokens(step)))
        return ids, targets

    def _positions(self, epoch: int, i: int, j: int) -> Tensor:
        """Return where the tokens of windows i to j - 1 of an epoch are in the token file.

        Returns:
            Positions [j - i, T + 1]; the inputs and targets of a window together have T + 1 tokens.
        """
        starts, table = self._epoch(epoch)
        positions = starts[i:j, None] + self._window
        if table is None:
            return positions
        begins, shifts = table
        stories = torch.searchsorted(begins, positions, right=True) - 1
        return positions + shifts[stories]

    def _epoch_order(self, epoch: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the starts of an epoch's windows [n_windows], and the epoch's table of stories.

        The table is that of `StoryWindows.epoch_table`, or None if the stories are not shuffled.
        """
        starts, windows = self._upload(self.batches.order.starts(epoch)), self.batches.windows
        if not isinstance(windows, StoryWindows):
            return starts, None
        begins, shifts = windows.epoch_table(epoch)
        return starts, (self._upload(begins), self._upload(shifts))

    def _upload(self, array: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(array), self.device)
