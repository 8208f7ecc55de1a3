"""Matplotlib figures in one style, as PNG files or as SVG elements for an HTML page.

>>> figure = new_figure(8, 6)
>>> write_png(figure, Path("map.png"))
>>> page = f"<figure>{to_svg(figure)}</figure>"
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.core.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

INK = "#374151"  # text, axes and grid
# Colours of the series in a figure, from the palette of Okabe and Ito (2008). Colour-blind readers
# can tell these colours apart. Each has a contrast of at least 3 on white and on the dark pages.
COLOURS = ("#0072b2", "#d55e00", "#009e73")
MARKERS = "os^"  # markers of the same series, for print without colour
REFERENCE_COLOUR = "#6b7280"  # for values that the series are compared with
STYLE: Any = {  # a dict of rc parameters
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "grid.color", "text.color"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.labelsize", "xtick.labelsize", "ytick.labelsize"), 9),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "grid.alpha": 0.13,
}
# Positions of a label next to its data point, best first: offset in typographic points, and
# horizontal alignment.
SIDES = tuple(
    ((x * reach, y * reach), {1: "left", 0: "center", -1: "right"}[x])
    for reach in (6, 11, 17, 24, 34, 48)
    for x, y in ((1, 0), (-1, 0), (0, 1.4), (0, -1.4), (1, 1), (1, -1), (-1, 1), (-1, -1))
)


def plain(text: str) -> str:
    """Return `text`, escaped so that Matplotlib draws it literally.

    A $ does not start a formula, and a label that begins with _ is not left out of the legend.
    """
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> Figure:
    """Return a figure with a grid of empty axes.

    Args:
        width: width in inches.
        height: height in inches.
        rows: number of rows of axes.
        columns: number of columns of axes.

    Returns:
        The figure. Its list `axes` is in row-major order.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # a slow import; pyplot would keep figures

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.subplots(rows, columns)
    return figure


class Labels:
    """Labels on an axes, each next to its data point, at a free position if there is one.

    Create this object after everything else is drawn and the axis limits are final. Its creation
    fixes the layout of the figure.

    Args:
        axes: the axes to label.
        obstacles: points (x, y), in data coordinates, that labels should not cover.
    """

    def __init__(self, axes: Axes, obstacles: Iterable[Sequence[float]]) -> None:
        from matplotlib.transforms import Bbox

        self.axes, self.figure = axes, axes.figure.get_figure(root=True)
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")  # a label must not move the axes
        pixels = axes.transData.transform([tuple(point) for point in obstacles])
        self.taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in pixels.tolist()]

    def add(self, text: str, point: Sequence[float], colour: str = INK, **style: Any) -> Annotation:
        """Write `text` next to `point`, at the first free position in `SIDES`.

        If no position is free, the last one is used.

        Args:
            text: the label.
            point: the labelled point (x, y) in data coordinates.
            colour: colour of the text.
            **style: further properties of the text.

        Returns:
            The label.
        """
        label = self.axes.annotate(text, (point[0], point[1]), color=colour, va="center", **style)
        label.set(anncoords="offset points")
        box: Any = None
        for offset, side in SIDES:
            label.set(position=offset, ha=side)
            box = label.get_window_extent().padded(3, -1)  # padded sideways, tight vertically
            inside = all(self.figure.bbox.fully_contains(*xy) for xy in (box.min, box.max))
            if inside and not any(box.overlaps(other) for other in self.taken):
                break
        self.taken.append(box)
        return label


def log_ticks(axis: Axis, subs: Sequence[float], text: Callable[[float], str]) -> None:
    """Set the ticks of a logarithmic axis.

    Args:
        axis: the axis.
        subs: factors, such as (1, 2, 5). Ticks are set at each power of ten times each factor.
        text: function that returns the label of a value.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: text(value))


def write_png(figure: Figure, path: Path, dpi: int = 160) -> None:
    """Write `figure` to a PNG file atomically.

    Args:
        figure: the figure.
        path: the file; its folder is created if missing.
        dpi: resolution in dots per inch.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, picture.getbuffer())


def to_svg(figure: Figure) -> str:
    """Return `figure` as an <svg> element for a light or dark HTML page.

    Text is not converted to paths. The background is transparent, and the colour INK is replaced
    with the text colour of the page. The ids of groups are removed, because several figures on one
    page would have the same ids.

    Args:
        figure: the figure.

    Returns:
        The element, without XML prolog.
    """
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing, transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML prolog, which HTML does not allow
    return re.sub(r'<g id="[^"]*"', "<g", svg).replace(INK, "currentColor")
