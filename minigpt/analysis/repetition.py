"""Measure how much stories repeat themselves and how much they copy from training stories."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NGram = tuple[str, ...]
COPIED = 4  # number of consecutive words that count as a repetition or a copy
NOVELTY_STORIES = 40_000  # maximum number of training stories to search for copies, which takes 5 s


@dataclass(frozen=True)
class Repetition:
    """Measures of word n-grams in a group of texts; a fraction is None if there are no n-grams.

    The fraction of distinct n-grams is the measure distinct-n of Li et al. 2016, arXiv:1510.03055.
    """

    words: float  # mean number of words per text
    distinct: tuple[float | None, ...]  # fraction of distinct 1-, 2- and 3-grams
    repeated: float | None  # fraction of 4-grams that occurred earlier in the same text
    novel: float | None  # fraction of 4-grams that no training story has; None without such stories


def measure(
    groups: Sequence[Sequence[str]], training: Iterable[str]
) -> tuple[list[Repetition], int]:
    """Measure repetition and novelty in groups of texts.

    Args:
        groups: the texts of each group, such as the stories of one model.
        training: training stories. They are read one by one and need not fit into memory.

    Returns:
        A `Repetition` for each group, and the number of training stories.
    """
    words = [[split_words(text) for text in group] for group in groups]
    texts = [[ngrams(text, COPIED) for text in group] for group in words]
    unseen, n_training = {gram for group in texts for text in group for gram in text}, 0
    for story in training:
        unseen.difference_update(ngrams(split_words(story), COPIED))
        n_training += 1
    results = []
    for texts_of_words, copied in zip(words, texts, strict=True):
        pools = [[gram for text in texts_of_words for gram in ngrams(text, n)] for n in (1, 2, 3)]
        total = sum(map(len, copied))
        novel = sum(gram in unseen for text in copied for gram in text)
        results.append(
            Repetition(
                words=sum(map(len, texts_of_words)) / max(1, len(texts_of_words)),
                distinct=tuple(_share(len(set(pool)), len(pool)) for pool in pools),
                repeated=_share(sum(len(text) - len(set(text)) for text in copied), total),
                novel=_share(novel, total) if n_training else None,
            )
        )
    return results, n_training


def split_words(text: str) -> list[str]:
    """Return the words of `text` in lower case, without punctuation."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def ngrams(words: list[str], n: int) -> list[NGram]:
    """Return all n-grams of `words`, in order."""
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
