"""Figures of the scaling study: perplexity against parameters, tokens and compute.

All axes are logarithmic. Every figure shows the three reference models beside the runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from minigpt.core.plots import INK, new_figure
from minigpt.core.text import human_count
from minigpt.model import perplexity
from minigpt.scaling.fit import RunGroup
from minigpt.scaling.results import REFERENCE, RunResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REFERENCE_COLOUR = "#6b7280"
LABEL = 9  # font size of the numbers at points
ABOVE, BELOW = ((7, 5), "bottom"), ((-7, -5), "top")  # offset and vertical alignment of a number


def scaling_figure(groups: Sequence[RunGroup]) -> Figure:
    """Draw perplexity against parameters: the mean of each size, and the law of each group.

    A bar spans the lowest and the highest run of a size that has several.
    """
    corpora = {group.corpus for group in groups}
    common = f"{corpora.pop()}, " if len(corpora) == 1 else ""  # left out of the labels
    figure, axes = _axes("parameters", "Perplexity against model size")
    _draw_reference(axes, [(r.parameters, r.perplexity) for r in REFERENCE], "D--")
    without_law: list[tuple[float, float]] = []
    for i, group in enumerate(groups):
        x, y = [size.parameters for size in group.sizes], [size.perplexity for size in group.sizes]
        spans = [(s.perplexity - s.lowest, s.highest - s.perplexity) for s in group.sizes]
        bars = np.maximum(spans, 0).T  # never −1e-16
        law, label = group.fits.get("parameters"), group.label.removeprefix(common)
        form = ("" if law else "-") + "osv^"[i // 10 % 4]  # there are ten colours
        axes.errorbar(x, y, bars, fmt=form, color=f"C{i}", capsize=4, markersize=7, label=label)
        if law:
            sizes = np.geomspace(min(x) / 1.15, max(x) * 1.15, 100)
            label = f"L = {law.e:.2f} + {_power(law.a)} / N$^{{{law.alpha:.2f}}}$"
            curve = [perplexity(law.loss(n)) for n in sizes]
            axes.plot(sizes, curve, "-", color=f"C{i}", linewidth=1.2, label=label)
            for point in zip(x, y, strict=True):
                _write(axes, point, *BELOW)
        else:
            without_law += zip(x, y, strict=True)
    _finish(axes)
    _label_beside(axes, without_law)
    return figure


def tokens_figure(runs: Sequence[RunResult]) -> Figure:
    """Draw perplexity against tokens seen: the validations of each finished run, by size.

    Recipes and data other than those of most runs are dashed.
    """
    figure, axes = _axes("tokens seen", "Perplexity against tokens seen")
    _draw_reference(axes, [(r.tokens, r.perplexity) for r in REFERENCE], "D")
    _draw_curves(axes, runs, [1] * len(runs))
    return figure


def compute_figure(runs: Sequence[RunResult]) -> Figure:
    """Draw perplexity against FLOPs of training: a large dot at the end of each run."""
    figure, axes = _axes("FLOPs of training", "Perplexity against compute")
    _draw_reference(axes, [(r.flops_per_token * r.tokens, r.perplexity) for r in REFERENCE], "D")
    _draw_curves(axes, runs, [run.flops_per_token for run in runs])
    return figure


def _draw_curves(axes: Axes, runs: Sequence[RunResult], per_token: Sequence[int | None]) -> None:
    """Draw the validations of each finished run against tokens × `per_token`, by size.

    The legend has each label once. Runs without `per_token` are left out.
    """
    from matplotlib import colormaps

    scaled = [(r, x) for r, x in zip(runs, per_token, strict=True) if x and r.point and r.curve]
    sizes = sorted({run.parameters or 0 for run, _ in scaled})
    colours = colormaps["viridis"](np.linspace(0, 0.92, max(1, len(sizes))))
    kinds = [(run.corpus, run.recipe) for run, _ in scaled]
    usual = max(kinds, key=kinds.count, default=("", ""))
    labels = set()
    for run, scale in sorted(scaled, key=lambda pair: pair[0].parameters or 0):
        size, kind = run.parameters or 0, (run.corpus, run.recipe)
        unusual = [part for part, most in zip(kind, usual, strict=True) if part != most]
        label = ", ".join([run.model, human_count(size), *unusual])
        colour, line = colours[sizes.index(size)], ".-" if kind == usual else ".--"
        x = [scale * tokens for tokens, _ in run.curve]
        y = [perplexity(loss) for _, loss in run.curve]
        once = None if label in labels else label
        axes.plot(x, y, line, color=colour, linewidth=1.2, markersize=4, label=once)
        axes.plot(x[-1], y[-1], "o", color=colour, markersize=7)
        labels.add(label)
    _finish(axes)


# ---------------------------------------------------------------------------------------- axes


def _axes(xlabel: str, title: str) -> tuple[Figure, Axes]:
    figure = new_figure(11, 5)
    (axes,) = figure.axes
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel="validation perplexity")
    axes.set_title(f"{title} (both axes logarithmic)", loc="left", fontsize=11)
    return figure, axes


def _finish(axes: Axes) -> None:
    """Set ticks at round numbers, as many as the span of each axis has space for; add a legend."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.margins(x=0.1, y=0.12)
    axes.autoscale_view()
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        decades = np.log10(limits[1] / limits[0])
        subs = (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8) if decades < 1.2 else (1, 2, 5)
        axis.set_major_locator(LogLocator(subs=subs if decades < 2.5 else (1,)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))


def _count(value: float) -> str:
    return human_count(value) if value < 1e9 else f"{value:.0e}".replace("e+", "e")


def _power(a: float) -> str:
    """Format A for a legend: 8.42, 842, 1086, or 3.1e6."""
    if a < 1e3:
        return f"{a:.3g}"
    return f"{a:.0f}" if a < 1e4 else f"{a:.1e}".replace("e+0", "e").replace("e+", "e")


def _draw_reference(axes: Axes, points: Sequence[tuple[float, float]], form: str) -> None:
    label = f"reference, {human_count(REFERENCE[0].tokens)} tokens"
    axes.plot(*zip(*points, strict=True), form, color=REFERENCE_COLOUR, markersize=6, label=label)
    for point in points:
        _write(axes, point, *ABOVE)


def _label_beside(axes: Axes, points: Iterable[tuple[float, float]]) -> None:
    """Write each perplexity right of its point, and below those of points above it.

    The limits of the axes must be final.
    """
    lowest: dict[float, float] = {}  # by size: lower end of its labels, in points of the page
    for size, value in sorted(points, key=lambda point: -point[1]):
        height = axes.transData.transform((size, value))[1] * 72 / axes.figure.dpi
        top = min(height + LABEL / 2, lowest.get(size, math.inf))
        _write(axes, (size, value), (7, top - height), "top")
        lowest[size] = top - 1.2 * LABEL


def _write(axes: Axes, point: tuple[float, float], offset: tuple[float, float], va: str) -> None:
    text, side = f"{point[1]:.2f}", "left" if offset[0] > 0 else "right"
    place = {"xytext": offset, "textcoords": "offset points", "ha": side, "va": va}
    axes.annotate(text, point, fontsize=LABEL, color=INK, **place)
