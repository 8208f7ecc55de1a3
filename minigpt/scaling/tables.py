"""The scaling study in words and tables: scaling.md, and the table of runs on the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from minigpt.core.text import human_count, md_table
from minigpt.scaling.figures import REFERENCE
from minigpt.scaling.fit import (
    LEAST_SIZES,
    Fit,
    Forecast,
    Interval,
)
from minigpt.scaling.groups import (
    COUNTED,
    Line,
    SizeResult,
    by_size,
    doubts,
)
from minigpt.scaling.results import RunResult

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = {  # heading in scaling.md: heading on the terminal, where the row has 80 characters
    "run": "run",
    "model": "model",
    "parameters": "params",
    "non-embedding parameters": "non-emb.",
    "tokens": "tokens",
    "seed": "seed",
    "nats/token": "nats",
    "perplexity": "ppl",
    "bits per byte": "bits/B",
    "reference perplexity": "ref.",
}


def reference_perplexity(run: RunResult) -> float | None:
    """The reference's perplexity at exactly this parameter count, if it has one."""
    known = {model.parameters: model.perplexity for model in REFERENCE}
    return known.get(run.parameters or 0)


def cells(run: RunResult, count: Callable[[float], str]) -> tuple[str, ...]:
    """One row of the table, under `COLUMNS`; `count` writes the parameters; a dash: not known."""
    return (
        run.name if run.status == "finished" else f"{run.name} ({run.status})",
        run.model,
        "–" if run.parameters is None else count(run.parameters),
        "–" if run.non_embedding_parameters is None else count(run.non_embedding_parameters),
        human_count(run.tokens),
        str(run.seed),
        _text(run.loss, ".3f"),
        _text(run.perplexity, ".2f"),
        _text(run.bits_per_byte, ".3f"),
        _text(reference_perplexity(run), ".2f"),
    )


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def notes(runs: Sequence[RunResult]) -> str:
    """What a reader must know before comparing two rows."""
    sources = sorted({run.data for run in runs})
    text = (
        f"Validation at the end of each run, on {', '.join(sources)}. The reference saw 104M "
        "tokens of the full TinyStories corpus, and does not say of which release: a run on other "
        "data or fewer tokens is not like for like."
    )
    text += "".join(f" {doubt}" for doubt in doubts(runs))
    left_out = sum(run.point is None for run in runs)
    if left_out:
        text += (
            f" Not in the figure, as they did not finish or have no finite loss: {left_out} of "
            f"{len(runs)} runs."
        )
    return text


def rich_table(runs: Iterable[RunResult]) -> Table:
    """The table of runs for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in COLUMNS.values():
        left = name in ("run", "model")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "run")
    for run in by_size(runs):
        style = "" if run.point else "yellow"
        row = [Text(cell, overflow="fold") for cell in cells(run, human_count)]  # [x] is no markup
        table.add_row(*row, style=style)
    return table


def markdown(runs: Sequence[RunResult], lines: Sequence[Line]) -> str:
    """scaling.md: the runs, the figures, and for each line its fit and what repetition does."""
    rows = [cells(run, "{:,}".format) for run in runs]
    parts = [
        "# Scaling",
        md_table(list(COLUMNS), rows, left=2),
        notes(runs),
        "![Perplexity against parameters](scaling.png)",
        *_recipes_markdown(runs),
        *(part for line in lines if line.fits for part in _line_markdown(line)),
        *_unfitted_markdown([line for line in lines if not line.fits]),
        "## Tokens and compute",
        "Each curve is the validations of a run on its way. The learning rate had decayed at the "
        "ends alone (large dots): a run that was planned for as many tokens would stand lower "
        "than a longer one passing there.",
        "![Perplexity against tokens seen](scaling-tokens.png)",
        "FLOPs are 6 N + 12 L T d a token, N with the output matrix (PaLM, Chowdhery et al. 2022, "
        "appendix B), times tokens.",
        "![Perplexity against compute](scaling-compute.png)",
    ]
    return "\n\n".join(parts) + "\n"


def _recipes_markdown(runs: Sequence[RunResult]) -> list[str]:
    """Recipes side by side, where a size was trained by several on as much of the same data."""
    cases: dict[tuple[int, str, str], dict[str, list[RunResult]]] = {}
    for run in by_size(runs):
        if run.point and run.parameters and run.loss is not None:
            tokens = human_count(float(f"{run.tokens:.2g}"))  # steps of any size end near enough
            case = run.parameters, run.data, tokens
            cases.setdefault(case, {}).setdefault(run.recipe, []).append(run)
    compared = {case: found for case, found in cases.items() if len(found) > 1}
    if not compared:
        return []
    recipes = sorted({recipe for found in compared.values() for recipe in found})
    rows = []
    for (_, data, tokens), found in compared.items():
        run = next(iter(found.values()))[0]
        row = [run.model, data, tokens, _text(reference_perplexity(run), ".2f")]
        rows.append(row + [_mean_of_seeds(found.get(recipe, [])) for recipe in recipes])
    heads = ["model", "data", "tokens", "reference as reported", *recipes]
    return [
        "## Recipes",
        md_table(heads, rows, left=2),
        "Perplexity and bits per byte at the end, the mean of the seeds by its loss, lowest and "
        "highest perplexity in brackets. The recipe of `experiment=reference` is adamw, plain sum: "
        "the reference tells neither its batch nor its learning rate, which are guesses here "
        "(conf/experiment/reference.yaml), not tuned. What is reported of it is after 104M tokens "
        "of the full corpus.",
    ]


def _mean_of_seeds(runs: Sequence[RunResult]) -> str:
    found = sorted(run.perplexity for run in runs if run.perplexity is not None)
    bits = [run.bits_per_byte for run in runs if run.bits_per_byte is not None]
    if not found:
        return "–"
    mean = math.exp(fmean(map(math.log, found)))
    spread = f" [{found[0]:.2f}, {found[-1]:.2f}], {len(found)} seeds" if len(found) > 1 else ""
    return f"{mean:.2f}{spread}" + (f" · {fmean(bits):.3f}" if bits else "")


def _line_markdown(line: Line) -> list[str]:
    laws = [[COUNTED[counted], *_law_cells(fit)] for counted, fit in line.fits.items()]
    heads = ["N", "E (nats)", "A", "α", "residual (nats)"]
    limits = {f"{COUNTED[c]}: {fit.at_limit}." for c, fit in line.fits.items() if fit.at_limit}
    return [
        f"## {line.label}",
        "L = E + A / N^α, least squares on the mean loss of each size.",
        md_table(heads, laws),
        *sorted(limits),
        _about_intervals(line.fits["parameters"]),
        "### Repetition of the data",
        md_table(
            [
                "model", "runs", "spread", "epochs", "training loss", "validation loss", "gap",
                "rise from its lowest", "foretold", "measured − foretold",
            ],
            [_size_cells(size, line.forecasts) for size in line.sizes],
        ),
        "Training loss is the mean of the last 5 % of the run, with dropout on where there is any, "
        "so that the gap is smaller than it would be without. The spread is that of the seeds, "
        "highest less lowest validation loss. Each size is foretold by the fit to "
        "all smaller ones.",
        f"**{line.verdict}**",
    ]  # fmt: skip


def _unfitted_markdown(lines: Sequence[Line]) -> list[str]:
    """What repetition does on the lines of too few sizes, in one table."""
    if not lines:
        return []
    found = [(line.label, *_size_cells(size)[:7]) for line in lines for size in line.sizes]
    heads = ["runs of", "model", "runs", "spread", "epochs", "training loss", "validation loss"]
    return [
        "## Too few sizes for a fit",
        f"Three unknowns need at least {LEAST_SIZES} sizes with the same data, tokens and recipe: "
        "`python train.py -m experiment=scaling` trains eight.",
        md_table([*heads, "gap"], found, left=2),
    ]


def _law_cells(fit: Fit) -> list[str]:
    numbers = {"e": ".3f", "a": ".4g", "alpha": ".3f"}
    found = []
    for name, form in numbers.items():
        span = fit.intervals[name] if fit.intervals else None
        found.append(format(getattr(fit, name), form) + _span(span, form))
    return [*found, f"{fit.residual:.4f}"]


def _span(span: Interval | None, form: str) -> str:
    return f" [{span.low:{form}}, {span.high:{form}}]" if span else " (no interval)"


def _about_intervals(fit: Fit) -> str:
    if fit.seed_noise is None:
        return (
            "No interval can be had, as each size has one run: "
            "python train.py -m experiment=scaling_seeds makes second ones."
        )
    twice = sum(len(size.losses) > 1 for size in fit.sizes)
    return (
        f"Intervals are 95 % of {len(fit.replicates)} bootstrap replicates over seeds, whose "
        f"standard deviation is {fit.seed_noise:.4f} nats, pooled over the {twice} of "
        f"{len(fit.sizes)} sizes that have several runs and taken to be alike at all. They say how "
        "far chance moves the fit, and not whether the law holds; so few seeds know their own "
        "noise only roughly, so that the intervals are rather too narrow."
    )


def _size_cells(size: SizeResult, foretold: Sequence[Forecast] = ()) -> list[str]:
    (forecast,) = [f for f in foretold if f.n == size.parameters] or [None]
    return [
        size.model,
        str(size.runs),
        _text(size.spread, ".3f"),
        _text(size.epochs, ".1f"),
        _text(size.train_loss, ".3f"),
        _text(size.loss, ".3f"),
        _text(size.gap, "+.3f"),
        _text(size.rise, ".3f"),
        f"{forecast.predicted:.3f}{_span(forecast.interval, '.3f')}" if forecast else "–",
        f"{forecast.measured - forecast.predicted:+.3f}" if forecast else "–",
    ]
