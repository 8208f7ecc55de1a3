import dataclasses
import itertools
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.core.settings import UserError
from minigpt.data import windows as windows_module
from minigpt.data.config import DataConfig
from minigpt.data.datamodule import DataModule
from minigpt.data.windows import (
    BudgetSampler,
    StoryWindows,
    TokenWindows,
    epoch_offset,
    epoch_permutation,
    noise_bits,
    story_permutation,
    story_starts,
)
from minigpt.model import IGNORE_INDEX
from tests.conftest import naming


def batches_of(sampler: BudgetSampler) -> list[list[int]]:
    return [sampler.batch(step) for step in sampler]


# ---------------------------------------------------------------------------- windows


def test_targets_are_the_inputs_one_token_ahead():
    windows = TokenWindows(np.arange(100, dtype=np.uint16), 8)
    ids, targets = windows.__getitems__([24, 0, 91])
    assert ids.shape == targets.shape == (3, 8)
    assert ids.dtype == targets.dtype == torch.int64
    assert ids.is_contiguous()
    assert targets.is_contiguous()
    assert ids[0].tolist() == list(range(24, 32))
    assert torch.equal(targets, ids + 1)
    assert torch.equal(windows[91][0], ids[2])


@given(st.integers(1, 60), st.integers(1, 20))
def test_adjacent_windows_predict_every_token_but_the_first_once(n_tokens, context_length):
    tokens = np.arange(1000, 1000 + n_tokens, dtype=np.uint16)
    windows = TokenWindows(tokens, context_length)
    predicted: list[int] = []
    for ids, targets in (windows[start] for start in windows.side_by_side()):
        known = targets != IGNORE_INDEX
        assert torch.equal(ids[known], targets[known] - 1)
        assert known.any()
        predicted += targets[known].tolist()
    assert predicted == tokens[1:].tolist()


def test_past_the_end_there_is_end_of_text_and_no_target():
    windows = TokenWindows(np.array([5, 6, 7, 8, 9, 10], dtype=np.uint16), 4)
    ids, targets = windows.__getitems__([0, 4, 8])
    assert ids.tolist() == [[5, 6, 7, 8], [9, 10, 0, 0], [0, 0, 0, 0]]
    assert targets.tolist() == [[6, 7, 8, 9], [10, -100, -100, -100], [-100] * 4]


def test_ids_above_32767_stay_positive():
    windows = TokenWindows(np.array([65_535, 40_000, 1], dtype=np.uint16), 2)
    assert windows[0][0].tolist() == [65_535, 40_000]


# ---------------------------------------------------------------------------- shuffled stories


def stream(lengths: list[int]) -> np.ndarray:
    """Stories of `lengths` tokens, end of text included, whose other ids are all different."""
    ids = np.arange(1, sum(lengths) + 1, dtype=np.uint16)
    ids[np.cumsum(lengths) - 1] = 0
    return ids


def shuffled(tokens: np.ndarray, seed: int, epoch: int) -> list[int]:
    """The stream of an epoch, put together story by story."""
    stories = np.split(tokens, np.flatnonzero(tokens == 0)[:-1] + 1)
    return np.concatenate(
        [stories[i] for i in story_permutation(len(stories), seed, epoch)]
    ).tolist()


lengths_of_stories = st.lists(st.integers(1, 12), min_size=1, max_size=20)


@given(lengths_of_stories, st.integers(1, 5))
def test_story_starts_are_found_across_chunks(lengths, chunk):
    tokens = stream(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows_module, "_CHUNK", chunk)
        assert story_starts(tokens).tolist() == [0, *np.cumsum(lengths)[:-1]]
    assert story_starts(np.append(tokens, np.uint16(7))).tolist() == [0, *np.cumsum(lengths)]


@given(lengths_of_stories, st.integers(1, 8), st.integers(0, 3), st.integers(0, 3))
def test_story_windows_are_windows_of_the_permuted_stream(lengths, context_length, seed, epoch):
    tokens = stream(lengths)
    n_windows = (len(tokens) - 1) // context_length
    windows = StoryWindows(tokens, context_length, seed)
    starts = [epoch * len(tokens) + i * context_length for i in range(n_windows)]
    if not starts:
        return
    permuted = torch.tensor(shuffled(tokens, seed, epoch))
    ids, targets = windows.__getitems__(starts)
    assert ids.dtype == targets.dtype == torch.int64
    assert ids.flatten().tolist() == permuted[: n_windows * context_length].tolist()
    assert targets.flatten().tolist() == permuted[1 : n_windows * context_length + 1].tolist()


def test_story_order_is_a_function_of_seed_and_epoch_with_another_for_each():
    orders = {tuple(story_permutation(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert story_permutation(8, seed=1, epoch=0).tolist() == [7, 3, 1, 5, 2, 0, 6, 4]


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=8, max_size=20),
    world_size=st.integers(1, 3),
    random_offset=st.booleans(),
)
def test_story_shuffle_reads_each_token_once_an_epoch_across_ranks(
    lengths, world_size, random_offset
):
    tokens = stream([*lengths, 40])
    shape = len(tokens), 4, 2
    n_windows = (len(tokens) - 1 - 3 * random_offset) // 4
    n_steps = 4 * n_windows // (2 * world_size)
    ranks = [
        BudgetSampler(*shape, n_steps, 1, 0, rank, world_size, random_offset, stories=True)
        for rank in range(world_size)
    ]
    steps = zip(*map(batches_of, ranks), strict=True)
    starts = [start for step in steps for batch in step for start in batch]
    # one StoryWindows a rank in a real run, equal by (seed, epoch)
    ids, _ = StoryWindows(tokens, 4, 1).__getitems__(starts)
    for epoch in range(len(ids) // n_windows):
        offset = epoch_offset(4, 1, epoch) if random_offset else 0
        expected = shuffled(tokens, 1, epoch)[offset : offset + 4 * n_windows]
        read = ids[epoch * n_windows : (epoch + 1) * n_windows].flatten().tolist()
        assert sorted(read) == sorted(expected)


def test_story_shuffle_of_one_story_reads_it_as_window_shuffle_does():
    book = stream([101])
    args = 101, 10, 2, 20, 3
    starts = batches_of(BudgetSampler(*args, random_offset=True))
    positions = batches_of(BudgetSampler(*args, random_offset=True, stories=True))
    plain, windows = TokenWindows(book, 10), StoryWindows(book, 10, 3)
    for batch, shifted in zip(starts, positions, strict=True):
        assert all(map(torch.equal, plain.__getitems__(batch), windows.__getitems__(shifted)))


def test_story_windows_keep_the_tables_of_two_epochs_at_most():
    tokens = stream([5] * 20)
    windows = StoryWindows(tokens, 4, 1)
    for epoch in range(6):
        windows.__getitems__([epoch * 100, max(0, epoch - 1) * 100])
    info = windows._table.cache_info()
    assert (info.misses, info.currsize) == (6, 2)


# ---------------------------------------------------------------------------- the training order


def sampler(n_windows: int, *args, **kwargs) -> BudgetSampler:
    """Over windows of one token, which start at 0, 1, ..., n_windows - 1."""
    return BudgetSampler(n_windows + 1, 1, *args, **kwargs)


@settings(deadline=None)
@given(
    n_windows=st.integers(12, 40),
    batch_size=st.integers(1, 4),
    world_size=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_ranks_read_every_window_once_an_epoch(n_windows, batch_size, world_size, seed):
    n_steps = 3 * n_windows // (batch_size * world_size)
    ranks = [
        sampler(n_windows, batch_size, n_steps, seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    batches = [batch for step in zip(*map(batches_of, ranks), strict=True) for batch in step]
    assert {len(batch) for batch in batches} == {batch_size}
    order = list(itertools.chain.from_iterable(batches))
    for epoch in range(len(order) // n_windows):
        part = order[epoch * n_windows : (epoch + 1) * n_windows]
        assert sorted(part) == list(range(n_windows))
        assert part == epoch_permutation(n_windows, seed, epoch).tolist()


def test_each_epoch_and_each_seed_has_its_own_order():
    orders = {tuple(epoch_permutation(100, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_order_is_the_same_on_every_machine():
    assert epoch_permutation(8, seed=1, epoch=0).tolist() == [5, 0, 1, 4, 2, 6, 3, 7]


def test_random_offset_moves_the_windows_of_each_epoch_without_overlap():
    # 7 windows of 4 in 33 tokens, at most 3 of which an offset can leave out
    first_seed = BudgetSampler(33, 4, 7, n_steps=20, seed=1, random_offset=True)
    epochs = [sorted(starts) for starts in batches_of(first_seed)]
    offsets = [starts[0] for starts in epochs]
    assert offsets[0] == 0
    assert set(offsets) == {0, 1, 2, 3}
    for offset, starts in zip(offsets, epochs, strict=True):
        assert starts == list(range(offset, offset + 28, 4))
    assert offsets == [epoch_offset(4, seed=1, epoch=epoch) for epoch in range(20)]
    other_seed = BudgetSampler(33, 4, 7, n_steps=20, seed=2, random_offset=True)
    assert offsets != [min(starts) for starts in batches_of(other_seed)]


@pytest.mark.parametrize("start_step", [0, 1, 7, 49, 50])
def test_start_step_skips_the_steps_before(start_step):
    whole = batches_of(sampler(10, 4, 50, seed=3))
    assert len(whole) == 50
    rest = sampler(10, 4, 50, seed=3, start_step=start_step)
    assert batches_of(rest) == whole[start_step:]


def test_too_few_windows_for_a_batch_names_the_largest_batch():
    sampler(32, 32, 1, seed=0)
    with pytest.raises(UserError, match=r"data\.batch_size=32\b.*\b12\b.*data\.batch_size=12\b"):
        sampler(12, 32, 1, seed=0)
    with pytest.raises(UserError, match=naming("31", "8", "4", "data.batch_size=7")):
        sampler(31, 8, 1, seed=0, world_size=4)
    with pytest.raises(UserError, match=naming("0", "8", "model.context_length")):
        sampler(0, 8, 1, seed=0)


# ---------------------------------------------------------------------------- data module


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("data")
    for split, n in (("train", 400), ("valid", 60)):
        stories = (f"Story {k} for {split}: the dog sat." for k in range(n))
        (folder / f"{split}.txt").write_text("<|endoftext|>".join(stories), encoding="utf-8")
    return DataConfig(
        source="text",
        train_files=(str(folder / "train.txt"),),
        valid_files=(str(folder / "valid.txt"),),
        vocab_size=300,
        batch_size=4,
        cache_dir=str(folder / "cache"),
    )


def data_module(config: DataConfig, n_steps: int = 20, start_step: int = 0) -> DataModule:
    data = DataModule(config, 16, n_steps, seed=1, start_step=start_step)
    data.prepare_data()
    data.setup("fit")
    return data


def test_failed_preparation_is_not_taken_for_ready(config, tmp_path):
    (tmp_path / "file").write_text("")
    broken = dataclasses.replace(config, cache_dir=str(tmp_path / "file/cache"))
    data = DataModule(broken, 16, n_steps=2, seed=1)
    for _ in range(2):
        with pytest.raises(UserError, match=naming("data.cache_dir")):
            data.setup()


def test_validation_loader_reads_its_whole_split_in_order_and_no_other(config):
    data = data_module(config)
    targets = torch.cat([targets.flatten() for _, targets in data.val_dataloader()])
    known = targets[targets != IGNORE_INDEX]
    assert known.tolist() == data.valid.array()[1:].tolist()
    text = data.tokenizer.decode(known.tolist())
    assert text.count("for valid") == 60
    assert "for train" not in text


def test_training_loader_has_full_batches_for_the_whole_run(config):
    config = dataclasses.replace(config, shuffle="windows")
    data = data_module(config, n_steps=2000)  # several epochs
    batches = list(data.train_dataloader())
    assert len(batches) == 2000
    assert {batch.shape for pair in batches for batch in pair} == {(4, 16)}
    stream = data.train.array()
    assert all(torch.equal(ids[:, 1:], targets[:, :-1]) for ids, targets in batches)
    n_windows = (len(stream) - 1) // 16
    first_epoch = torch.cat([ids for ids, _ in batches])[: n_windows - 1]
    known = {tuple(stream[start : start + 16]) for start in range(0, n_windows * 16, 16)}
    assert {tuple(row) for row in first_epoch.tolist()} <= known


def noisy_batches(
    config: DataConfig, n_steps: int, noise: float = 0.3, rank: int = 0, world_size: int = 1
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    data = data_module(dataclasses.replace(config, noise=noise), n_steps)
    data.trainer = FakeTrainer(rank, world_size)  # type: ignore[assignment]
    return list(data.train_dataloader())


def test_noise_replaces_its_share_of_inputs_by_random_tokens_and_no_target(config):
    clean, noisy = noisy_batches(config, 1000, noise=0.0), noisy_batches(config, 1000)
    replaced, tokens, positions = [], [], []
    for (ids, targets), (random, same) in zip(clean, noisy, strict=True):
        assert torch.equal(targets, same)
        assert random[ids == 0].eq(0).all()  # END_OF_TEXT
        changed = random != ids
        replaced.append(changed.sum() / ids.ne(0).sum())
        tokens.append(random[changed])
        positions.append(changed.float().mean(0))
    share = torch.stack(replaced)
    # A 299th of the random tokens equals the token that it replaces.
    assert share[:800].mean() == pytest.approx(0.3 * 298 / 299, rel=0.02)
    assert share[800:900].mean() == pytest.approx(0.225, rel=0.1)
    assert share[900:].mean() == pytest.approx(0.075, rel=0.1)
    assert share[-5:].mean() < 0.01
    counts = torch.cat(tokens).bincount(minlength=300)
    assert counts[0] == 0
    assert 0.5 < counts[1:].min() / counts[1:].float().mean() < 1
    assert counts.max() < 1.5 * counts[1:].float().mean()
    assert (torch.stack(positions)[:800].mean(0) / 0.28).sub(1).abs().max() < 0.1


def test_noise_is_a_function_of_the_seed_and_the_number_of_the_window(config):
    whole = noisy_batches(config, 60)
    single = noisy_batches(dataclasses.replace(config, batch_size=1), 240)
    ranks = [noisy_batches(config, 30, rank=rank, world_size=2) for rank in range(2)]
    assert torch.equal(windows_of(whole), windows_of(single))
    targets = [torch.cat([targets for _, targets in batches]) for batches in (whole, single)]
    assert torch.equal(*targets)
    assert torch.equal(
        windows_of(whole), windows_of([b for step in zip(*ranks, strict=True) for b in step])
    )
    assert len({tuple(noise_bits(seed, n, 1, 6)[0]) for seed in range(9) for n in range(9)}) == 81
    assert noise_bits(1, 0, 3, 6)[1:].tolist() == noise_bits(1, 1, 2, 6).tolist()


def windows_of(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([ids for ids, _ in batches])


def test_noise_spares_the_validation_split(config):
    plain, noisy = data_module(config), data_module(dataclasses.replace(config, noise=0.5))
    pairs = zip(plain.val_dataloader(), noisy.val_dataloader(), strict=True)
    assert all(torch.equal(a[0], b[0]) for a, b in pairs)


class FakeTrainer:
    strategy = SimpleNamespace(root_device=torch.device("cpu"))

    def __init__(self, rank: int, world_size: int):
        self.global_rank, self.world_size = rank, world_size


@pytest.mark.parametrize(
    ("device", "batch", "length", "windows"),
    [
        ("cpu", 4, 8, 4), ("cuda", 4, 256, 128), ("cuda", 160, 256, 160), ("cuda", 4, 1024, 32),
        ("cuda", 4, 100_000, 4),
    ],
)  # fmt: skip
def test_validation_batches_are_larger_on_a_gpu(config, device, batch, length, windows):
    data = data_module(dataclasses.replace(config, batch_size=batch))
    data.context_length = length
    trainer = FakeTrainer(0, 1)
    trainer.strategy = SimpleNamespace(root_device=torch.device(device))
    data.trainer = trainer  # type: ignore[assignment]
    assert data.val_dataloader().batch_size == windows
    assert data.validation_windows(device) == windows


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_validation_windows_without_repeats(config, world_size):
    data = data_module(config)
    alone = torch.cat([targets for _, targets in data.val_dataloader()])
    assert len(alone) % 3  # so that some rank of three has a window of no token
    shares = []
    for rank in range(world_size):
        data.trainer = FakeTrainer(rank, world_size)  # type: ignore[assignment]
        shares.append(torch.cat([targets for _, targets in data.val_dataloader()]))
    assert len({len(share) for share in shares}) == 1
    for rank, share in enumerate(shares):
        mine = alone[rank::world_size]
        assert torch.equal(share[: len(mine)], mine)
        assert (share[len(mine) :] == IGNORE_INDEX).all()


class Recorder(L.LightningModule):
    """Trains nothing, and records each batch with its step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.global_step, batch[0].flatten().tolist()))
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(L.Callback):
    def __init__(self, step: int, path: str):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*your dataloader is not resumable",  # it is: start_step
    "ignore:.*LeafSpec",  # within Lightning
)
@pytest.mark.parametrize(("shuffle", "noise"), [("stories", 0), ("windows", 0), ("stories", 0.5)])
@pytest.mark.parametrize("stopped_at", [7, 113])
def test_resumed_run_reads_exactly_the_remaining_batches(
    config, tmp_path, stopped_at, shuffle, noise
):
    n_steps = stopped_at + 13  # 113: in the second epoch
    config = dataclasses.replace(config, shuffle=shuffle, noise=noise)

    def fit(start_step: int, resume: str | None = None) -> Recorder:
        trainer = L.Trainer(
            max_steps=n_steps,
            max_epochs=-1,
            val_check_interval=5,
            check_val_every_n_epoch=None,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[SaveAt(stopped_at, checkpoint)],
        )
        module = Recorder()
        data = DataModule(config, 16, n_steps, seed=1, start_step=start_step)
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        return module

    checkpoint = str(tmp_path / "stopped.ckpt")
    whole = fit(0)
    rest = fit(stopped_at, resume=checkpoint)
    assert len(whole.seen) == n_steps
    assert rest.seen == whole.seen[stopped_at:]
