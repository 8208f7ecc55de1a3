"""Formatting of numbers, durations and Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

BAR = "\\|"  # escaped vertical bar, for a cell of a Markdown table


def human_count(number: float) -> str:
    """Format a number with up to three significant digits and k, M or B, such as 39.5k."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:  # 999.5k would be rounded to 1000k
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def value_cell(value: float | None, form: str) -> str:
    """Format a number for a table cell.

    Args:
        value: the number; None gives a dash.
        form: format specification, such as ".3f".

    Returns:
        The text of the cell.
    """
    return "–" if value is None else format(value, form)


def percent(share: float | None) -> str:
    """Format a fraction for a table cell, such as 6.6 % for 0.066; None gives a dash."""
    return "–" if share is None else f"{100 * share:.1f} %"


def md_table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table.

    Args:
        heads: column headers.
        rows: cells of each row.
        left: number of left-aligned columns at the start; the remaining ones are right-aligned.

    Returns:
        The lines of the table, without a final line break.
    """

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |"

    ruler = ["---" if i < left else "---:" for i in range(len(heads))]
    return "\n".join(map(line, (heads, ruler, *rows)))


def human_time(seconds: float) -> str:
    """Format a duration with at most two units, such as 42 s, 3 min 20 s or 1 h 05 min."""
    total = math.floor(seconds + 0.5)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"
