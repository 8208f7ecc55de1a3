"""Numbers, durations and tables as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

BAR = "\\|"  # a bar inside a cell of a Markdown table


def human_count(number: float) -> str:
    """Three digits and a letter: 1.05M parameters, 104M tokens, 39.5k tokens per second."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:  # what would round up to 1000 takes the next letter
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def value_cell(value: float | None, form: str) -> str:
    """Return a number as a cell of a table, by the format `form`; a dash stands for None."""
    return "–" if value is None else format(value, form)


def percent(share: float | None) -> str:
    """Return a share as a cell of a table: 6.6 %; a dash stands for None."""
    return "–" if share is None else f"{100 * share:.1f} %"


def md_table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first `left` columns are text and the others numbers."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |"

    ruler = ["---" if i < left else "---:" for i in range(len(heads))]
    return "\n".join(map(line, (heads, ruler, *rows)))


def human_time(seconds: float) -> str:
    """Two units at most: 42 s, 3 min 20 s, 1 h 05 min."""
    total = math.floor(seconds + 0.5)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"
