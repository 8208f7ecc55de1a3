"""What `minigpt probe` shows: tables of neighbours and analogies, and a score over twenty of them.

>>> score_analogies(EmbeddingProbe(net, tokenizer))
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minigpt.embeddings import EmbeddingProbe, SplitWordError, parse_analogy

if TYPE_CHECKING:
    from rich.table import Table

# Family roles, tenses, plurals, pronouns and other pairs, with the answer that anybody would give;
# another of the model's may be as good.
ANALOGIES: dict[str, str] = {
    "princess - girl + boy": "prince",
    "mom - girl + boy": "dad",
    "sister - girl + boy": "brother",
    "queen - woman + man": "king",
    "ran - run + jump": "jumped",
    "went - go + come": "came",
    "ate - eat + drink": "drank",
    "found - find + lose": "lost",
    "dogs - dog + cat": "cats",
    "toys - toy + car": "cars",
    "trees - tree + flower": "flowers",
    "boys - boy + girl": "girls",
    "boy - he + she": "girl",
    "his - he + she": "her",
    "mom - she + he": "dad",
    "was - is + are": "were",
    "puppy - dog + cat": "kitten",
    "better - good + bad": "worse",
    "bigger - big + small": "smaller",
    "happily - happy + sad": "sadly",
}


@dataclass(frozen=True)
class Scored:
    """One analogy with a known answer."""

    analogy: str
    answer: str
    best: str | None  # what the model gives; None: a word of it is not a single token
    rank: int | None  # of the answer; 1 is best
    why_not: str = ""  # the reason where there is no rank


def score_analogies(probe: EmbeddingProbe, analogies: dict[str, str] = ANALOGIES) -> list[Scored]:
    """Where the known answer of each analogy stands among all tokens."""
    return [_score(probe, analogy, answer) for analogy, answer in analogies.items()]


def _score(probe: EmbeddingProbe, analogy: str, answer: str) -> Scored:
    try:
        probe.token_id(answer)
        found = probe.analogy(*parse_analogy(analogy), k=probe.tokenizer.vocab_size)
    except SplitWordError as error:
        return Scored(analogy, answer, None, None, str(error).split(" to this ")[0])
    words = [word for word, _ in found]
    return Scored(analogy, answer, words[0], words.index(answer) + 1)


def score_line(scored: Iterable[Scored], within: int = 5) -> str:
    """How many answers came first, and how many among the first `within`."""
    ranks = [one.rank for one in scored if one.rank is not None]
    first, near = sum(rank == 1 for rank in ranks), sum(rank <= within for rank in ranks)
    return f"{first} of {len(ranks)} answers come first, {near} among the first {within}."


def score_table(scored: Iterable[Scored]) -> Table:
    """A row for each analogy."""
    from rich.table import Table

    table = Table("analogy", "answer", "the model says", "rank of the answer", title="Analogies")
    for one in scored:
        table.add_row(
            one.analogy, one.answer, one.best or "", str(one.rank) if one.rank else one.why_not
        )
    return table


def word_table(title: str, found: Iterable[tuple[str, float]]) -> Table:
    """Words with their cosines, under the title."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column(Text(title))
    table.add_column("cosine", justify="right")
    for word, cosine in found:
        table.add_row(Text(repr(word)[1:-1] or "(a space)"), f"{cosine:.2f}")
    return table
