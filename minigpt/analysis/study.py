"""What `minigpt study` writes of several trained models: coherence, sample stories, embeddings.

>>> write_study([Run.open("runs/small"), Run.open("runs/large")], Path("docs/results"))
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.analysis import analogies
from minigpt.analysis.analogies import Answers
from minigpt.analysis.coherence import (
    Coherence,
    Continuation,
    Opening,
    coherence,
    score,
    story_openings,
    told_by_their_writers,
    write_continuations,
)
from minigpt.analysis.embedding_map import (
    FewWordsError,
    caption,
    embedding_map,
    write_map,
)
from minigpt.analysis.embeddings import EmbeddingProbe
from minigpt.analysis.repetition import COPIED, Repetition, measure
from minigpt.core.files import write_json, write_text
from minigpt.core.hardware import Hardware
from minigpt.core.plots import write_png
from minigpt.core.settings import UserError
from minigpt.core.text import md_table
from minigpt.data.sources import bundled_sample
from minigpt.generation.sampling import SamplingConfig, stream_text
from minigpt.kernels.choice import kernels_for
from minigpt.model import GPT
from minigpt.runs.folder import Run
from minigpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("minigpt")

ORIGINALS = "the original stories"
NOVELTY_STORIES = 15_000  # training stories of the bundled sample looked through for 4-grams
SAMPLE_SEEDS = (1, 2, 3)
SAMPLE_PROMPT, SAMPLE_TEMPERATURE, SAMPLE_TOKENS = "Once upon a time", 0.8, 256


@dataclass(frozen=True)
class StudyConfig:
    """How many stories, at which temperatures."""

    n: int = 200  # of each run at each temperature
    temperatures: tuple[float, ...] = (0.5, 0.8, 1.0, 1.2)
    seed: int = 1

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"n {self.n} must be at least 1")
        if self.seed < 0:
            raise UserError(f"seed {self.seed} must not be negative")


@dataclass(frozen=True)
class Row:
    """The stories of one run at one temperature; or the original ones, at none."""

    run: str
    parameters: int | None
    temperature: float | None
    coherence: Coherence
    repetition: Repetition
    perplexity: float  # of the stories, under the largest of the models


@dataclass(frozen=True)
class Model:
    """A trained model, loaded."""

    name: str
    net: GPT
    tokenizer: Tokenizer


def write_study(runs: Sequence[Run], out: Path, config: StudyConfig | None = None) -> None:
    """Write coherence.md, .png and .json, samples.md, embeddings.md and .json into `out`.

    And a map of words for each run whose tokenizer has enough of them.

    Raises:
        UserError: runs of one name, or whose tokenizers or contexts differ, so that none can be
            scored by another.
    """
    config = config or StudyConfig()
    models = _loaded(runs)
    out.mkdir(parents=True, exist_ok=True)
    probes = {m.name: EmbeddingProbe(m.net, m.tokenizer) for m in models}
    answers = {name: analogies.ask(probe) for name, probe in probes.items()}
    maps = _write_maps(probes, out)
    write_text(
        out / "embeddings.md", "\n\n".join([analogies.markdown(answers).rstrip(), *maps, ""])
    )
    write_json(out / "embeddings.json", {n: _answers_json(a) for n, a in answers.items()})
    write_text(out / "samples.md", samples_markdown(models))
    device = Hardware.find("auto", "1", 1, "32-true").accelerator
    for model in models:
        model.net.to(device).use(kernels_for(device))
    rows = study_rows(models, config)
    write_text(out / "coherence.md", coherence_markdown(rows, models, config))
    plain = [dataclasses.asdict(row) for row in rows]
    settings = dataclasses.asdict(config) | {"judge": models[-1].name}
    write_json(out / "coherence.json", {"settings": settings, "rows": plain})
    write_png(coherence_figure(rows), out / "coherence.png")


def _loaded(runs: Sequence[Run]) -> list[Model]:
    """The models on the CPU, smallest first."""
    models = [
        Model(run.folder.resolve().name, run.load_net(), run.load_tokenizer()) for run in runs
    ]
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise UserError(f"two runs are called the same ({', '.join(names)}): rename one's folder")
    kinds = {(m.tokenizer.fingerprint, m.net.config.context_length) for m in models}
    if len(kinds) > 1:
        raise UserError(
            f"{', '.join(names)} do not share tokenizer and context, so that the largest cannot "
            "score the others' stories: study them one by one"
        )
    return sorted(models, key=lambda model: model.net.n_parameters)


def _write_maps(probes: Mapping[str, EmbeddingProbe], out: Path) -> list[str]:
    """A map of words for each model, as a PNG; the part of embeddings.md that shows them."""
    text = []
    for name, probe in probes.items():
        try:
            found = embedding_map(probe)
            write_map(found, out / f"map-{name}.png")
            text += [f"![Map of words of {name}](map-{name}.png)", f"{name}: {caption(found)}"]
        except FewWordsError as error:
            text.append(f"{name}: no map, {error}")
    return ["## Maps of words", *text]


def _answers_json(answers: Answers) -> dict[str, Any]:
    return dataclasses.asdict(answers) | {"summary": answers.summary}


# ---------------------------------------------------------------------------------- coherence


def study_rows(models: Sequence[Model], config: StudyConfig) -> list[Row]:
    """That of the originals, then one for each model and temperature; the largest is the last."""
    judge, tokenizer = models[-1].net, models[-1].tokenizer
    context = judge.config.context_length
    openings = story_openings(bundled_sample().stories("valid"), tokenizer, config.n, context)
    told: list[tuple[str, int | None, float | None, list[Continuation]]] = [
        (ORIGINALS, None, None, told_by_their_writers(openings, tokenizer, context))
    ]
    for model in models:
        for temperature in config.temperatures:
            log.info("%s: %d stories at temperature %g", model.name, config.n, temperature)
            stories = _written(model, openings, temperature, config.seed)
            told.append((model.name, model.net.n_parameters, temperature, stories))
    texts = [[story.text for story in stories] for *_, stories in told]
    training = islice(bundled_sample().stories("train"), NOVELTY_STORIES)
    repetitions, _ = measure(texts, training)
    return [
        Row(
            name, parameters, temperature, coherence(stories), repetition,
            score(judge, stories, tokenizer.end_of_text),
        )
        for (name, parameters, temperature, stories), repetition in zip(
            told, repetitions, strict=True
        )
    ]  # fmt: skip


def _written(
    model: Model, openings: Sequence[Opening], temperature: float, seed: int
) -> list[Continuation]:
    return write_continuations(model.net, model.tokenizer, openings, temperature, seed)


HEADS = (
    "run", "temperature", "words", "distinct 1", "2", "3", "repeated 4", "new 4",
    "hero kept", "names", "names back", "perplexity", "unfinished",
)  # fmt: skip


def coherence_markdown(rows: Sequence[Row], models: Sequence[Model], config: StudyConfig) -> str:
    """coherence.md: what was done, the table, the figure."""
    context, judge = models[-1].net.config.context_length, models[-1]
    return f"""# Coherence and temperature

{config.n} stories of each run at each temperature, seed {config.seed}, no top-k or top-p. Each
continues the first sentence of a story of the bundled validation split, the first {config.n} that
name somebody in it ("… a little girl named Lily."), until the story ends or the context of
{context} tokens is full. The first row is how the original stories go on, cut at
the same length: what a model is to be held against, and not 100 %.

{md_table(HEADS, map(_cells, rows))}

![Measures against temperature](coherence.png)

- words: of a continuation, on average. distinct 1, 2, 3: share of different word n-grams among all
  of the {config.n} continuations (longer or fewer stories change it). repeated 4: share of word
  4-grams that the same continuation had before. new 4: share of 4-grams that no story of the
  bundled training split has.
- hero kept: share of continuations whose last third has the name of the opening; pronouns do not
  count. names: other names that a continuation brings in, on average. names back: share of these
  that come a second time. A name is a word with a capital where no sentence begins.
- perplexity: of the continuations under {judge.name} ({judge.net.n_parameters:,} parameters), which
  flatters what is likely: low is not good, but near that of the originals is.
- unfinished: share that had not ended where the context did.

The standard error of a share of {config.n} stories is {50 / config.n**0.5:.1f} points at 50 % and
{30 / config.n**0.5:.1f} at 90 %: rows that differ by less than three of them may do so by chance.
"""


def _cells(row: Row) -> list[str]:
    c, r = row.coherence, row.repetition
    return [
        row.run,
        "–" if row.temperature is None else f"{row.temperature:g}",
        f"{r.words:.0f}",
        *(_percent(share) for share in (*r.distinct, r.repeated, r.novel, c.hero_kept)),
        f"{c.names:.2f}",
        _percent(c.names_back),
        f"{row.perplexity:.2f}",
        _percent(c.unfinished),
    ]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def coherence_figure(rows: Sequence[Row]) -> Figure:
    """Six measures against temperature: a line for each run, a dashed one for the originals."""
    from matplotlib.figure import Figure  # here: slow to import; not pyplot: no global figures
    from matplotlib.ticker import LogLocator, NullLocator

    measures = {
        "different word 3-grams": lambda row: row.repetition.distinct[2],
        f"repeated {COPIED}-grams": lambda row: row.repetition.repeated,
        "hero kept to the last third": lambda row: row.coherence.hero_kept,
        "new names that come back": lambda row: row.coherence.names_back,
        "unfinished stories": lambda row: row.coherence.unfinished,
        "perplexity under the largest": lambda row: row.perplexity,
    }
    figure = Figure(figsize=(8.4, 5.4), layout="constrained")
    for axes, (title, value) in zip(figure.subplots(2, 3).flat, measures.items(), strict=True):
        for i, name in enumerate(dict.fromkeys(row.run for row in rows if row.run != ORIGINALS)):
            own = [row for row in rows if row.run == name]
            known = [(row.temperature, value(row)) for row in own if value(row) is not None]
            if known:
                axes.plot(*zip(*known, strict=True), "o-", color=f"C{i}", markersize=4, label=name)
        (human,) = [value(row) for row in rows if row.run == ORIGINALS]
        if human is not None:
            axes.axhline(human, color="#6b7280", linestyle="--", linewidth=1.2, label=ORIGINALS)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("temperature", fontsize=9)
        axes.tick_params(labelsize=9)
        axes.grid(color="#e5e7eb", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        if title.startswith("perplexity"):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda perplexity, _: f"{perplexity:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


# ------------------------------------------------------------------------------------ samples


def samples_markdown(models: Sequence[Model]) -> str:
    """samples.md: three stories of each model, as they came.

    The models are on the CPU, as for `minigpt generate`: a seed is another story elsewhere.
    """
    parts = [
        "# Samples",
        f"Three stories of each run, unedited: the prompt “{SAMPLE_PROMPT}”, temperature "
        f"{SAMPLE_TEMPERATURE:g}, at most {SAMPLE_TOKENS} tokens, seeds "
        f"{', '.join(map(str, SAMPLE_SEEDS))}. Each comes again with `minigpt generate <run> "
        f"--temperature {SAMPLE_TEMPERATURE:g} --max-tokens {SAMPLE_TOKENS} --seed <seed>`.",
    ]
    for model in models:
        parts.append(f"## {model.name}, {model.net.n_parameters:,} parameters")
        for seed in SAMPLE_SEEDS:
            sampling = SamplingConfig(SAMPLE_TEMPERATURE, max_tokens=SAMPLE_TOKENS, seed=seed)
            text = "".join(stream_text(model.net, model.tokenizer, SAMPLE_PROMPT, sampling))
            quoted = "\n".join(
                f"> {line}".rstrip() for line in f"{SAMPLE_PROMPT}{text}".split("\n")
            )
            parts += [f"Seed {seed}:", quoted]
    return "\n\n".join(parts) + "\n"
