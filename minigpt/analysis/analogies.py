"""Query the token embeddings of a model: neighbours of six words, and twenty analogies.

>>> answers = ask(EmbeddingProbe(net, tokenizer))
>>> answers.analogies[0].rank
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from minigpt.analysis.embeddings import EmbeddingProbe, SplitWordError, Tokens, tokens_or_reason
from minigpt.core.text import md_table

WORDS = ("dad", "mom", "king", "happy", "run", "big")
ANALOGIES = {  # first − second + third = fourth; all are single tokens in the bundled sample
    "gender": (
        ("princess", "girl", "boy", "prince"),
        ("mom", "girl", "boy", "dad"),
        ("sister", "girl", "boy", "brother"),
        ("woman", "girl", "boy", "man"),
    ),
    "royal": (
        ("queen", "woman", "man", "king"),
        ("queen", "mom", "dad", "king"),
        ("prince", "boy", "man", "king"),
        ("princess", "girl", "woman", "queen"),
    ),
    "plural": (
        ("dogs", "dog", "cat", "cats"),
        ("trees", "tree", "flower", "flowers"),
        ("toys", "toy", "car", "cars"),
        ("birds", "bird", "book", "books"),
    ),
    "tense": (
        ("walked", "walk", "jump", "jumped"),
        ("ran", "run", "go", "went"),
        ("said", "say", "see", "saw"),
        ("played", "play", "look", "looked"),
    ),
    "opposite": (
        ("small", "big", "fast", "slow"),
        ("sad", "happy", "good", "bad"),
        ("cold", "hot", "wet", "dry"),
        ("down", "up", "inside", "outside"),
    ),
}


@dataclass(frozen=True)
class Analogy:
    """An analogy question, and its answer or the reason why there is none."""

    kind: str
    question: str  # princess − girl + boy
    expected: str
    rank: int | None  # of the expected word, ignoring the words of the question; 1 is the nearest
    top: Tokens  # the five nearest tokens
    problem: str | None = None  # why there is no answer


@dataclass(frozen=True)
class Answers:
    """Neighbours of the words, and answers to the analogies.

    `neighbours` maps each word to its nearest tokens, or to the reason why it has none.
    """

    neighbours: dict[str, Tokens | str]
    analogies: list[Analogy]

    @property
    def summary(self) -> dict[str, float]:
        """Statistics of the ranks of the expected words, over all analogies that have an answer.

        The keys are "asked" (number of analogies that have an answer), "first" (fraction with rank
        1), "among five" (fraction with rank 1 to 5) and "median rank". If no analogy has an answer,
        the only key is "asked", with the value 0.
        """
        ranks = [a.rank for a in self.analogies if a.rank is not None]
        if not ranks:
            return {"asked": 0}
        return {
            "asked": len(ranks),
            "first": sum(rank == 1 for rank in ranks) / len(ranks),
            "among five": sum(rank <= 5 for rank in ranks) / len(ranks),
            "median rank": float(median(ranks)),
        }


def ask(probe: EmbeddingProbe) -> Answers:
    """Return the neighbours of the six `WORDS`, and the answers to the twenty `ANALOGIES`.

    Args:
        probe: the embeddings to query.
    """
    neighbours = {word: tokens_or_reason(probe.neighbours, word) for word in WORDS}
    questions = ((kind, *words) for kind, group in ANALOGIES.items() for words in group)
    return Answers(neighbours, [_analogy(probe, *question) for question in questions])


def _analogy(probe: EmbeddingProbe, kind: str, a: str, b: str, c: str, expected: str) -> Analogy:
    question = f"{a} − {b} + {c}"
    try:
        probe.token_id(expected)
        ranked = probe.analogy(a, minus=b, plus=c, k=len(probe.unit))
    except SplitWordError as error:
        return Analogy(kind, question, expected, None, [], str(error))
    rank = [word for word, _ in ranked].index(expected) + 1
    return Analogy(kind, question, expected, rank, ranked[:5])


def markdown(answers: dict[str, Answers]) -> str:
    """Return the content of embeddings.md, which compares the answers of several runs.

    Args:
        answers: answers by name of the run.
    """
    parts = [
        "# Embeddings",
        "Tokens by cosine similarity of their embeddings, nearest first, without the words of "
        "the query.",
        "## Nearest neighbours",
        md_table(
            ["word", *answers],
            [
                [word, *(_listed(each.neighbours[word]) for each in answers.values())]
                for word in next(iter(answers.values())).neighbours
            ],
            left=1 + len(answers),
        ),
        "## Analogies",
        md_table(
            ["kind", "question", "expected", *answers],
            [
                [same[0].kind, same[0].question, same[0].expected, *map(_outcome, same)]
                for same in zip(*(each.analogies for each in answers.values()), strict=True)
            ],
            left=3 + len(answers),
        ),
        "Each cell shows the rank of the expected token, and in brackets the nearest token with "
        "its cosine similarity.",
        md_table(
            ["run", "analogies", "rank 1", "rank 1 to 5", "median rank"],
            [[name, *_summary_cells(each.summary)] for name, each in answers.items()],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def token_cell(token: str) -> str:
    """Format a token for a table cell, with control characters escaped."""
    return repr(token)[1:-1] or "(a space)"


def _listed(tokens: Tokens | str) -> str:
    if isinstance(tokens, str):
        return tokens
    return ", ".join(f"{token_cell(word)} {cosine:.2f}" for word, cosine in tokens)


def _outcome(analogy: Analogy) -> str:
    if analogy.rank is None:
        return analogy.problem or ""
    word, cosine = analogy.top[0]
    return f"{analogy.rank} ({token_cell(word)} {cosine:.2f})"


def _summary_cells(summary: dict[str, float]) -> list[str]:
    if not summary["asked"]:
        return ["0", "–", "–", "–"]
    shares = [f"{100 * summary[key]:.0f} %" for key in ("first", "among five")]
    return [f"{summary['asked']:.0f}", *shares, f"{summary['median rank']:g}"]
