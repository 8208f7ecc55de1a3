"""Functions to read the records of a run: metrics.csv, samples.jsonl and summary.json.

    >>> rows = read_metrics(Path("runs/small-20260101-120000"))
    >>> tokens, loss = series(rows, "val/loss")

Training appends lines to metrics.csv and samples.jsonl. A killed run may leave an incomplete last
line in these files, so such a line is ignored. For other invalid content, the functions raise a
UserError with the name of the file.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from minigpt.core.files import parse_json, read_json, read_text
from minigpt.core.settings import UserError
from minigpt.runs.names import METRICS, SAMPLES, SUMMARY

Row = dict[str, float]  # row of metrics.csv: value by column, without empty cells


def read_metrics(folder: Path) -> list[Row]:
    """Return the rows of metrics.csv, each with `step` and `tokens`.

    Args:
        folder: the run folder.

    Returns:
        The rows, oldest first; [] if there are no rows yet.

    Raises:
        UserError: the file is not a table of numbers with the columns `step` and `tokens`.
    """
    path = folder / METRICS
    rows: list[Row] = []
    table = csv.DictReader(whole_lines(path), restval="missing")  # not a number, so rejected below
    for cells in table:
        try:
            row = {name: float(cell) for name, cell in cells.items() if cell != ""}
        except (TypeError, ValueError):  # TypeError: more cells than columns
            raise broken_line(path, table.line_num, "a row of numbers") from None
        if "step" not in row or "tokens" not in row:
            raise broken_line(path, table.line_num, "a row with values for step and tokens")
        rows.append(row)
    return rows


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Return the sample stories in samples.jsonl.

    Args:
        folder: the run folder.

    Returns:
        One dict per story, oldest first, with step, tokens, prompt, temperature and text; [] if
        there are no stories yet.

    Raises:
        UserError: a line is not a JSON object with step, tokens, prompt, temperature and text.
    """
    path = folder / SAMPLES
    samples, keys = [], {"step", "tokens", "prompt", "temperature", "text"}
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            sample = parse_json(line)
        except ValueError:
            sample = None
        if not isinstance(sample, dict) or not keys <= sample.keys():
            raise broken_line(path, number, f"a JSON object with {', '.join(sorted(keys))}")
        samples.append(sample)
    return samples


def read_summary(folder: Path) -> dict[str, Any]:
    """Return the content of summary.json.

    Args:
        folder: the run folder.

    Returns:
        The summary; {} if there is no file, because the run is still training or was killed.

    Raises:
        UserError: the file is not a JSON object.
    """
    if not (path := folder / SUMMARY).is_file():
        return {}
    try:
        summary = read_json(path)
    except ValueError:  # not JSON, or not even UTF-8
        summary = None
    if not isinstance(summary, dict):
        raise UserError(f"{path} is not a JSON object: remove the file, or leave this run out")
    return summary


def series(rows: list[Row], name: str) -> tuple[list[float], list[float]]:
    """Return the values in a column of metrics.csv, with the number of training tokens for each.

    Args:
        rows: rows of metrics.csv, from `read_metrics`.
        name: name of the column.

    Returns:
        Two lists of equal length: numbers of training tokens, and values of the column. Rows
        without a value in the column are left out.
    """
    measured = [(row["tokens"], row[name]) for row in rows if name in row]
    return [tokens for tokens, _ in measured], [value for _, value in measured]


def last_values(rows: list[Row]) -> Row:
    """Return the last measured value of each column."""
    return {name: value for row in rows for name, value in row.items()}


def whole_lines(path: Path) -> list[str]:
    """Return the lines of a file that end with a line break; [] if there is no file."""
    if not path.is_file():
        return []
    try:
        text = read_text(path, max_bytes=1 << 30)
    except ValueError as error:
        raise UserError(f"cannot read {path} ({error}): leave this run out") from None
    return text.split("\n")[:-1]  # splitlines would also split at U+2028 within a story


def broken_line(path: Path, line: int, expected: str) -> UserError:
    """Return the error for an invalid line of a file that training wrote."""
    return UserError(f"{path}, line {line}: expected {expected}; correct or delete this line")
