"""Measure every snapshot of a run, to show what the model learns in the course of training.

>>> write_over_time(Run.load("runs/small"), Path("study"))
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from torch import Tensor

from minigpt.analysis import analogies
from minigpt.analysis.attention import head_scores
from minigpt.analysis.classes import (
    BANDS,
    CLASSES,
    NAMES,
    POSITIONS,
    PUNCTUATION,
    SPEECH,
    class_losses,
    scored_texts,
    token_counts,
)
from minigpt.analysis.coherence import Coherence, coherence, story_openings, write_continuations
from minigpt.analysis.embedding_map import CLUSTERS
from minigpt.analysis.embeddings import EmbeddingProbe
from minigpt.analysis.repetition import NOVELTY_STORIES, measure, split_words
from minigpt.core import plots
from minigpt.core.console import log
from minigpt.core.fields import documented
from minigpt.core.files import write_json, write_text
from minigpt.core.hardware import model_device
from minigpt.core.settings import UserError, check
from minigpt.core.text import human_count, md_table, percent, value_cell
from minigpt.data.sources import bundled_sample
from minigpt.model import GPT
from minigpt.runs.checkpoint import snapshot_values
from minigpt.runs.folder import Run
from minigpt.runs.names import OVER_TIME_ANIMATION as SETTLING
from minigpt.runs.names import OVER_TIME_FIGURE as FIGURE
from minigpt.runs.names import OVER_TIME_TABLE as TABLE

DATA = "over-time.json"
TEMPERATURE = 0.8
COUNTED_STORIES = 2000  # training stories in which the frequencies of tokens are counted
_SENTENCE = re.compile(r"[^.!?]+[.!?]+[\"”']*|[^.!?]+$")
_DOUBLED = re.compile(r"\b(\w+) \1\b", re.IGNORECASE)
_ARTICLE = re.compile(r"\b(?:a [aeiou]|an [^aeiouh\W])", re.IGNORECASE)
_MAY_DOUBLE = {"that", "had", "very", "so", "no", "bye", "ha"}


@documented
@dataclass(frozen=True)
class OverTimeConfig:
    """Settings of the measurements, the same for each snapshot."""

    n_scored: int = 100
    """Number of validation stories on which the loss of each class of tokens is measured."""
    n: int = 200
    """Number of stories that each snapshot writes."""
    seed: int = 1
    """Sampling seed, the same for each snapshot."""

    def __post_init__(self) -> None:
        counts = ("n_scored", "n")
        check(self, "must be at least 1", lambda n: n >= 1, *counts)
        check(self, "must not be negative", lambda seed: seed >= 0, "seed")


@dataclass(frozen=True)
class Moment:
    """Measured values of one snapshot.

    The loss of a class of tokens is None if no token belongs to the class. A fraction is None if
    its denominator is zero.
    """

    tokens: int  # training tokens so far
    losses: dict[str, float | None]  # nats per token, by class of token
    spelling: float | None  # fraction of written words that occur in the training stories
    sentences: float | None  # fraction of sentences in which the heuristics find no fault
    repeated: float | None  # fraction of word 4-grams that occurred earlier in the same story
    coherence: Coherence
    analogies: float | None  # fraction with the expected word among the five nearest
    induction: list[list[float]] | None  # score of each head, by layer; None if not measurable


def write_over_time(run: Run, out: Path, config: OverTimeConfig | None = None) -> list[Path]:
    """Measure all snapshots of a run, and write the results to a folder.

    The files are over-time.md, over-time.json, over-time.png and the animation embeddings.html. The
    animation shows several groups of words. Words of more than one token are left out. If fewer
    than two groups have words left, embeddings.html is not written.

    Args:
        run: a run with snapshots.
        out: output folder, created if missing.
        config: settings of the measurements; None means the defaults.

    Returns:
        The paths of the files.

    Raises:
        UserError: the run has no snapshots, or `story_openings` finds fewer than
            `config.n` openings in the validation stories.
    """
    config = config or OverTimeConfig()
    moments, vectors, words = _measure(run, config)
    out.mkdir(parents=True, exist_ok=True)
    name = run.folder.resolve().name
    write_text(out / TABLE, over_time_markdown(name, moments, config))
    plain = [dataclasses.asdict(moment) for moment in moments]
    settings = dataclasses.asdict(config) | {"run": name, "temperature": TEMPERATURE}
    write_json(out / DATA, {"settings": settings, "snapshots": plain})
    plots.write_png(over_time_figure(moments), out / FIGURE)
    files = [out / TABLE, out / DATA, out / FIGURE]
    if len(words) > 1:
        tokens = [moment.tokens for moment in moments]
        write_text(out / SETTLING, settling_html(name, words, tokens, vectors))
        files.append(out / SETTLING)
    return files


def _measure(
    run: Run, config: OverTimeConfig
) -> tuple[list[Moment], list[Tensor], dict[str, list[str]]]:
    """Return the measures of each snapshot, the word embeddings of each snapshot, and the words.

    The words are a dict: for the name of each cluster in CLUSTERS, the words of this cluster
    that are single tokens.
    """
    if not run.snapshots:
        problem = f"{run.folder} has no snapshots; choose another run, or train one with snapshots"
        raise UserError(problem, fix={"callbacks.snapshots": 8})
    tokenizer, sample = run.tokenizer, bundled_sample()
    context = run.load_model().config.context_length
    known, training = set(), list(islice(sample.stories("train"), NOVELTY_STORIES))
    for story in training:
        known.update(split_words(story))
    counts = token_counts(training[:COUNTED_STORIES], tokenizer)
    texts = scored_texts(sample.stories("valid"), tokenizer, config.n_scored, context, counts)
    openings = story_openings(sample.stories("valid"), tokenizer, config.n, context)
    moments, vectors, words = [], [], {}
    for path in run.snapshots:
        net = replace(run, checkpoint=path).load_model(model_device())
        tokens, _ = snapshot_values(path)
        log.info("%s: %s tokens", path.name, human_count(tokens))
        stories = write_continuations(net, tokenizer, openings, TEMPERATURE, config.seed)
        probe = EmbeddingProbe(net, tokenizer)
        words = {name: probe.single(members) for name, members in CLUSTERS.items()}
        vectors.append(probe.vectors([word for members in words.values() for word in members]))
        written = [story.text for story in stories]
        (repetition,), _ = measure([written], [])
        moment = Moment(
            tokens=tokens,
            losses=class_losses(net, texts),
            spelling=_share(word in known for text in written for word in split_words(text)),
            sentences=_share(is_well_formed(s) for text in written for s in sentences(text)),
            repeated=repetition.repeated,
            coherence=coherence(stories),
            analogies=analogies.ask(probe).summary.get("among five"),
            induction=_induction(net),
        )
        moments.append(moment)
    return moments, vectors, {name: members for name, members in words.items() if members}


def _induction(net: GPT) -> list[list[float]] | None:
    try:
        return head_scores(net).induction.tolist()
    except UserError:  # a short context, or a class whose forward takes no cache
        return None


def _share(outcomes: Iterable[bool]) -> float | None:
    values = list(outcomes)
    return sum(values) / len(values) if values else None


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, without white space or quotation marks around them."""
    return [part for match in _SENTENCE.finditer(text) if (part := match[0].strip(" \n\t\"“”'"))]


def is_well_formed(sentence: str) -> bool:
    """Return whether heuristics find no fault in a sentence.

    The faults are: no capital letter or digit at the start; no ".", "!" or "?" at the end; a word
    twice in a row, except words such as "very"; and a wrong article, such as "an dog" or "a apple".

    Args:
        sentence: the sentence, without quotation marks around it.
    """
    doubled = {match[1].lower() for match in _DOUBLED.finditer(sentence)} - _MAY_DOUBLE
    begins = sentence[0].isupper() or sentence[0].isdigit()
    ends = sentence.rstrip("\"”'")[-1:] in (".", "!", "?")
    return begins and ends and not doubled and not _ARTICLE.search(sentence)


# -------------------------------------------------------------------------- table and figure


def over_time_markdown(name: str, moments: Sequence[Moment], config: OverTimeConfig) -> str:
    """Return the content of over-time.md: a table of losses, a table of other measures, the figure.

    Args:
        name: name of the run.
        moments: the measures of each snapshot, oldest first.
        config: settings of the measurements.
    """
    heads = [f"{human_count(moment.tokens)} tokens" for moment in moments]
    classes = ("all tokens", *CLASSES)
    losses = [[c, *(value_cell(m.losses[c], ".2f") for m in moments)] for c in classes]
    rows = [
        ["correct spelling", *(percent(m.spelling) for m in moments)],
        ["well-formed sentences", *(percent(m.sentences) for m in moments)],
        ["repeated 4-grams", *(percent(m.repeated) for m in moments)],
        ["protagonist retention", *(percent(m.coherence.protagonist_retention) for m in moments)],
        ["name recurrence", *(percent(m.coherence.name_recurrence) for m in moments)],
        ["analogies among five", *(percent(m.analogies) for m in moments)],
        ["highest induction score", *(value_cell(_highest(m), ".2f") for m in moments)],
    ]
    return f"""# What {name} learns when

Each column is a snapshot of the weights, by the number of training tokens so far.

## Loss by class of token

In nats per token, on up to {config.n_scored} validation stories of the bundled sample. A token can
be in several classes. Frequencies are those in the first {COUNTED_STORIES:,} bundled training
stories. A name is a capitalised word inside a sentence.

{md_table(["class", *heads], losses)}

## Stories

Of {config.n} continuations of validation stories at temperature {TEMPERATURE:g} with seed
{config.seed}. These measures are heuristics.

{md_table(["measure", *heads], rows)}

- correct spelling: fraction of words that occur in the bundled training stories.
- well-formed sentences: fraction of sentences that begin with a capital letter or a digit,
  end with a mark, and have neither a doubled word nor a wrong article.
- repeated 4-grams: fraction of word 4-grams that occurred earlier in the same continuation.
- protagonist retention: fraction of continuations whose last third has the opening's name.
- name recurrence: fraction of other names that occur more than once.
- analogies among five: fraction of the analogies with the expected word among the five nearest.
- highest induction score: the largest mean attention of a head, on a repeated random sequence, to
  the token after the earlier occurrence of the current token; {DATA} has the score of each head.

![The measures over training tokens]({FIGURE})

The figure shows the initial weights at half of the tokens of the second snapshot, because its axis
is logarithmic.
"""


def _highest(moment: Moment) -> float | None:
    scores = moment.induction
    return None if scores is None else max(max(layer) for layer in scores)


def over_time_figure(moments: Sequence[Moment]) -> Figure:
    """Plot the measures over the training tokens, in panels with a logarithmic horizontal axis."""
    figure = plots.new_figure(12, 7, rows=3, columns=3)
    # A logarithmic axis has no 0, so the initial weights are at half of the second snapshot.
    later = [moment.tokens for moment in moments if moment.tokens > 0]
    tokens = [moment.tokens or min(later, default=2) / 2 for moment in moments]
    groups = {
        "Loss by frequency": BANDS,
        "Loss by position in the story": POSITIONS,
        "Loss of names": NAMES,
        "Loss of speech and punctuation": (SPEECH, PUNCTUATION),
    }
    panels: dict[str, dict[str, list[float | None]]] = {
        title: {name: [m.losses[name] for m in moments] for name in names}
        for title, names in groups.items()
    }
    panels |= {
        "Spelling and sentences": {
            "correct spelling": [m.spelling for m in moments],
            "well-formed sentences": [m.sentences for m in moments],
        },
        "Repeated 4-grams": {"": [m.repeated for m in moments]},
        "Names kept": {
            "protagonist retention": [m.coherence.protagonist_retention for m in moments],
            "name recurrence": [m.coherence.name_recurrence for m in moments],
        },
        "Analogies among five": {"": [m.analogies for m in moments]},
    }
    for axes, (title, lines) in zip(figure.axes, panels.items(), strict=False):
        for (name, values), colour, marker in zip(
            lines.items(), plots.COLOURS, plots.MARKERS, strict=False
        ):
            style = {"color": colour, "markersize": 3, "label": name}
            axes.plot(tokens, _plotted(values), f"{marker}-", **style)
        axes.set_title(title, loc="left", fontsize=10)
        if any(lines):
            axes.legend(frameon=False, fontsize=7)
        if not title.startswith("Loss"):
            axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
    _draw_heads(figure.axes[-1], tokens, moments)
    for axes in figure.axes:
        axes.set_xscale("log")
        plots.log_ticks(axes.xaxis, (1,), human_count)
    figure.supxlabel("training tokens", fontsize=9)
    return figure


def _draw_heads(axes: Any, tokens: Sequence[float], moments: Sequence[Moment]) -> None:
    """Plot the induction score of each head, with one colour and line style for each layer.

    If a snapshot has no scores, no curves are plotted.
    """
    axes.set_title("Induction score of each head", loc="left", fontsize=10)
    scores = [moment.induction for moment in moments if moment.induction is not None]
    if len(scores) < len(moments):
        return
    for layer in range(len(scores[0])):
        n = len(plots.COLOURS)
        style = {"color": plots.COLOURS[layer % n], "linestyle": ("-", "--", ":")[layer // n % 3]}
        for head in range(len(scores[0][layer])):
            label = f"layer {layer + 1}" if head == 0 else None
            values = [each[layer][head] for each in scores]
            axes.plot(tokens, values, **style, linewidth=0.8, alpha=0.7, label=label)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=7)


def _plotted(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


# --------------------------------------------------------------------------------- animation


def settling_html(
    name: str, words: dict[str, list[str]], tokens: Sequence[int], vectors: Sequence[Tensor]
) -> str:
    """Return an HTML page that animates how word embeddings change during the training of a run.

    The embeddings of all snapshots are projected onto the first two principal components of the
    last snapshot. So points move because embeddings change, not because the projection changes. The
    page needs no network.

    Args:
        name: name of the run.
        words: words by name of their group.
        tokens: number of training tokens of each snapshot.
        vectors: for each snapshot, the embeddings (n, d) of the n words in the order of `words`,
            normalised to length one.
    """
    last = vectors[-1] - vectors[-1].mean(dim=0)
    axes = torch.linalg.svd(last, full_matrices=False)[2][:2].T  # (d, 2)
    points = torch.stack([(each - each.mean(dim=0)) @ axes for each in vectors])
    points = points / points.abs().max()
    data = {
        "words": [word for members in words.values() for word in members],
        "groups": [i for i, members in enumerate(words.values()) for _ in members],
        "tokens": [human_count(n) for n in tokens],
        "points": [[[round(x, 3) for x in xy] for xy in rows] for rows in points.tolist()],
    }
    options: Any = {"loader": PackageLoader("minigpt", "analysis"), "undefined": StrictUndefined}
    template = Environment(autoescape=True, **options).get_template("settling.html.j2")
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # inside <script>
    return template.render(
        name=name, data=text, names=list(words), colours=list(plots.COLOURS[: len(words)])
    )
