"""What `minigpt probe` shows: tables of neighbours, and of the twenty analogies in analogies.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from minigpt.analogies import Answers, shown

if TYPE_CHECKING:
    from rich.table import Table


def score_line(answers: Answers) -> str:
    """How many answers came first, and how many among the first five."""
    ranks = [analogy.rank for analogy in answers.analogies if analogy.rank is not None]
    first, near = sum(rank == 1 for rank in ranks), sum(rank <= 5 for rank in ranks)
    return f"{first} of {len(ranks)} answers come first, {near} among the first five."


def score_table(answers: Answers) -> Table:
    """A row for each analogy."""
    from rich.table import Table
    from rich.text import Text

    table = Table("analogy", "answer", "the model says", "rank of the answer", title="Analogies")
    for one in answers.analogies:
        best = Text(shown(one.top[0][0]) if one.top else "")
        why_not = (one.problem or "").split(" to this ")[0]
        table.add_row(one.question, one.expected, best, str(one.rank) if one.rank else why_not)
    return table


def word_table(title: str, found: Iterable[tuple[str, float]]) -> Table:
    """Words with their cosines, under the title."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column(Text(title))
    table.add_column("cosine", justify="right")
    for word, cosine in found:
        table.add_row(Text(shown(word)), f"{cosine:.2f}")
    return table
