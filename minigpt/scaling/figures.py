"""The scaling study drawn: perplexity against parameters, tokens and compute.

All axes are logarithmic. Beside our runs stand the three models of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from minigpt.core.text import human_count
from minigpt.model import perplexity
from minigpt.scaling.fit import Fit
from minigpt.scaling.results import RunResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, REFERENCE_COLOUR = "#374151", "#e5e7eb", "#6b7280"
LABEL = 9  # points of the page: the size of numbers at points


@dataclass(frozen=True)
class ReferenceModel:
    """One of the three models this project sets out to beat: vocabulary 3,000, TinyStories."""

    parameters: int
    perplexity: float  # validation
    flops_per_token: int  # GPT.flops_per_token of the same shape

    tokens: int = 104_000_000  # seen


REFERENCE = (
    ReferenceModel(1_046_656, 17.75, 8_202_240),
    ReferenceModel(3_404_032, 10.23, 24_268_800),
    ReferenceModel(7_072_128, 8.08, 48_199_680),
)
REFERENCE_LABEL = "reference, 104M tokens"


@dataclass(frozen=True)
class Point:
    """All finished runs of one size on one line of the figure."""

    parameters: int
    runs: int
    perplexity: float  # geometric mean over the runs: that of their mean loss
    lowest: float
    highest: float


def curves(runs: Iterable[RunResult]) -> dict[str, list[Point]]:
    """One line for each data source, token budget and recipe: its points by size."""
    perplexities: dict[str, dict[int, list[float]]] = {}
    for run in sorted(runs, key=lambda run: (run.parameters or 0, run.tokens)):
        if run.point:
            line = perplexities.setdefault(run.line, {})
            line.setdefault(run.point[0], []).append(run.point[1])
    return {
        label: [Point(n, len(ys), geometric_mean(ys), min(ys), max(ys)) for n, ys in line.items()]
        for label, line in perplexities.items()
    }


def scaling_figure(runs: Iterable[RunResult], fits: Mapping[str, Fit]) -> Figure:
    """Against parameters: the mean of each size, and the law through those of a line.

    A bar spans the lowest and the highest run of a size where there are several.
    """
    runs = list(runs)
    corpora = {run.corpus for run in runs}
    common = f"{corpora.pop()}, " if len(corpora) == 1 else ""  # which no label has to repeat
    figure, axes = _axes("parameters", "Perplexity against model size")
    _reference(axes, {r.parameters: r.perplexity for r in REFERENCE})
    alone: list[tuple[float, float]] = []  # points of no law
    for i, (label, line) in enumerate(curves(runs).items()):
        x, y = [point.parameters for point in line], [point.perplexity for point in line]
        bars = [
            [max(0.0, point.perplexity - point.lowest) for point in line],  # rounding apart
            [max(0.0, point.highest - point.perplexity) for point in line],
        ]
        law = fits.get(label)
        form, said = "" if law else "-", label.removeprefix(common)
        form += "osv^"[i // 10 % 4]  # there are ten colours
        axes.errorbar(x, y, bars, fmt=form, color=f"C{i}", capsize=4, markersize=7, label=said)
        if law:
            wide = np.geomspace(min(x) / 1.15, max(x) * 1.15, 100)
            drawn = [perplexity(law.loss(n)) for n in wide]
            name = f"L = {law.e:.2f} + {_power(law.a)} / N$^{{{law.alpha:.2f}}}$"
            axes.plot(wide, drawn, "-", color=f"C{i}", linewidth=1.2, label=name)
            _label(axes, zip(x, y, strict=True), "below")
        else:
            alone += zip(x, y, strict=True)
    _label_beside(_finished(figure, axes), alone)
    return figure


def tokens_figure(runs: Sequence[RunResult]) -> Figure:
    """Against tokens seen: the validation curve of each finished run, coloured by size.

    Recipes and data other than those of most runs are dashed.
    """
    figure, axes = _axes("tokens seen", "Perplexity against tokens seen")
    _reference_points(axes, [(r.tokens, r.perplexity) for r in REFERENCE])
    for run, colour, line, label in _coloured(runs):
        x, y = zip(*run.curve, strict=True)
        axes.plot(
            x, list(map(perplexity, y)), f".{line}", color=colour, linewidth=1.2, markersize=4,
            label=label,
        )  # fmt: skip
        axes.plot(x[-1], perplexity(y[-1]), "o", color=colour, markersize=7)
    _finished(figure, axes)
    return figure


def compute_figure(runs: Sequence[RunResult]) -> Figure:
    """Against floating-point operations of training: ends of runs large, the way there faint."""
    figure, axes = _axes("FLOPs of training", "Perplexity against compute")
    _reference_points(axes, [(r.flops_per_token * r.tokens, r.perplexity) for r in REFERENCE])
    for run, colour, line, label in _coloured([run for run in runs if run.flops_per_token]):
        x, y = zip(*run.curve, strict=True)
        flops = [(run.flops_per_token or 0) * tokens for tokens in x]
        drawn = list(map(perplexity, y))
        axes.plot(flops, drawn, line, color=colour, linewidth=1, alpha=0.5)
        axes.plot(flops[-1], drawn[-1], "o", color=colour, markersize=7, label=label)
    _finished(figure, axes)
    return figure


def _coloured(runs: Sequence[RunResult]) -> list[tuple[RunResult, Any, str, str]]:
    """The finished runs that have a curve: colour by size, line by recipe and data, one label."""
    from matplotlib import colormaps

    runs = sorted((r for r in runs if r.point and r.curve), key=lambda r: r.parameters or 0)
    sizes = sorted({run.parameters or 0 for run in runs})
    colours = colormaps["viridis"](np.linspace(0, 0.92, max(1, len(sizes))))
    kinds = [(run.corpus, run.recipe) for run in runs]
    usual = max(kinds, key=kinds.count, default=("", ""))
    seen: set[str] = set()
    found = []
    for run in runs:
        size = run.parameters or 0
        label = f"{run.model}, {human_count(size)}"
        kind = run.corpus, run.recipe
        label += "".join(f", {its}" for its, most in zip(kind, usual, strict=True) if its != most)
        line = "-" if kind == usual else "--"
        found.append((run, colours[sizes.index(size)], line, "_" if label in seen else label))
        seen.add(label)  # "_": no entry
    return found


# ---------------------------------------------------------------------------------------- axes


def _axes(xlabel: str, title: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # here: slow to import; not pyplot: no global figures

    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(xlabel=xlabel, ylabel="validation perplexity")
    axes.set_title(f"{title} (both axes logarithmic)", loc="left", fontsize=11)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finished(figure: Figure, axes: Axes) -> Axes:
    """Ticks at round numbers, as many as the span of each axis leaves room for, and a legend."""
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
    return axes


def _count(value: float) -> str:
    return human_count(value) if value < 1e9 else f"{value:.0e}".replace("e+", "e")


def _power(a: float) -> str:
    """`a` for a legend: 8.42, 842, 1086, or 3.1e6."""
    if a < 1e4:
        return f"{a:.3g}" if a < 1e3 else f"{a:.0f}"
    return f"{a:.1e}".replace("e+0", "e").replace("e+", "e")


def _reference(axes: Axes, points: Mapping[int, float]) -> None:
    x, y = list(points), list(points.values())
    axes.plot(x, y, "D--", color=REFERENCE_COLOUR, markersize=6, label=REFERENCE_LABEL)
    _label(axes, points.items(), "above")


def _reference_points(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    x, y = zip(*points, strict=True)
    axes.plot(x, y, "D", color=REFERENCE_COLOUR, markersize=6, label=REFERENCE_LABEL)
    _label(axes, points, "above")


def _label(
    axes: Axes, points: Iterable[tuple[float, float]], side: Literal["above", "below"]
) -> None:
    """Write each perplexity at its point: right above it, or left below."""
    offset, va = {"above": ((7, 5), "bottom"), "below": ((-7, -5), "top")}[side]
    for point in points:
        _write(axes, point, offset, va)


def _label_beside(axes: Axes, points: Iterable[tuple[float, float]]) -> None:
    """Write each perplexity right of its point, and below those of points above it.

    The limits of the axes must be final.
    """
    lowest: dict[float, float] = {}  # by size: how far down labels reach, in points of the page
    for size, value in sorted(points, key=lambda point: -point[1]):
        height = axes.transData.transform((size, value))[1] * 72 / axes.figure.dpi
        top = min(height + LABEL / 2, lowest.get(size, math.inf))
        _write(axes, (size, value), (7, top - height), "top")
        lowest[size] = top - 1.2 * LABEL


def _write(axes: Axes, point: tuple[float, float], offset: tuple[float, float], va: str) -> None:
    axes.annotate(
        f"{point[1]:.2f}",
        point,
        textcoords="offset points",
        xytext=offset,
        ha="left" if offset[0] > 0 else "right",
        va=va,
        fontsize=LABEL,
        color=INK,
    )
