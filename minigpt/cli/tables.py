"""Tables for the terminal: an evaluation, and the results of `minigpt probe`."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from minigpt.analysis.analogies import Answers, token_cell
from minigpt.analysis.embeddings import Tokens
from minigpt.core.text import percent
from minigpt.evaluation.hugging_face import HFEvaluation
from minigpt.evaluation.results import Evaluation

# ---------------------------------------------------------------------------- evaluation


def show(evaluation: Evaluation, console: Console) -> None:
    """Print an evaluation: losses, stories, measures of repetition, nearest words, analogies."""
    e = evaluation
    windows = "non-overlapping windows" if e.stride is None else f"windows every {e.stride} tokens"
    split = "tuning" if e.data["valid"] == "tuning" else "validation"
    heading = f"{e.checkpoint}, {e.parameters:,} parameters, on the {split} split of "
    heading += f"{e.data['source']}: {windows}, {e.precision} on {e.device}"
    console.print(Text(heading), _loss_table(e), sep="\n")
    for row in e.temperatures:
        for story in row.stories[:1]:
            title = Text(f"\ntemperature {row.temperature}\n", style="bold")
            console.print(title.append(story["prompt"], "dim").append(story["text"], "not bold"))
    if any(row.stories for row in e.temperatures):
        legend = "Percentage of word n-grams that are distinct, repeated within their story, or "
        legend += f"novel (in none of {e.novelty_stories:,} training stories)."
        console.print("", _temperature_table(e), Text(legend), sep="\n")
    for kind, answers in (("word", e.neighbours), ("analogy", e.analogies)):
        if answers:
            console.print("", _probe_table(kind, answers), sep="\n")


def show_hf(evaluation: HFEvaluation, console: Console) -> None:
    """Print the loss of a Hugging Face model."""
    e = evaluation
    split = "tuning" if e.data["valid"] == "tuning" else "validation"
    heading = f"{e.model}, {e.parameters:,} parameters, {e.vocabulary:,} tokens, on the {split} "
    heading += f"split of {e.data['source']}: windows of {e.context} tokens"
    heading += f" at a stride of {e.stride}" if e.stride else ""
    heading += f", 32-true on {e.device}"
    note = "Compare models of different vocabularies by bits per byte, not by perplexity."
    console.print(Text(heading), _loss_table(e), Text(note), sep="\n")


def _loss_table(e: Evaluation | HFEvaluation) -> Table:
    name = "V1" if e.valid == "v1" else "V2" if e.valid else "value"
    scores = {name: e} if e.valid_v1 is None else {name: e, "V1": e.valid_v1}
    table = Table("measure", *(Column(name, justify="right") for name in scores))
    table.add_row("perplexity", *(f"{score.perplexity:.3f}" for score in scores.values()))
    table.add_row("bits per byte", *(f"{score.bits_per_byte:.4f}" for score in scores.values()))
    table.add_row("nats per token", *(f"{score.nats_per_token:.4f}" for score in scores.values()))
    table.add_row("stories", *(f"{score.n_stories:,}" for score in scores.values()))
    table.add_row("tokens", *(f"{score.n_tokens:,}" for score in scores.values()))
    return table


def _temperature_table(e: Evaluation) -> Table:
    heads = ("temperature", "words", "distinct 1", "2", "3", "repeated 4", "novel 4")
    table = Table(*(Column(head, justify="right") for head in heads))
    for row in e.temperatures:
        r = row.repetition
        shares = map(percent, (*r.distinct, r.repeated, r.novel))
        table.add_row(f"{row.temperature}", f"{r.words:.0f}", *shares)
    return table


def _probe_table(kind: str, answers: dict[str, Tokens | str]) -> Table:
    table = Table(kind, "nearest tokens, with cosine")
    for question, answer in answers.items():
        if not isinstance(answer, str):
            answer = "  ".join(f"{word} {cosine:.2f}" for word, cosine in answer)
        table.add_row(escape(question), escape(answer))
    return table


# ---------------------------------------------------------------------------- probe


def word_table(title: str, tokens: Iterable[tuple[str, float]]) -> Table:
    """Return a table of tokens with their cosine similarities."""
    table = Table(Column(Text(title)), Column("cosine", justify="right"))
    for token, cosine in tokens:
        table.add_row(Text(token_cell(token)), f"{cosine:.2f}")
    return table


def score_table(answers: Answers) -> Table:
    """Return a table with a row for each analogy."""
    table = Table("analogy", "expected", "nearest token", "rank of expected", title="Analogies")
    for analogy in answers.analogies:
        nearest = Text(token_cell(analogy.top[0][0]) if analogy.top else "")
        rank = str(analogy.rank) if analogy.rank else (analogy.problem or "").split(" to this ")[0]
        table.add_row(analogy.question, analogy.expected, nearest, rank)
    return table


def score_line(answers: Answers) -> str:
    """Return a line that says how many expected answers of the analogies are top-1 and top-5."""
    ranks = [analogy.rank for analogy in answers.analogies if analogy.rank is not None]
    first, near = sum(rank == 1 for rank in ranks), sum(rank <= 5 for rank in ranks)
    return f"{first} of {len(ranks)} expected answers rank first, {near} rank in the top five."
