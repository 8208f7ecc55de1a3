"""A figure of Matplotlib in a file.

>>> write_png(figure, Path("map.png"))
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt.core.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_png(figure: Figure, path: Path, dpi: int = 200) -> None:
    """Write `figure` as a PNG, whole or not at all. The folder is made if missing."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, picture.getbuffer())
