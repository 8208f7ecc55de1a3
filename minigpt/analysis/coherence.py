"""Heuristics for coherence: whether the names in a story recur.

    >>> openings = story_openings(bundled_sample().stories("valid"), tokenizer, 200, 256)
    >>> stories = write_continuations(net, tokenizer, openings, temperature=0.8, seed=1)
    >>> coherence(stories)

Each story continues an opening. An opening is the first sentence of a validation story, if this
sentence names the protagonist, such as "Once upon a time, there was a little girl named Lily." The
rest of the validation story is measured in the same way, as a baseline. These heuristics do not
measure meaning: a story may keep its names and still make no sense.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minigpt.analysis.repetition import split_words
from minigpt.core.settings import UserError
from minigpt.generation.sampling import SamplingConfig, generate
from minigpt.kernels.choice import sequences_at_once
from minigpt.model import GPT, IGNORE_INDEX, perplexity
from minigpt.tokenizer import Tokenizer

# The whole first sentence, if it ends with "named" or "called" and a name.
OPENING = re.compile(r"[^.!?\"“]*\b(?:named|called) ([A-Z][a-z]+)\.(?=\s)")
# A capitalised word inside a sentence: after a lower-case letter or a comma.
NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+\b")
BATCH = 50  # maximum number of stories with one seed; on a CPU, also of stories scored at once


@dataclass(frozen=True)
class Opening:
    """The first sentence of a story, the protagonist's name, and the rest of the story."""

    text: str
    name: str
    ids: tuple[int, ...]  # an end-of-text token, then `text`
    rest: str


@dataclass(frozen=True)
class Continuation:
    """The text after an opening, until the story ends or the model's context is full."""

    opening: Opening
    ids: tuple[int, ...]  # without the end-of-text token
    text: str
    ended: bool  # whether the text ended with an end-of-text token


@dataclass(frozen=True)
class Coherence:
    """Coherence measures of a group of continuations.

    A fraction is None if there is nothing to count.
    """

    unfinished: float  # fraction that did not end within the context
    protagonist_retention: float | None  # fraction with the opening's name in the last third
    names: float  # mean number of names in a continuation, without the opening's name
    name_recurrence: float | None  # fraction of these names that occur more than once


def story_openings(
    stories: Iterable[str], tokenizer: Tokenizer, n: int, context: int
) -> list[Opening]:
    """Return the first `n` openings in `stories`, in order.

    An opening is a first sentence that names the protagonist. Openings that fill more than half of
    the context are skipped.

    Args:
        stories: the stories to search.
        tokenizer: tokenizer of the models.
        n: number of openings.
        context: context length of the models, in tokens.

    Returns:
        The openings.

    Raises:
        UserError: there are fewer than `n` openings.
    """
    openings = []
    for story in stories:
        if match := OPENING.match(story):
            ids = (tokenizer.end_of_text, *tokenizer.encode(match[0]))
            if len(ids) <= context // 2:
                openings.append(Opening(match[0], match[1], ids, story[match.end() :]))
            if len(openings) == n:
                return openings
    limit = f"at most {context // 2} tokens (half the context)"
    if not openings:
        problem = f"no story names its protagonist in a first sentence of {limit}"
        raise UserError(f"{problem}: choose a run with a longer context")
    problem = f"only {len(openings)} stories name their protagonist in a first sentence of {limit}"
    raise UserError(f"{problem}; choose at most {len(openings)}", "n", n)


def original_continuations(
    openings: Sequence[Opening], tokenizer: Tokenizer, context: int
) -> list[Continuation]:
    """Return the original rest of each story, cut at the end of the model's context.

    Args:
        openings: the openings of the stories.
        tokenizer: tokenizer of the model.
        context: context length of the model, in tokens.

    Returns:
        A continuation for each opening.
    """
    continuations = []
    for opening in openings:
        ids = tokenizer.encode(opening.rest)
        capacity = context - len(opening.ids)
        ended = len(ids) < capacity  # the end-of-text token needs space, too, as for a model
        ids = tuple(ids[:capacity])
        continuations.append(Continuation(opening, ids, tokenizer.decode(ids), ended))
    return continuations


def write_continuations(
    net: GPT, tokenizer: Tokenizer, openings: Sequence[Opening], temperature: float, seed: int
) -> list[Continuation]:
    """Sample a continuation for each opening.

    Openings with the same number of tokens are continued in batches of at most BATCH.

    Args:
        net: the model.
        tokenizer: tokenizer of the model.
        openings: the openings to continue.
        temperature: sampling temperature.
        seed: seed of the first batch; each further batch uses the next integer.

    Returns:
        A continuation for each opening, in the order of `openings`.
    """
    continuations: dict[int, Continuation] = {}
    for batch_seed, batch in enumerate(_batches(openings), start=seed):
        ids = torch.tensor([openings[i].ids for i in batch])
        capacity = net.config.context_length - ids.shape[1]
        sampling = SamplingConfig(temperature, max_tokens=capacity, seed=batch_seed)
        end, size = tokenizer.end_of_text, tokenizer.vocab_size
        steps = [step.ids for step in generate(net, ids, sampling, end, vocab_size=size)]
        for i, row in zip(batch, torch.stack(steps, dim=1).tolist(), strict=True):
            ended = end in row
            own = tuple(row[: row.index(end)] if ended else row)
            continuations[i] = Continuation(openings[i], own, tokenizer.decode(own), ended)
    return [continuations[i] for i in range(len(openings))]


def _batches(openings: Sequence[Opening]) -> Iterator[list[int]]:
    lengths = [len(opening.ids) for opening in openings]
    for length in sorted(set(lengths)):
        indices = [i for i, other in enumerate(lengths) if other == length]
        for first in range(0, len(indices), BATCH):
            yield indices[first : first + BATCH]


def coherence(stories: Sequence[Continuation]) -> Coherence:
    """Return the coherence measures of `stories`, which must not be empty."""
    retention, names, recurrence = [], [], []
    for story in stories:
        if words := split_words(story.text):
            last_third = words[len(words) - -(-len(words) // 3) :]  # rounded up
            without_possessive = {re.sub(r"['’]s$", "", word) for word in last_third}
            retention.append(story.opening.name.lower() in without_possessive)
        others = set(NAME.findall(story.text)) - {story.opening.name}
        names.append(len(others))
        recurrence += [len(re.findall(rf"\b{name}\b", story.text)) > 1 for name in sorted(others)]
    return Coherence(
        unfinished=fmean(not story.ended for story in stories),
        protagonist_retention=fmean(retention) if retention else None,
        names=fmean(names),
        name_recurrence=fmean(recurrence) if recurrence else None,
    )


@torch.inference_mode()
def score(net: GPT, stories: Sequence[Continuation], end_of_text: int) -> float:
    """Return the perplexity of the continuations `stories` under `net`.

    The tokens of the openings are not scored. If a story ended, its end-of-text token is scored as
    well. Each opening with its continuation must fit into the context of `net`, and there must be
    at least one token to score.

    Args:
        net: the model that scores the stories.
        stories: the continuations with their openings.
        end_of_text: id of the end-of-text token.
    """
    nats, n_tokens, device = 0.0, 0, net.embedding.weight.device
    batch = sequences_at_once(net, on_cpu=BATCH)
    for first in range(0, len(stories), batch):
        ids, targets = _rows(stories[first : first + batch], end_of_text)
        n = int((targets != IGNORE_INDEX).sum())
        nats += n * net.loss(ids.to(device), targets.to(device)).item()
        n_tokens += n
    return perplexity(nats / n_tokens)


def _rows(stories: Sequence[Continuation], end_of_text: int) -> tuple[Tensor, Tensor]:
    """Return ids and targets (B, T); targets in openings and in padding are IGNORE_INDEX."""
    whole = [[*s.opening.ids, *s.ids, *([end_of_text] if s.ended else [])] for s in stories]
    ids = [torch.tensor(tokens[:-1]) for tokens in whole]
    targets = [torch.tensor(tokens[1:]) for tokens in whole]
    for row, story in zip(targets, stories, strict=True):
        row[: len(story.opening.ids) - 1] = IGNORE_INDEX
    padded_ids = pad_sequence(ids, batch_first=True, padding_value=end_of_text)
    return padded_ids, pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX)
