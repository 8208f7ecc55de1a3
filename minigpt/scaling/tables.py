"""The scaling study as files: scaling.md, scaling.json and three figures; and its terminal table.

>>> runs = [read_run(folder) for folder in find_runs([Path("runs")])]
>>> groups = write_scaling(runs, Path("runs"))
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from minigpt.core.files import write_json, write_text
from minigpt.core.plots import write_png
from minigpt.core.text import human_count, md_table, value_cell
from minigpt.scaling.figures import compute_figure, scaling_figure, tokens_figure
from minigpt.scaling.fit import (
    COUNTED,
    MIN_SIZES,
    REPLICATES,
    Fit,
    Interval,
    RunGroup,
    SizeResult,
    by_size,
    run_groups,
    run_warnings,
)
from minigpt.scaling.results import REFERENCE, RunResult

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
SIZE_COLUMNS = (
    "runs of", "model", "runs", "spread", "epochs", "training loss", "validation loss", "gap",
    "rise", "predicted", "measured − predicted", "above interval",
)  # fmt: skip
REFERENCE_NOTE = (
    "The reference saw 104M tokens of the full TinyStories corpus: runs on other data or fewer "
    "tokens are not directly comparable."
)


def write_scaling(
    runs: Iterable[RunResult], out: Path, replicates: int = REPLICATES
) -> list[RunGroup]:
    """Write scaling.md, scaling.json and three figures into `out`, which is created if missing.

    Args:
        runs: finished or not, in any order.
        out: the folder.
        replicates: how often the bootstrap fits again.

    Returns:
        The groups of runs that can be compared, with their laws.
    """
    runs = by_size(runs)
    groups = run_groups(runs, replicates)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "scaling.md", markdown(runs, groups))
    write_json(out / "scaling.json", as_json(runs, groups))
    write_png(scaling_figure(groups), out / "scaling.png")
    write_png(tokens_figure(runs), out / "scaling-tokens.png")
    write_png(compute_figure(runs), out / "scaling-compute.png")
    return groups


def as_json(runs: Sequence[RunResult], groups: Sequence[RunGroup]) -> dict[str, Any]:
    """Return the numbers of the tables and figures as plain values."""

    def law(fit: Fit) -> dict[str, Any]:
        names = ("e", "a", "alpha", "residual", "seed_noise", "at_limit")
        intervals = {k: list(v) for k, v in fit.intervals.items()} if fit.intervals else None
        return {name: getattr(fit, name) for name in names} | {"intervals": intervals}

    return {
        "runs": [
            {"run": run.name, "group": run.group, "reference_perplexity": run.reference_perplexity}
            | {k: v for k, v in dataclasses.asdict(run).items() if k != "path"}
            for run in runs
        ],
        "groups": [
            {
                "label": group.label,
                "sizes": [dataclasses.asdict(size) | {"gap": size.gap} for size in group.sizes],
                "fits": {counted: law(fit) for counted, fit in group.fits.items()},
                "predictions": [
                    dataclasses.asdict(prediction) | {"above": prediction.above}
                    for prediction in group.predictions
                ],
            }
            for group in groups
        ],
        "warnings": run_warnings(runs),
        "reference": [dataclasses.asdict(model) for model in REFERENCE],
    }


# ---------------------------------------------------------------------------- terminal


def rich_table(runs: Iterable[RunResult]) -> Table:
    """Return the table of runs for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in COLUMNS.values():
        left = name in ("run", "model")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "run")
    for run in by_size(runs):
        row = [Text(cell, overflow="fold") for cell in _run_cells(run, human_count)]  # no markup
        table.add_row(*row, style="" if run.point else "yellow")
    return table


def law_line(group: RunGroup) -> str:
    """Return the law of a group on one line, or how many sizes it lacks."""
    law = group.fits.get("parameters")
    if law is None:
        return f"{group.label}: no fit, {len(group.sizes)} of {MIN_SIZES} sizes"
    return f"{group.label}: L = {law.e:.3f} + {law.a:.4g} / N^{law.alpha:.3f}"


# ---------------------------------------------------------------------------- scaling.md


def markdown(runs: Sequence[RunResult], groups: Sequence[RunGroup]) -> str:
    """Return scaling.md: tables of the runs, recipes, laws and sizes, and the figures."""
    warnings, recipes = run_warnings(runs), _recipe_rows(runs)
    laws = [_law_cells(group, counted) for group in groups for counted in group.fits]
    sizes = [_size_cells(group, size) for group in groups for size in group.sizes]
    parts = [
        "# Scaling",
        md_table(list(COLUMNS), [_run_cells(run, "{:,}".format) for run in runs], left=2),
        f"Validation at the end of each run. {REFERENCE_NOTE}",
        "\n".join(f"- {warning}" for warning in warnings),
        "![Perplexity against parameters](scaling.png)",
    ]
    if recipes:
        parts += [
            "## Recipes",
            md_table(
                ["model", "data", "recipe", "tokens", "runs", "perplexity", "lowest", "highest",
                 "bits per byte", "reference"],
                recipes,
                left=3,
            ),
            "Sizes that were trained by several recipes on as many tokens of the same data. "
            "Perplexity is that of the mean loss of the runs. `experiment=reference` is adamw, "
            "unscaled embeddings; the reference does not report its batch size and learning rate, "
            "so that those of conf/experiment/reference.yaml are untuned guesses.",
        ]  # fmt: skip
    if laws:
        parts += [
            "## Laws",
            md_table(
                ["runs of", "N", "E (nats)", "A", "α", "residual (nats)", "seed noise (nats)",
                 "warning"],
                laws,
                left=2,
            ),
            "L = E + A / N^α, by least squares on the mean loss of each size. In brackets: 95 % of "
            "the bootstrap replicates over seeds. They assume the same noise at all sizes, are too "
            "narrow where few sizes have several seeds, and do not test the law itself.",
        ]  # fmt: skip
    if sizes:
        parts += [
            "## Sizes",
            md_table(SIZE_COLUMNS, sizes, left=2),
            f"A group needs {MIN_SIZES} sizes for a law. Losses are nats per token. Training loss "
            "is the mean of the last 5 % of the run, with dropout where there is any. Spread is "
            "the range of the seeds, gap is validation − training loss, rise is the final − the "
            "lowest validation loss. Each size is predicted by the law through all smaller ones. "
            "Repeated data bends the curve where epochs are above 1, the gap grows with size, and "
            "the measured loss is above the interval of the prediction.",
        ]
    parts += [
        "## Tokens and compute",
        "Each curve shows the validations of one run. The learning rate has decayed only at its "
        "end (large dot): a run planned for fewer tokens would be lower there than a longer run "
        "that passes by.",
        "![Perplexity against tokens seen](scaling-tokens.png)",
        "FLOPs are 6 N + 12 L T d per token, N with the output matrix (PaLM, Chowdhery et al. "
        "2022, appendix B), times tokens.",
        "![Perplexity against compute](scaling-compute.png)",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _run_cells(run: RunResult, count: Callable[[float], str]) -> tuple[str, ...]:
    """Return the row of a run under `COLUMNS`; `count` formats numbers of parameters."""
    return (
        run.name if run.status == "finished" else f"{run.name} ({run.status})",
        run.model,
        "–" if run.parameters is None else count(run.parameters),
        "–" if run.non_embedding_parameters is None else count(run.non_embedding_parameters),
        human_count(run.tokens),
        str(run.seed),
        value_cell(run.loss, ".3f"),
        value_cell(run.perplexity, ".2f"),
        value_cell(run.bits_per_byte, ".3f"),
        value_cell(run.reference_perplexity, ".2f"),
    )


def _recipe_rows(runs: Sequence[RunResult]) -> list[list[str]]:
    """Return a row for each recipe of a size, data and token count that several recipes share."""
    cases: dict[tuple[int, str, str], dict[str, list[RunResult]]] = {}
    for run in by_size(runs):
        if run.point and run.parameters and run.loss is not None:
            tokens = human_count(float(f"{run.tokens:.2g}"))  # whole steps end near the budget
            recipes = cases.setdefault((run.parameters, run.data, tokens), {})
            recipes.setdefault(run.recipe, []).append(run)
    rows = []
    for (_, data, tokens), recipes in cases.items():
        for recipe, members in sorted(recipes.items()) if len(recipes) > 1 else ():
            run, several = members[0], len(members) > 1
            values = [run.perplexity for run in members if run.perplexity is not None]
            bits = [run.bits_per_byte for run in members if run.bits_per_byte is not None]
            rows.append(
                [
                    *(run.model, data, recipe, tokens, str(len(members))),
                    f"{math.exp(fmean(map(math.log, values))):.2f}",
                    value_cell(min(values) if several else None, ".2f"),
                    value_cell(max(values) if several else None, ".2f"),
                    value_cell(fmean(bits) if bits else None, ".3f"),
                    value_cell(run.reference_perplexity, ".2f"),
                ]
            )
    return rows


def _law_cells(group: RunGroup, counted: str) -> list[str]:
    fit, cells = group.fits[counted], []
    for name, form in (("e", ".3f"), ("a", ".4g"), ("alpha", ".3f")):
        interval = fit.intervals[name] if fit.intervals else None
        cells.append(format(getattr(fit, name), form) + _brackets(interval, form))
    numbers = f"{fit.residual:.4f}", value_cell(fit.seed_noise, ".4f")
    return [group.label, COUNTED[counted], *cells, *numbers, fit.at_limit or ""]


def _size_cells(group: RunGroup, size: SizeResult) -> list[str]:
    row = [
        *(group.label, size.model, str(size.runs)),
        value_cell(size.spread, ".3f"),
        value_cell(size.epochs, ".1f"),
        value_cell(size.train_loss, ".3f"),
        value_cell(size.loss, ".3f"),
        value_cell(size.gap, "+.3f"),
        value_cell(size.rise, ".3f"),
    ]
    for prediction in group.predictions:
        if prediction.n == size.parameters:
            return [
                *row,
                f"{prediction.predicted:.3f}{_brackets(prediction.interval, '.3f')}",
                f"{prediction.measured - prediction.predicted:+.3f}",
                {True: "yes", False: "no", None: "–"}[prediction.above],
            ]
    return [*row, "–", "–", "–"]


def _brackets(interval: Interval | None, form: str) -> str:
    return f" [{interval.low:{form}}, {interval.high:{form}}]" if interval else ""
