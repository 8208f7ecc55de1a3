"""Loss curves of runs as SVG, for the playground page."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean

from minigpt.core.settings import UserError
from minigpt.core.text import human_count
from minigpt.runs.names import METRICS
from minigpt.runs.records import Row, read_metrics, series

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 180, 44, 24
Points = tuple[Sequence[float], Sequence[float]]  # training tokens, and loss in nats per token


@dataclass(frozen=True)
class Curve:
    """Loss as a function of training tokens."""

    train: Points
    valid: Points

    @property
    def end(self) -> float | None:
        """Number of training tokens at the end of the curve; None if there are no losses."""
        return max([*self.train[0], *self.valid[0]], default=None)


def run_curve(folder: Path) -> Curve:
    """Return the loss curve of a run from metrics.csv, without points if there are no rows yet.

    Args:
        folder: the run folder.

    Raises:
        UserError: metrics.csv is damaged.
    """
    rows = metrics(folder)
    return Curve(series(rows, "train/loss"), series(rows, "val/loss"))


def metrics(folder: Path) -> list[Row]:
    """Return the rows of metrics.csv. The file is read again only if it has changed.

    Args:
        folder: the run folder.

    Raises:
        UserError: metrics.csv is damaged.
    """
    try:
        state = (folder / METRICS).stat()
    except FileNotFoundError:
        return []
    return _metrics(folder, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=32)
def _metrics(folder: Path, *_: int) -> list[Row]:
    return read_metrics(folder)


def curve_svg(curve: Curve, end: float | None = None, marker: float | None = None) -> str:
    """Return a loss curve as SVG: a line for training, dots for validation.

    Both axes are logarithmic. Training losses that fall on the same pixel column are averaged.

    Args:
        curve: the losses. Only points with a positive number of tokens and a positive, finite loss
            are drawn.
        end: the horizontal axis extends at least to this number of tokens, and always to the last
            point. None means that the axis ends at the last point.
        marker: number of tokens at which to draw a vertical line; None draws no line.

    Returns:
        The SVG; "" if no point can be drawn, or if the horizontal axis would have zero length.
    """
    train, valid = _positive(curve.train), _positive(curve.valid)
    both = train + valid
    if not both:
        return ""
    tokens, losses = zip(*both, strict=True)
    low, high = min(tokens), max(*tokens, end or 0)
    top, bottom = max(losses), min(losses)
    if low >= high:
        return ""

    def x(value: float) -> float:
        value = min(max(value, low), high)
        return LEFT + (WIDTH - LEFT - 8) * math.log(value / low) / math.log(high / low)

    def y(value: float) -> float:
        share = math.log(top / value) / math.log(top / bottom) if top > bottom else 0.5
        return 8 + (HEIGHT - BOTTOM - 16) * share

    columns: dict[int, list[float]] = {}  # a long run has many points per pixel
    for t, loss in train:
        columns.setdefault(round(x(t)), []).append(y(loss))
    line = " ".join(f"{column},{fmean(heights):.1f}" for column, heights in columns.items())
    dots = "".join(f'<circle cx="{x(t):.1f}" cy="{y(loss):.1f}" r="3.5"/>' for t, loss in valid)
    age = "" if marker is None else f'<path class="age" d="M{x(marker):.1f} 4V{HEIGHT - BOTTOM}"/>'
    labels = _text(LEFT, HEIGHT - 6, human_count(low))
    labels += _text(WIDTH - 8, HEIGHT - 6, f"{human_count(high)} tokens", "end")
    labels += _text(LEFT - 6, y(top) + 4, f"{top:.2f}", "end")
    labels += _text(LEFT - 6, y(bottom) + 4, f"{bottom:.2f}", "end") if bottom < top else ""
    return (
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="loss by training tokens"><polyline points="{line}"/>{dots}{age}{labels}</svg>'
    )


def curves_html(curves: Mapping[str, tuple[Curve, float | None]]) -> str:
    """Return HTML with the loss curve of each model, under the name of the model.

    A model is left out if `curve_svg` returns "" for its curve.

    Args:
        curves: pair (curve, marker) by name of the model. `marker` is the number of tokens at which
            to draw a vertical line; None draws no line.
    """
    parts = []
    for name, (curve, marker) in curves.items():
        if svg := curve_svg(curve, marker=marker):
            parts.append(f"<figure><figcaption>{html.escape(name)}</figcaption>{svg}</figure>")
    return "".join(parts)


def safe_curve(folder: Path) -> Curve | None:
    """Return the loss curve of a run; None if its metrics are damaged or missing."""
    try:
        curve = run_curve(folder)
    except UserError:
        return None
    return curve if curve.train[0] or curve.valid[0] else None


def _positive(points: Points) -> list[tuple[float, float]]:
    pairs = zip(*points, strict=True)
    return [(t, loss) for t, loss in pairs if t > 0 and loss > 0 and math.isfinite(loss)]


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{html.escape(text)}</text>'
