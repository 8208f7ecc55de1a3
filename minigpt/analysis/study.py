"""Compare trained models: coherence of their stories, sample stories, and word embeddings.

>>> write_study([Run.load("runs/small"), Run.load("runs/large")], Path("docs/results"))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from minigpt.analysis import analogies
from minigpt.analysis.coherence import (
    Coherence,
    Continuation,
    coherence,
    original_continuations,
    score,
    story_openings,
    write_continuations,
)
from minigpt.analysis.embedding_map import FewWordsError, caption, embedding_map, write_map
from minigpt.analysis.embeddings import EmbeddingProbe
from minigpt.analysis.repetition import COPIED, NOVELTY_STORIES, Repetition, measure
from minigpt.core import plots
from minigpt.core.console import log
from minigpt.core.fields import documented
from minigpt.core.files import write_json, write_text
from minigpt.core.hardware import Hardware
from minigpt.core.settings import UserError, check
from minigpt.core.text import md_table, percent, value_cell
from minigpt.data.sources import bundled_sample
from minigpt.generation.sampling import SamplingConfig, stream_text
from minigpt.kernels.choice import kernels_for
from minigpt.model import GPT
from minigpt.runs.folder import Run
from minigpt.tokenizer import Tokenizer

TINYSTORIES = ("tinystories", "tinystories_sample")  # values of data.source that suit the study

ORIGINALS = "the original stories"  # name of the baseline's row, also in coherence.json
SAMPLE_SEEDS = (1, 2, 3)  # seeds of the stories in samples.md
# Keys of coherence.json that differ from the names of the fields, for compatibility with old files.
JSON_NAMES = {"protagonist_retention": "hero_kept", "name_recurrence": "names_back"}
SAMPLE_PROMPT, SAMPLE_TEMPERATURE, SAMPLE_TOKENS = "Once upon a time", 0.8, 256


@documented
@dataclass(frozen=True)
class StudyConfig:
    """Settings of the stories that the study compares."""

    n: int = 200
    """Number of stories that each model writes at each temperature."""
    temperatures: tuple[float, ...] = (0.5, 0.8, 1.0, 1.2)
    """Sampling temperatures of the stories."""
    seed: int = 1
    """Sampling seed, the same at each temperature."""

    def __post_init__(self) -> None:
        check(self, "must be at least 1", lambda n: n >= 1, "n")
        check(self, "must not be negative", lambda seed: seed >= 0, "seed")


@dataclass(frozen=True)
class Row:
    """Measures of one model at one temperature, or of the original stories (temperature None)."""

    run: str
    parameters: int | None
    temperature: float | None
    coherence: Coherence
    repetition: Repetition
    perplexity: float  # of the stories under the largest model


@dataclass(frozen=True)
class StudiedModel:
    """A loaded model with its tokenizer and the name of its run."""

    name: str
    net: GPT
    tokenizer: Tokenizer


def write_study(runs: Sequence[Run], out: Path, config: StudyConfig | None = None) -> None:
    """Write the reports coherence.md, samples.md and embeddings.md, with a figure and JSON files.

    For each run, a map of words is also written as a PNG file, if enough of the words are single
    tokens of the run's tokenizer.

    Args:
        runs: the runs to compare, with different names.
        out: output folder, created if missing.
        config: settings of the stories; None means the defaults.

    Raises:
        UserError: two runs have the same name; the runs differ in tokenizer or context length, so
            that the largest model cannot score all stories; or `story_openings` finds fewer than
            `config.n` openings in the validation stories.
    """
    config = config or StudyConfig()
    models = _load_models(runs)
    for run in runs:
        if (source := (run.config.get("data") or {}).get("source")) not in TINYSTORIES:
            problem = "%s was trained on data.source=%s, but this study is for TinyStories"
            log.warning(problem, run.folder, source)
    out.mkdir(parents=True, exist_ok=True)
    probes = {m.name: EmbeddingProbe(m.net, m.tokenizer) for m in models}
    answers = {name: analogies.ask(probe) for name, probe in probes.items()}
    parts = analogies.markdown(answers).rstrip(), *_write_maps(probes, out), ""
    write_text(out / "embeddings.md", "\n\n".join(parts))
    plain = {n: dataclasses.asdict(a) | {"summary": a.summary} for n, a in answers.items()}
    write_json(out / "embeddings.json", plain)
    write_text(out / "samples.md", samples_markdown(models))
    device = Hardware.single("32-true").accelerator
    for model in models:
        model.net.to(device).use(kernels_for(device))
    rows = study_rows(models, config)
    write_text(out / "coherence.md", coherence_markdown(rows, models, config))
    settings = dataclasses.asdict(config) | {"judge": models[-1].name}
    write_json(out / "coherence.json", {"settings": settings, "rows": list(map(_row_json, rows))})
    plots.write_png(coherence_figure(rows), out / "coherence.png")


def _load_models(runs: Sequence[Run]) -> list[StudiedModel]:
    """Load the models on the CPU, and return them sorted by size, smallest first."""
    folders = [run.folder.resolve() for run in runs]
    names = [folder.name for folder in folders]
    if len(set(folders)) < len(folders):
        raise UserError("a run is given twice: give each run once", "runs", names)
    if len(set(names)) < len(names):
        raise UserError("two runs have the same name; rename one of the folders", "runs", names)
    pairs = zip(names, runs, strict=True)
    models = [StudiedModel(name, run.load_model(), run.tokenizer) for name, run in pairs]
    if len({(m.tokenizer.fingerprint, m.net.config.context_length) for m in models}) > 1:
        problem = (
            "the runs differ in tokenizer or context length, so no single model can score the "
            "stories of all of them"
        )
        raise UserError(f"{problem}; study each run separately", "runs", names)
    return sorted(models, key=lambda model: model.net.n_parameters)


def _write_maps(probes: Mapping[str, EmbeddingProbe], out: Path) -> list[str]:
    """Write maps of words, and return the paragraphs of embeddings.md about the maps."""
    text = []
    for name, probe in probes.items():
        try:
            layout = embedding_map(probe)
            write_map(layout, out / f"map-{name}.png")
            text += [f"![Map of words of {name}](<map-{name}.png>)", f"{name}: {caption(layout)}"]
        except FewWordsError as error:
            text.append(f"{name}: no map, {error}")
    return ["## Maps of words", *text]


def _row_json(row: Row) -> dict[str, Any]:
    """Return a row for coherence.json; fields that were renamed keep their old keys."""
    plain = dataclasses.asdict(row)
    renamed = {JSON_NAMES.get(key, key): value for key, value in plain["coherence"].items()}
    return plain | {"coherence": renamed}


# ---------------------------------------------------------------------------------- coherence


def study_rows(models: Sequence[StudiedModel], config: StudyConfig) -> list[Row]:
    """Return the row of the original stories, then a row for each model and temperature.

    Args:
        models: the models, sorted by size; the last one scores all stories.
        config: settings of the stories.
    """
    judge, tokenizer = models[-1].net, models[-1].tokenizer
    context = judge.config.context_length
    openings = story_openings(bundled_sample().stories("valid"), tokenizer, config.n, context)
    groups: list[tuple[str, int | None, float | None, list[Continuation]]] = [
        (ORIGINALS, None, None, original_continuations(openings, tokenizer, context))
    ]
    for model in models:
        for temperature in config.temperatures:
            log.info("%s: %d stories at temperature %g", model.name, config.n, temperature)
            stories = write_continuations(model.net, tokenizer, openings, temperature, config.seed)
            groups.append((model.name, model.net.n_parameters, temperature, stories))
    training = islice(bundled_sample().stories("train"), NOVELTY_STORIES)
    repetitions, _ = measure([[s.text for s in stories] for *_, stories in groups], training)
    end = tokenizer.end_of_text
    return [
        Row(name, size, temperature, coherence(stories), repetition, score(judge, stories, end))
        for (name, size, temperature, stories), repetition in zip(groups, repetitions, strict=True)
    ]


HEADS = (
    "run", "temperature", "words", "distinct 1-grams", "distinct 2-grams", "distinct 3-grams",
    "repeated 4-grams", "new 4-grams", "protagonist retention", "names", "name recurrence",
    "perplexity", "unfinished",
)  # fmt: skip


def coherence_markdown(
    rows: Sequence[Row], models: Sequence[StudiedModel], config: StudyConfig
) -> str:
    """Return the content of coherence.md: method, table, figure and definitions of the measures.

    Args:
        rows: the rows of the table, from `study_rows`.
        models: the models, sorted by size.
        config: settings of the stories.
    """
    context, judge = models[-1].net.config.context_length, models[-1]
    return f"""# Coherence and temperature

Each run wrote {config.n} stories at each temperature, with seed {config.seed} and without top-k
or top-p. A story continues the first sentence of a validation story that names its protagonist,
until it ends or fills the context of {context} tokens. The first row is the baseline: the
rest of those validation stories, cut at the same length.

{md_table(HEADS, map(_cells, rows))}

![Measures against temperature](coherence.png)

With more than three runs, the figure shows the smallest, the middle and the largest.
All measures except perplexity are heuristics of coherence that count words and names.

- words: mean number of words in a continuation.
- distinct n-grams: fraction of distinct word n-grams in all continuations together.
- repeated 4-grams: fraction of word 4-grams that occurred earlier in the same continuation.
- new 4-grams: fraction of word 4-grams that are in no story of the bundled training split.
- protagonist retention: fraction of continuations whose last third has the opening's name.
- names: mean number of other names. A name is a capitalised word inside a sentence.
- name recurrence: fraction of these names that occur more than once.
- perplexity: under {judge.name} ({judge.net.n_parameters:,} parameters). Dull stories have a low
  perplexity, too.
- unfinished: fraction of continuations that did not end within the context.

The standard error of a fraction of {config.n} stories is {50 / config.n**0.5:.1f} percentage points
at 50 % and {30 / config.n**0.5:.1f} at 90 %. A difference of less than three standard errors may
be chance.
"""


def _cells(row: Row) -> list[str]:
    c, r = row.coherence, row.repetition
    return [
        row.run,
        value_cell(row.temperature, "g"),
        f"{r.words:.0f}",
        *map(percent, (*r.distinct, r.repeated, r.novel, c.protagonist_retention)),
        f"{c.names:.2f}",
        percent(c.name_recurrence),
        f"{row.perplexity:.2f}",
        percent(c.unfinished),
    ]


def coherence_figure(rows: Sequence[Row]) -> Figure:
    """Plot six measures against temperature; dashed lines show the original stories.

    With more than three runs, only the first, the middle and the last run are drawn.
    """
    measures = {
        "distinct word 3-grams": lambda row: row.repetition.distinct[2],
        f"repeated word {COPIED}-grams": lambda row: row.repetition.repeated,
        "protagonist retention": lambda row: row.coherence.protagonist_retention,
        "name recurrence": lambda row: row.coherence.name_recurrence,
        "unfinished stories": lambda row: row.coherence.unfinished,
        "perplexity under the largest": lambda row: row.perplexity,
    }
    figure = plots.new_figure(8, 5.6, rows=2, columns=3)
    names = list(dict.fromkeys(row.run for row in rows if row.run != ORIGINALS))
    shown = [names[i] for i in sorted({0, len(names) // 2, len(names) - 1})]
    temperatures = sorted({row.temperature for row in rows if row.temperature is not None})
    for axes, (title, value) in zip(figure.axes, measures.items(), strict=True):
        for name, colour, marker in zip(shown, plots.COLOURS, plots.MARKERS, strict=False):
            own = [(row.temperature, value(row)) for row in rows if row.run == name]
            points = np.array(own, float).T  # None becomes NaN, which is not drawn
            axes.plot(*points, f"{marker}-", color=colour, markersize=4, label=plots.plain(name))
        (original,) = [value(row) for row in rows if row.run == ORIGINALS]
        if original is not None:
            axes.axhline(original, color=plots.REFERENCE_COLOUR, linestyle="--", label=ORIGINALS)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("temperature")
        axes.set_xticks(temperatures, [f"{temperature:g}" for temperature in temperatures])
        if title.startswith("perplexity"):
            axes.set_yscale("log")
            plots.log_ticks(axes.yaxis, (1, 2, 5), "{:g}".format)
        else:
            axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
    title = "Generated stories by temperature, compared with the original stories (dashed)"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=plots.INK)
    legend = figure.axes[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=4, frameon=False, labelcolor=plots.INK)
    return figure


# ------------------------------------------------------------------------------------ samples


def samples_markdown(models: Sequence[StudiedModel]) -> str:
    """Return the content of samples.md: three unedited stories of each model.

    samples.md names the commands `minigpt generate` that give the same stories. These commands run
    on the CPU. So the models must be on the CPU, too: on another device, the same seed may give
    another story.
    """
    parts = [
        "# Samples",
        f"These unedited stories are from `minigpt generate <run> --prompt '{SAMPLE_PROMPT}' "
        f"--temperature {SAMPLE_TEMPERATURE:g} --max-tokens {SAMPLE_TOKENS} --seed <seed>`.",
    ]
    for model in models:
        parts.append(f"## {model.name}, {model.net.n_parameters:,} parameters")
        for seed in SAMPLE_SEEDS:
            sampling = SamplingConfig(SAMPLE_TEMPERATURE, max_tokens=SAMPLE_TOKENS, seed=seed)
            text = "".join(stream_text(model.net, model.tokenizer, SAMPLE_PROMPT, sampling))
            lines = f"{SAMPLE_PROMPT}{text}".split("\n")
            parts += [f"Seed {seed}:", "\n".join(f"> {line}".rstrip() for line in lines)]
    return "\n\n".join(parts) + "\n"
