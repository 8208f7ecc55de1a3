"""Output of the scaling study: scaling.md, scaling.json, three figures, and a terminal table.

>>> runs = [read_run(folder) for folder in find_runs([Path("runs")])]
>>> groups = write_scaling(runs, Path("runs"))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table
from rich.text import Text

from minigpt.core.files import write_json, write_text
from minigpt.core.plots import write_png
from minigpt.core.text import human_count, md_table, value_cell
from minigpt.scaling.figures import compute_figure, scaling_figure, tokens_figure
from minigpt.scaling.fit import (
    MIN_SIZES,
    PARAMETER_COUNTS,
    REPLICATES,
    Interval,
    RunGroup,
    SizeResult,
    by_size,
    run_groups,
    run_warnings,
    size_result,
)
from minigpt.scaling.results import REFERENCE, RunResult

COLUMNS = {  # heading in scaling.md: shorter heading for a terminal of 80 columns
    "run": "run",
    "model": "model",
    "parameters": "params",
    "non-embedding parameters": "non-emb.",
    "tokens": "tokens",
    "teachers' tokens": "teachers",
    "seed": "seed",
    "nats/token": "nats",
    "perplexity": "ppl",
    "bits per byte": "bits/B",
    "reference perplexity": "ref.",
}
RECIPE_COLUMNS = (
    "model", "data", "recipe", "tokens", "runs", "perplexity", "lowest perplexity",
    "highest perplexity", "bits per byte", "reference perplexity",
)  # fmt: skip
LAW_COLUMNS = (
    "run group", "N", "E (nats)", "A", "α", "residual (nats)", "seed noise (nats)", "warning",
)  # fmt: skip
SIZE_COLUMNS = (
    "run group", "model", "runs", "spread", "epochs", "training loss", "validation loss", "gap",
    "rise", "predicted loss", "measured − predicted", "above interval",
)  # fmt: skip
REFERENCE_NOTE = "The reference models saw 104M tokens of the full TinyStories corpus."


def write_scaling(
    runs: Iterable[RunResult], out: Path, replicates: int = REPLICATES
) -> list[RunGroup]:
    """Write scaling.md, scaling.json and three figures into `out`, which is created if missing.

    Args:
        runs: results of runs, finished or not, in any order.
        out: output folder.
        replicates: number of bootstrap fits.

    Returns:
        The groups of comparable runs, with their fitted laws.
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
    """Return the numbers that the tables and figures show, as plain values."""
    law = ("e", "a", "alpha", "residual", "seed_noise", "at_limit", "intervals")
    return {
        "runs": [
            {"run": run.name, "group": run.group, "reference_perplexity": run.reference_perplexity}
            | {k: v for k, v in asdict(run).items() if k != "path"}
            for run in runs
        ],
        "groups": [
            {
                "label": group.label,
                "sizes": list(map(asdict, group.sizes)),
                "fits": {n: {k: getattr(fit, k) for k in law} for n, fit in group.fits.items()},
                "predictions": list(map(asdict, group.predictions)),
            }
            for group in groups
        ],
        "warnings": run_warnings(runs),
        "reference": list(map(asdict, REFERENCE)),
    }


# ---------------------------------------------------------------------------- terminal


def rich_table(runs: Iterable[RunResult]) -> Table:
    """Return the table of runs for the terminal, with the columns of the table in scaling.md."""
    table, runs = Table(box=None, padding=(0, 1, 0, 0), header_style="bold"), by_size(runs)
    columns, rows = _run_rows(runs, human_count)
    for name in (COLUMNS[column] for column in columns):
        left = name in ("run", "model")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "run")
    for run, cells in zip(runs, rows, strict=True):
        row = [Text(cell, overflow="fold") for cell in cells]  # no markup
        table.add_row(*row, style="" if run.point else "yellow")
    return table


def law_line(group: RunGroup) -> str:
    """Return a line with the scaling law of a group, or with the reason why no law was fitted."""
    if (law := group.fits.get("parameters")) is None:
        return f"{group.label}: no fit, has {len(group.sizes)} of the {MIN_SIZES} sizes needed"
    return f"{group.label}: L = {law.e:.3f} + {law.a:.4g} / N^{law.alpha:.3f}"


# ---------------------------------------------------------------------------- scaling.md


def markdown(runs: Sequence[RunResult], groups: Sequence[RunGroup]) -> str:
    """Return the text of scaling.md: figures, and tables of the runs, recipes, laws and sizes."""
    laws = [_law_cells(group, attribute) for group in groups for attribute in group.fits]
    sizes = [_size_cells(group, size) for group in groups for size in group.sizes]
    parts = [
        "# Scaling",
        md_table(*_run_rows(runs, "{:,}".format), left=2),
        f"Validation loss is measured at the end of each run. {REFERENCE_NOTE}",
        "\n".join(f"- {warning}" for warning in run_warnings(runs)),
        "![Perplexity against parameters](scaling.png)",
        "The figure shows the run group with the most sizes, and lower means from other groups.",
    ]
    for title, columns, rows, left, note in (
        (
            "Recipes", RECIPE_COLUMNS, _recipe_rows(runs), 3,
            "Each comparison is at one model size, data set and token count. Perplexity is "
            "exp(mean loss over the runs).",
        ),
        (
            "Laws", LAW_COLUMNS, laws, 2,
            "L = E + A / N^α by least squares, with 95 % intervals from a bootstrap over seeds.",
        ),
        (
            "Sizes", SIZE_COLUMNS, sizes, 2,
            "Losses are in nats per token. Spread: highest − lowest validation loss of the runs. "
            "Epochs: passes over the training split, without those of a parent run. "
            "Gap: validation − training loss, the latter over the last 5 % of the run. Rise: "
            "final − lowest validation loss. Predicted loss: from the law of all smaller sizes.",
        ),
    ):  # fmt: skip
        if rows:
            parts += [f"## {title}", md_table(columns, rows, left), note]
    parts += [
        "## Tokens and compute",
        "![Perplexity against tokens seen](scaling-tokens.png)",
        "![Perplexity against compute](scaling-compute.png)",
        "Each point is a validation, and the last point of a run is larger: only there has the "
        "learning rate decayed. The figures show at most three model sizes, first those with the "
        "most common data and recipe, then those trained on the most tokens. Training costs "
        "6 N + 12 L T d FLOPs per token, where N includes the output matrix.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _run_rows(
    runs: Sequence[RunResult], count: Callable[[float], str]
) -> tuple[list[str], list[list[str]]]:
    """Return the columns of the table of runs, as keys of `COLUMNS`, and the cells of each run.

    The number of tokens that the teachers saw is left out if no run has teachers. `count` formats
    parameter counts.
    """
    taught = any(run.teacher_tokens != 0 for run in runs)
    columns = [name for name in COLUMNS if taught or name != "teachers' tokens"]
    rows = [dict(zip(COLUMNS, _run_cells(run, count), strict=True)) for run in runs]
    return columns, [[row[name] for name in columns] for row in rows]


def _run_cells(run: RunResult, count: Callable[[float], str]) -> tuple[str, ...]:
    """Return the cells of a run in the order of `COLUMNS`; `count` formats parameter counts."""
    sizes, tokens = (run.parameters, run.non_embedding_parameters), (run.tokens, run.teacher_tokens)
    return (
        run.name if run.status == "finished" else f"{run.name} ({run.status})",
        run.model,
        *("–" if n is None else count(n) for n in sizes),
        *("–" if n is None else human_count(n) for n in tokens),
        str(run.seed),
        value_cell(run.loss, ".3f"),
        value_cell(run.perplexity, ".2f"),
        value_cell(run.bits_per_byte, ".3f"),
        value_cell(run.reference_perplexity, ".2f"),
    )


def _recipe_rows(runs: Sequence[RunResult]) -> list[list[str]]:
    """Return the rows of the table that compares recipes.

    For each combination of size, data set and token count with several recipes, there is one row
    per recipe. Runs with an unknown number of tokens are left out.
    """
    cases: dict[tuple[int, str, int], dict[str, list[RunResult]]] = {}
    budgets: list[int] = []  # token counts, the largest of those that differ by less than 1 %
    finished = [run for run in by_size(runs) if run.point and run.loss is not None]
    for tokens in sorted((run.tokens for run in finished if run.tokens is not None), reverse=True):
        if not budgets or tokens < 0.99 * budgets[-1]:
            budgets.append(tokens)
    for run in finished:
        if run.point is None or run.tokens is None:
            continue
        tokens = next(n for n in reversed(budgets) if run.tokens <= n)
        recipes = cases.setdefault((run.point[0], run.corpus, tokens), {})
        recipes.setdefault(run.recipe, []).append(run)
    rows = []
    for (_, data, tokens), recipes in cases.items():
        for recipe, members in sorted(recipes.items()) if len(recipes) > 1 else ():
            size = size_result(members)
            limits = (size.lowest, size.highest) if size.runs > 1 else (None, None)
            bits = [run.bits_per_byte for run in members if run.bits_per_byte is not None]
            numbers = (value_cell(value, ".2f") for value in (size.perplexity, *limits))
            bits = value_cell(fmean(bits) if bits else None, ".3f")
            reference = value_cell(members[0].reference_perplexity, ".2f")
            names = size.model, data, recipe, human_count(tokens), str(size.runs)
            rows.append([*names, *numbers, bits, reference])
    return rows


def _law_cells(group: RunGroup, attribute: str) -> list[str]:
    fit, forms = group.fits[attribute], {"e": ".3f", "a": ".4g", "alpha": ".3f"}
    limits = fit.intervals or {}
    cells = (_with_interval(getattr(fit, k), limits.get(k), form) for k, form in forms.items())
    numbers = f"{fit.residual:.4f}", value_cell(fit.seed_noise, ".4f")
    return [group.label, PARAMETER_COUNTS[attribute], *cells, *numbers, fit.at_limit or ""]


def _size_cells(group: RunGroup, size: SizeResult) -> list[str]:
    losses = (size.train_loss, ".3f"), (size.loss, ".3f"), (size.gap, "+.3f"), (size.rise, ".3f")
    numbers = (size.spread, ".3f"), (size.epochs, ".1f"), *losses
    predicted = ["–", "–", "–"]  # loss, difference, whether above the interval
    for prediction in group.predictions:
        if prediction.n == size.parameters:
            predicted = [
                _with_interval(prediction.predicted, prediction.interval, ".3f"),
                f"{prediction.measured - prediction.predicted:+.3f}",
                {True: "yes", False: "no", None: "–"}[prediction.above],
            ]
    cells = (value_cell(value, form) for value, form in numbers)
    return [group.label, size.model, str(size.runs), *cells, *predicted]


def _with_interval(value: float, interval: Interval | None, form: str) -> str:
    brackets = f" [{interval.low:{form}}, {interval.high:{form}}]" if interval else ""
    return format(value, form) + brackets
