"""Figures of the scaling study: perplexity against parameters, tokens and compute.

All axes are logarithmic. Every figure shows the three reference models and at most three series of
runs. Each series has a label at its last point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minigpt.core.plots import (
    COLOURS,
    MARKERS,
    REFERENCE_COLOUR,
    Labels,
    log_ticks,
    new_figure,
    plain,
)
from minigpt.core.text import human_count
from minigpt.model import perplexity
from minigpt.scaling.fit import RunGroup
from minigpt.scaling.results import REFERENCE, RunResult

REFERENCE_LABEL = f"reference, {human_count(REFERENCE[0].tokens)} tokens"
BEST_LABEL = "best of other groups"
LINE = 28  # characters per line of a label
FONT = 9  # size of the labels

Points = list[tuple[float, float]]


def scaling_figure(groups: Sequence[RunGroup]) -> Figure:
    """Plot perplexity against the number of parameters.

    The figure shows the main group, which is the group with the most model sizes. For each size of
    the main group, a point is the geometric mean of the perplexities of its runs, and an error bar
    extends from the lowest to the highest perplexity. If a law was fitted to the main group, the
    law is drawn as a curve. A second series shows each size at which the main group has no runs, or
    has a higher mean than another group. A point of this series is the lowest mean of all groups at
    that size.

    Args:
        groups: groups of comparable runs; if empty, only the reference models are drawn.

    Returns:
        The figure.
    """
    figure, axes = _axes("parameters N (log scale)")
    title, law_curve = "Perplexity against model size", np.empty((0, 2))
    series: dict[str, Points] = {REFERENCE_LABEL: [(r.parameters, r.perplexity) for r in REFERENCE]}
    forms = ["D--", f"{MARKERS[0]}-", f"{MARKERS[1]}-"]
    if groups:
        main = max(groups, key=lambda group: len(group.sizes))  # at a tie, the first
        corpora = {group.corpus for group in groups}
        common = f"{main.corpus}, " if len(corpora) == 1 else ""  # left out of the label
        rows = [(s.parameters, s.perplexity, s.lowest, s.highest) for s in main.sizes]
        n, mean, low, high = np.transpose(rows)
        bars = np.maximum([mean - low, high - mean], 0)  # never −1e-16
        axes.errorbar(n, mean, bars, fmt="none", ecolor=COLOURS[0], capsize=4)
        series[main.label.removeprefix(common)] = list(zip(n, mean, strict=True))
        if law := main.fits.get("parameters"):
            sizes = np.geomspace(n[0] / 1.15, n[-1] * 1.15, 100)
            law_curve = np.array([(size, perplexity(law.loss(size))) for size in sizes])
            axes.plot(*law_curve.T, color=COLOURS[0], linewidth=1.4)
            formula = f"L = {law.e:.2f} + {_power(law.a)} / N$^{{{law.alpha:.2f}}}$"
            title, forms[1] = f"Validation loss falls with model size: {formula} nats", MARKERS[0]
        if best := _best_of_others(main, groups):
            series[BEST_LABEL] = best
    drawn = list(zip(series.items(), forms, (REFERENCE_COLOUR, *COLOURS), strict=False))
    for (name, points), form, colour in drawn:
        axes.plot(*np.transpose(points), form, color=colour, markersize=6, label=plain(name))
    _finish(axes, title, space=0.3)
    dense = [point for points in series.values() for point in _dense(points)]
    labels = Labels(axes, [*law_curve.tolist(), *dense])
    for (name, points), _, colour in drawn:
        text = fill(f"{points[-1][1]:.2f}  {plain(name)}", LINE)
        labels.add(text, points[-1], colour, fontsize=FONT)
        for point in points[:-1]:
            labels.add(f"{point[1]:.2f}", point, fontsize=FONT)
    return figure


def _best_of_others(main: RunGroup, groups: Iterable[RunGroup]) -> Points:
    """Return the points (parameters, perplexity) at which a group other than `main` is the best.

    At each size, the group with the lowest perplexity is the best. The perplexity of a group at a
    size is the geometric mean over the group's runs of this size. Sizes at which `main` has no runs
    are included.
    """
    best = {size.parameters: size.perplexity for size in main.sizes}
    better: dict[float, float] = {}
    for size in (size for group in groups for size in group.sizes):
        if size.perplexity < best.get(size.parameters, np.inf):
            best[size.parameters] = better[size.parameters] = size.perplexity
    return sorted(better.items())


def tokens_figure(runs: Sequence[RunResult]) -> Figure:
    """Plot perplexity against tokens seen, at each validation of the finished runs.

    Runs with the same size, data and recipe form a series. At most three series are drawn. Series
    with the most common data and recipe are preferred, then series trained on the most tokens.
    """
    return _curves_figure(runs, lambda _: 1, "tokens")


def compute_figure(runs: Sequence[RunResult]) -> Figure:
    """Plot perplexity like `tokens_figure`, but against training FLOPs.

    Runs with an unknown number of FLOPs are left out.
    """
    return _curves_figure(runs, lambda run: run.flops_per_token, "FLOPs")


def _curves_figure(runs: Iterable[RunResult], per_token: Callable[[Any], Any], unit: str) -> Figure:
    """Plot perplexity at each validation against training tokens or FLOPs.

    `tokens_figure` describes which runs form a series, and which series are drawn.

    Args:
        runs: results of runs; unfinished runs and runs without a validation are left out.
        per_token: function that takes a run or a reference model, and returns the factor from
            tokens to `unit`. If the factor of a run is None, the run is left out.
        unit: name of the unit in labels, "tokens" or "FLOPs".
    """
    reference: Points = [(per_token(r) * r.tokens, r.perplexity) for r in REFERENCE]
    scaled = [(run, per_token(run)) for run in runs if per_token(run) and run.point and run.curve]
    kinds = [(run.corpus, run.recipe) for run, _ in scaled]
    usual = max(kinds, key=kinds.count, default=("", ""))
    series: dict[str, list[Points]] = {}
    # Ascending: the last runs have the most common data and recipe, and of these the most tokens.
    scaled.sort(
        key=lambda p: ((p[0].corpus, p[0].recipe) == usual, p[0].tokens or 0, p[0].parameters)
    )
    for run, scale in reversed(scaled):
        kind = zip((run.corpus, run.recipe), usual, strict=True)
        unusual = [part for part, most in kind if part != most]
        label = plain(", ".join([f"{run.model} ({human_count(run.parameters or 0)})", *unusual]))
        curve = [(scale * tokens, perplexity(loss)) for tokens, loss in run.curve]
        if label in series or len(series) < len(COLOURS):
            series.setdefault(label, []).append(curve)

    figure, axes = _axes(f"training {unit} (log scale)")
    axes.plot(*np.transpose(reference), "D", color=REFERENCE_COLOUR, markersize=6)
    for curves, colour, marker in zip(series.values(), COLOURS, MARKERS, strict=False):
        for curve in curves:
            axes.plot(*np.transpose(curve), ".-", color=colour, linewidth=1.2, markersize=4)
            axes.plot(*curve[-1], marker, color=colour, markersize=6)
    title = f"Perplexity against training {unit}"
    if ends := {curve[-1]: label for label, curves in series.items() for curve in curves}:
        best, goal = (min(points, key=lambda point: point[1]) for points in (ends, reference))
        title = f"{ends[best]}: perplexity {best[1]:.2f} after {_count(best[0])} {unit}"
        title += f"; best reference: {goal[1]:.2f} after {_count(goal[0])}"
    _finish(axes, title, space=0.12)
    dense = [point for curves in series.values() for curve in curves for point in _dense(curve)]
    labels = Labels(axes, [*reference, *dense])
    for (label, curves), colour in zip(series.items(), COLOURS, strict=False):
        labels.add(fill(label, LINE), max(curve[-1] for curve in curves), colour, fontsize=FONT)
    for i, point in enumerate(reference):
        text = f"{point[1]:.2f}" if i else f"{point[1]:.2f}  {REFERENCE_LABEL}"
        labels.add(text, point, REFERENCE_COLOUR, fontsize=FONT)
    return figure


def _dense(curve: Points, between: int = 12) -> Points:
    """Interpolate `curve` linearly on logarithmic axes, and return `between` points per segment."""
    fine = np.linspace(0, len(curve) - 1, between * (len(curve) - 1) + 1)
    columns = [np.interp(fine, range(len(curve)), logs) for logs in np.log(curve).T]
    return list(map(tuple, np.exp(columns).T.tolist()))


# ---------------------------------------------------------------------------------------- axes


def _axes(xlabel: str) -> tuple[Figure, Axes]:
    figure = new_figure(8, 4.6)
    (axes,) = figure.axes
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel="validation perplexity (log scale)")
    return figure, axes


def _finish(axes: Axes, title: str, space: float) -> None:
    """Set the title, the margins of both axes, and ticks at round numbers.

    The horizontal axis is extended on the right by the fraction `space` of its width, to make space
    for labels. An axis that spans few decades has more ticks per decade.
    """
    axes.set_title(title, loc="left", fontsize=11)
    axes.margins(x=0.06, y=0.12)
    axes.autoscale_view()
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** space)
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        decades = np.log10(limits[1] / limits[0])
        subs = (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8) if decades < 1.2 else (1, 2, 5)
        log_ticks(axis, subs if decades < 3 else (1,), _count)


def _count(value: float) -> str:
    return human_count(value) if value < 1e9 else f"{value:.2g}".replace("e+", "e")


def _power(a: float) -> str:
    """Format A, the coefficient of the law, for a title, such as 8.42, 842, 1086 or 3.1e6."""
    if a < 1e3:
        return f"{a:.3g}"
    return f"{a:.0f}" if a < 1e4 else f"{a:.1e}".replace("e+0", "e").replace("e+", "e")
