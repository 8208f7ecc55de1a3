"""Batches that are gathered on a device equal those of the host bit for bit."""

import numpy as np
import pytest
import torch

from minigpt.data.device import DeviceBatches
from minigpt.data.windows import BudgetSampler, StoryWindows, TokenWindows, TrainingBatches
from tests.syncs import SyncCounter

LENGTH, VOCAB_SIZE = 7, 60_000  # ids above 32767 do not fit into int16


def training_batches(stories: bool, random_offset: bool, noise: float, rank: int = 0):
    tokens = np.random.default_rng(0).integers(1, VOCAB_SIZE, 500).astype(np.uint16)
    tokens[9::10] = 0  # END_OF_TEXT of 50 stories
    order = BudgetSampler(
        len(tokens), LENGTH, batch_size=3, n_steps=60, seed=5, rank=rank, world_size=2,
        random_offset=random_offset, stories=stories,
    )  # fmt: skip
    windows = StoryWindows(tokens, LENGTH, 5) if stories else TokenWindows(tokens, LENGTH)
    return TrainingBatches(windows, order, noise, VOCAB_SIZE)


@pytest.mark.parametrize("stories", [False, True])
@pytest.mark.parametrize("random_offset", [False, True])
@pytest.mark.parametrize(("noise", "rank"), [(0.0, 0), (0.4, 1)])
def test_batches_of_a_device_are_those_of_the_host_over_several_epochs(
    stories, random_offset, noise, rank
):
    batches = training_batches(stories, random_offset, noise, rank)
    on_device = DeviceBatches(batches, torch.device("cpu"))
    for step in [*range(60), 3]:
        for actual, expected in zip(on_device[step], batches[step], strict=True):
            assert actual.dtype == torch.int64
            assert actual.is_contiguous()
            assert torch.equal(actual, expected), step


def test_batches_of_a_device_are_gathered_without_a_copy_to_the_host():
    on_device = DeviceBatches(training_batches(True, True, 0.4), torch.device("cpu"))
    with SyncCounter() as syncs:
        for step in range(60):
            on_device[step]
    assert syncs.names == []
