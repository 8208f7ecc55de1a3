"""Matplotlib figures in one style, as PNG files and as inline SVG for HTML pages.

>>> figure = new_figure(8, 6)
>>> write_png(figure, Path("map.png"))
>>> page = f"<figure>{to_svg(figure)}</figure>"
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.core.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#374151"  # text, axes and grid
STYLE: Any = {  # a dict of rc parameters
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "grid.color", "text.color"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.labelsize", "xtick.labelsize", "ytick.labelsize"), 9),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "grid.alpha": 0.13,
}


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> Figure:
    """Return a figure with a grid of empty axes.

    Args:
        width: width in inches.
        height: height in inches.
        rows: number of rows of axes.
        columns: number of columns of axes.

    Returns:
        The figure, whose `axes` are in row-major order.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # imported here, as it is slow; pyplot would keep figures

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.subplots(rows, columns)
    return figure


def write_png(figure: Figure, path: Path, dpi: int = 200) -> None:
    """Write `figure` to `path` as a PNG, atomically; the folder is created if missing."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, picture.getbuffer())


def to_svg(figure: Figure) -> str:
    """Return `figure` as an <svg> element for a light or dark HTML page.

    Text stays selectable, the background is transparent, and INK becomes the text colour of the
    page. Elements of several figures have different ids, so they can be on one page.
    """
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing, transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML prolog, which HTML does not allow
    return re.sub(r'<g id="[^"]*"', "<g", svg).replace(INK, "currentColor")
