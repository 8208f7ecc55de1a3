"""Loss of a model by class of token: frequency, position, names, speech and punctuation.

>>> texts = scored_texts(bundled_sample().stories("valid"), tokenizer, 60, 256, counts)
>>> class_losses(net, texts)["first mention of a name"]  # nats per token
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from minigpt.analysis.coherence import BATCH, NAME
from minigpt.kernels.choice import sequences_at_once
from minigpt.model import GPT, IGNORE_INDEX
from minigpt.tokenizer import Tokenizer

FREQUENT, KNOWN = 100, 1000  # ranks by frequency that divide the vocabulary into three bands
BANDS = ("100 most frequent tokens", "tokens of rank 101 to 1,000", "rarer tokens")
POSITIONS = ("tokens 1 to 16", "tokens 17 to 64", "tokens after 64")
NAMES = ("first mention of a name", "later mention of a name")
SPEECH, PUNCTUATION = "speech in quotes", "punctuation"
CLASSES = (*BANDS, *POSITIONS, *NAMES, SPEECH, PUNCTUATION)
_SPEECH = re.compile(r"\"[^\"]*\"|“[^”]*”")


@dataclass(frozen=True)
class ScoredText:
    """A story as token ids, and the classes of each token."""

    ids: tuple[int, ...]  # an end-of-text token, then the T tokens of the story
    classes: tuple[frozenset[str], ...]  # T sets


def token_counts(stories: Iterable[str], tokenizer: Tokenizer) -> Counter[int]:
    """Return how often each token occurs in `stories`."""
    counts: Counter[int] = Counter()
    for story in stories:
        counts.update(tokenizer.encode(story))
    return counts


def scored_texts(
    stories: Iterable[str], tokenizer: Tokenizer, n: int, context: int, counts: Mapping[int, int]
) -> list[ScoredText]:
    """Return up to `n` stories, cut at the context length, with the classes of their tokens.

    These are the first `n` stories in which each character belongs to a single token. A token with
    only a part of a character could not be located in the text.

    Args:
        stories: the stories.
        tokenizer: tokenizer of the model.
        n: maximum number of stories.
        context: context length of the model, in tokens.
        counts: number of occurrences of each token in the training stories.
    """
    ranked = sorted(counts, key=lambda i: (-counts[i], i))
    rank = {token: position for position, token in enumerate(ranked)}
    texts: list[ScoredText] = []
    for story in stories:
        ids = tokenizer.encode(story)[:context]
        pieces = [tokenizer.token(i) for i in ids]
        if story.startswith("".join(pieces)):
            classes = zip(_by_rank(ids, rank), _by_text(story, pieces), strict=True)
            united = tuple(frozenset({band, *others}) for band, others in classes)
            texts.append(ScoredText((tokenizer.end_of_text, *ids), united))
        if len(texts) == n:
            break
    return texts


def _by_rank(ids: Sequence[int], rank: Mapping[int, int]) -> list[str]:
    limits = (FREQUENT, KNOWN)
    return [BANDS[sum(rank.get(i, KNOWN) >= limit for limit in limits)] for i in ids]


def _by_text(story: str, pieces: Sequence[str]) -> list[set[str]]:
    """Return the classes of each token, except its frequency class, as one set per token."""
    names = []
    for match in NAME.finditer(story):
        earlier = re.search(rf"\b{match[0]}\b", story[: match.start()])  # anywhere in a sentence
        names.append((match.span(), NAMES[earlier is not None]))
    spans = [(match.span(), SPEECH) for match in _SPEECH.finditer(story)] + names
    classes, start = [], 0
    for i, piece in enumerate(pieces):
        end = start + len(piece)
        first = start + len(piece) - len(piece.lstrip())  # without the space before the word
        own = {POSITIONS[(i >= 16) + (i >= 64)]}
        own |= {name for (begin, stop), name in spans if begin < end and first < stop}
        if piece.strip() and not any(character.isalnum() for character in piece):
            own.add(PUNCTUATION)
        classes.append(own)
        start = end
    return classes


@torch.inference_mode()
def class_losses(net: GPT, texts: Sequence[ScoredText]) -> dict[str, float | None]:
    """Return the mean loss of each class of tokens, in nats per token.

    Args:
        net: the model.
        texts: the stories; each may have at most one id more than the context length.

    Returns:
        Losses by name of the class, and one more loss, "all tokens". The loss of a class without
        tokens is None.
    """
    losses: dict[str, list[float]] = {name: [] for name in ("all tokens", *CLASSES)}
    device, size = net.embedding.weight.device, sequences_at_once(net, on_cpu=BATCH)
    for first in range(0, len(texts), size):
        batch = texts[first : first + size]
        ids = [torch.tensor(text.ids, device=device) for text in batch]
        inputs = pad_sequence([row[:-1] for row in ids], batch_first=True)
        targets = pad_sequence([row[1:] for row in ids], True, IGNORE_INDEX)
        nats = F.cross_entropy(
            net(inputs).float().flatten(0, 1), targets.flatten(), reduction="none"
        )
        for text, row in zip(batch, nats.view_as(targets).tolist(), strict=True):
            for own, loss in zip(text.classes, row, strict=False):  # the rest is padding
                for name in ("all tokens", *own):
                    losses[name].append(loss)
    return {name: fmean(values) if values else None for name, values in losses.items()}
