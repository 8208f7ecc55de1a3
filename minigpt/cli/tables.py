"""An evaluation on the terminal: the loss, a story of each temperature, tables of the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from minigpt.analysis.analogies import Answers, shown
from minigpt.evaluation import Evaluation

if TYPE_CHECKING:
    from rich.table import Table


def show(evaluation: Evaluation, console: Console) -> None:
    """Print the evaluation: loss, stories, temperatures, neighbours, analogies."""
    console.print(Text(_what_was_measured(evaluation)))
    console.print(_loss_table(evaluation))
    for row in evaluation.temperatures:
        for story in row.stories[:1]:
            heading = Text(f"\ntemperature {row.temperature}\n", style="bold")
            console.print(heading.append(story["prompt"], "dim").append(story["text"], "not bold"))
    if any(row.stories for row in evaluation.temperatures):
        console.print("", _temperature_table(evaluation), sep="\n")
        console.print(Text(_what_the_shares_are(evaluation)))
    for kind, found in (("word", evaluation.neighbours), ("analogy", evaluation.analogies)):
        if found:
            console.print("", _probe_table(kind, found), sep="\n")


def _loss_table(e: Evaluation) -> Table:
    table = Table("measure", "value")
    table.columns[1].justify = "right"
    table.add_row("perplexity", f"{e.perplexity:.3f}")
    table.add_row("nats per token", f"{e.nats_per_token:.4f}")
    table.add_row("bits per byte", f"{e.bits_per_byte:.4f}")
    return table


def _what_was_measured(e: Evaluation) -> str:
    how = "windows side by side" if e.stride is None else f"windows every {e.stride} tokens"
    return (
        f"{e.checkpoint}, {e.parameters:,} parameters, on the validation split of "
        f"{e.data['source']}: {e.n_stories:,} stories, {e.n_tokens:,} tokens, {how}, "
        f"{e.precision} on {e.device}"
    )


def _temperature_table(e: Evaluation) -> Table:
    columns = ("temperature", "words", "distinct 1", "2", "3", "repeated 4", "novel 4")
    table = Table(*columns)
    for column in table.columns:
        column.justify = "right"
    for row in e.temperatures:
        r = row.repetition
        shares = map(_percent, (*r.distinct, r.repeated, r.novel))
        table.add_row(f"{row.temperature}", f"{r.words:.0f}", *shares)
    return table


def _what_the_shares_are(e: Evaluation) -> str:
    return (
        "Share of word n-grams: different ones; ones their story had before; ones that none of "
        f"{e.novelty_stories:,} training stories has."
    )


def _probe_table(kind: str, found: dict[str, list[tuple[str, float]] | str]) -> Table:
    table = Table(kind, "nearest tokens, with cosine")
    for asked, answer in found.items():
        if not isinstance(answer, str):
            answer = "  ".join(f"{word} {cosine:.2f}" for word, cosine in answer)
        table.add_row(escape(asked), escape(answer))
    return table


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


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
