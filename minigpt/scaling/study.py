"""Runs in, scaling study out: how perplexity falls as the model grows, and what bends it.

>>> runs = [read_run(folder) for folder in find_runs([Path("runs")])]
>>> write_scaling(runs, Path("runs"))  # scaling.md, scaling.json, three figures
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minigpt.core.files import write_json, write_text
from minigpt.core.plots import write_png
from minigpt.scaling.figures import (
    REFERENCE,
    compute_figure,
    curves,
    scaling_figure,
    tokens_figure,
)
from minigpt.scaling.fit import REPLICATES, Fit
from minigpt.scaling.groups import Line, by_size, study_lines
from minigpt.scaling.results import RunResult
from minigpt.scaling.tables import markdown, reference_perplexity


def write_scaling(runs: Iterable[RunResult], out: Path, replicates: int = REPLICATES) -> list[Line]:
    """Write scaling.md, scaling.json and the figures into `out`, made if missing; the lines.

    `replicates` is how often the bootstrap fits again.
    """
    runs = by_size(runs)
    lines = study_lines(runs, replicates)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "scaling.md", markdown(runs, lines))
    write_json(out / "scaling.json", as_json(runs, lines))
    laws = {line.label: line.fits["parameters"] for line in lines if "parameters" in line.fits}
    write_png(scaling_figure(runs, laws), out / "scaling.png")
    write_png(tokens_figure(runs), out / "scaling-tokens.png")
    write_png(compute_figure(runs), out / "scaling-compute.png")
    return lines


def as_json(runs: Sequence[RunResult], lines: Sequence[Line]) -> dict[str, Any]:
    """The rows of the tables and the points of the figures, as plain values."""

    def law(fit: Fit) -> dict[str, Any]:
        names = ("e", "a", "alpha", "residual", "seed_noise", "at_limit")
        intervals = {k: list(v) for k, v in fit.intervals.items()} if fit.intervals else None
        return {name: getattr(fit, name) for name in names} | {"intervals": intervals}

    return {
        "runs": [
            {"run": run.name, "line": run.line, "reference_perplexity": reference_perplexity(run)}
            | {k: v for k, v in dataclasses.asdict(run).items() if k != "path"}
            for run in runs
        ],
        "figure": {
            label: [dataclasses.asdict(point) for point in line]
            for label, line in curves(runs).items()
        },
        "lines": [
            {
                "label": line.label,
                "sizes": [dataclasses.asdict(size) | {"gap": size.gap} for size in line.sizes],
                "fits": {counted: law(fit) for counted, fit in line.fits.items()},
                "forecasts": [dataclasses.asdict(forecast) for forecast in line.forecasts],
                "verdict": line.verdict,
            }
            for line in lines
        ],
        "reference": [dataclasses.asdict(model) for model in REFERENCE],
    }
