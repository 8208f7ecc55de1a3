"""The bundled stories: how many there are, and that training does not leak into validation."""

import lzma
import re
from importlib.resources import files

import numpy as np
import pytest

from minigpt.data.sources import bundled_sample

RUN = 13  # words
QUOTES = str.maketrans(dict.fromkeys("“”„«»", '"') | dict.fromkeys("‘’‚`´", "'"))


def normalised(story: str) -> str:
    """Return a story in lower case, with single spaces and plain quotation marks."""
    return " ".join(story.casefold().translate(QUOTES).split())


@pytest.fixture(scope="module")
def stories() -> dict[str, list[str]]:
    folder = files("minigpt") / "data" / "tinystories"
    return {
        name: lzma.decompress((folder / f"{name}.txt.xz").read_bytes())
        .decode()
        .removesuffix("\n<|endoftext|>\n")
        .split("\n<|endoftext|>\n")
        for name in ("train", "valid", "valid_v1")
    }


def test_bundled_sample_is_whole(stories):
    sizes = {name: len(group) for name, group in stories.items()}
    assert sizes == {"train": 39_927, "valid": 3_000, "valid_v1": 3_000}
    assert list(bundled_sample().stories("train")) == stories["train"]
    assert list(bundled_sample().stories("valid")) == stories["valid"]
    assert list(bundled_sample("v1").stories("valid")) == stories["valid_v1"]
    assert sum(map(len, map(str.encode, stories["train"]))) == 31_540_367
    texts = [story for group in stories.values() for story in group]
    assert not any(re.search(r"endoftext|\r|\ufffd|\n\n", story) for story in texts)


def test_no_training_story_equals_another_or_a_validation_story(stories):
    texts = [normalised(story) for group in stories.values() for story in group]
    assert len(set(texts)) == 39_927 + 3_000 + 3_000


def test_no_training_story_shares_a_quarter_of_its_runs_with_a_validation_story(stories):
    numbers: dict[str, int] = {}
    train = runs_of(stories["train"], numbers)
    valid = runs_of(stories["valid"] + stories["valid_v1"], numbers)
    shared, largest = shares(train, valid, len(stories["train"]))
    assert 0 < largest <= shared.max() <= 0.25
    # copies with every 40th word replaced, which the limit must catch
    copies = [
        " ".join(word if i % 40 else "[other]" for i, word in enumerate(story.split()))
        for story in stories["valid"][:50]
    ]
    shared, largest = shares(runs_of(copies, numbers), valid, len(copies))
    assert largest > 0.25


Runs = tuple[np.ndarray, np.ndarray]  # hashes of runs, and the index of the story of each


def runs_of(stories: list[str], numbers: dict[str, int]) -> Runs:
    """Return all runs of 13 words of all stories; `numbers` grows by the words that are new."""
    words = [normalised(story).split() for story in stories]
    lengths = np.array([len(group) for group in words])
    ids = [numbers.setdefault(word, len(numbers)) for group in words for word in group]
    index = np.repeat(np.arange(len(words)), lengths)
    # a word has the same random number in each call
    mixed = np.random.default_rng(0).integers(0, 2**63, 1 << 18, dtype=np.uint64)[ids]
    n = len(ids) - RUN + 1
    hashes = np.zeros(n, np.uint64)
    for offset in range(RUN):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + mixed[offset : offset + n]
    inside = index[:n] == index[RUN - 1 :]
    return hashes[inside], index[:n][inside]


def shares(train: Runs, valid: Runs, n_train: int) -> tuple[np.ndarray, float]:
    """Return how much of each training story is in any validation story, and the most in one."""
    hashes, story = train
    total = np.maximum(1, np.bincount(story, minlength=n_train))
    order = np.lexsort(valid[::-1])
    known, owner = valid[0][order], valid[1][order]
    distinct = np.append(True, (np.diff(known) != 0) | (np.diff(owner) != 0))
    known, owner = known[distinct], owner[distinct]
    low = np.zeros(1 << 24, bool)  # whether a run can be among the known ones: far fewer searches
    low[known % len(low)] = True
    candidates = low[hashes % len(low)]
    hashes, story = hashes[candidates], story[candidates]
    first = np.searchsorted(known, hashes)
    shared = known[np.minimum(first, len(known) - 1)] == hashes
    hashes, story, first = hashes[shared], story[shared], first[shared]
    n = np.searchsorted(known, hashes, "right") - first  # validation stories with this run
    matches = np.repeat(np.arange(len(n)), n)
    nth = np.arange(len(matches)) - np.repeat(np.cumsum(n) - n, n)
    both, counts = np.unique(
        story[matches] * 10_000 + owner[first[matches] + nth], return_counts=True
    )
    return np.bincount(story, minlength=n_train) / total, (counts / total[both // 10_000]).max()
