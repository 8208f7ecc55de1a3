"""What a run wrote down as it trained, read back: metrics.csv, samples.jsonl, summary.json.

    >>> rows = read_metrics(Path("runs/small-20260101-120000"))
    >>> tokens, loss = series(rows, "val/loss")

Training appends to the first two files, so a run that was killed may leave half a line at the end;
that half is not read. Anything else that makes no sense is a UserError with the file's name in it.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from minigpt.core.files import parse_json, read_json, read_text
from minigpt.core.settings import UserError
from minigpt.runs.checkpoint import read_checkpoint
from minigpt.runs.folder import (
    METRICS,
    SAMPLES,
    SUMMARY,
    Run,
)

Row = dict[str, float]  # one row of metrics.csv: column name to value, measured cells alone


def read_metrics(folder: Path) -> list[Row]:
    """The rows of the run's metrics.csv, each with `step` and `tokens`; [] when it has none yet.

    Raises:
        UserError: the file is not a table of numbers with those two columns.
    """
    path = folder / METRICS
    rows: list[Row] = []
    table = csv.DictReader(_whole_lines(path), restval="missing")  # no number: a short row fails
    for cells in table:
        try:
            row = {name: float(cell) for name, cell in cells.items() if cell != ""}
        except (TypeError, ValueError):  # TypeError: a list of the cells beyond the header
            raise UserError(_broken(path, table.line_num, "a row of numbers")) from None
        if "step" not in row or "tokens" not in row:
            raise UserError(_broken(path, table.line_num, "a row with step and tokens"))
        rows.append(row)
    return rows


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The stories in the run's samples.jsonl, oldest first; [] when it has none yet.

    Raises:
        UserError: a line is not a JSON object with step, tokens, prompt, temperature and text.
    """
    path = folder / SAMPLES
    samples = []
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            sample = parse_json(line)
        except ValueError:
            sample = None
        keys = {"step", "tokens", "prompt", "temperature", "text"}
        if not isinstance(sample, dict) or not keys <= sample.keys():
            raise UserError(_broken(path, number, "a sample with step, prompt and text"))
        samples.append(sample)
    return samples


def read_summary(folder: Path) -> dict[str, Any]:
    """The run's summary.json; {} while it trains and when it was killed before writing one.

    Raises:
        UserError: the file is not a JSON object.
    """
    path = folder / SUMMARY
    if not path.is_file():
        return {}
    try:
        summary = read_json(path)
    except ValueError:  # not JSON, or not even UTF-8
        summary = None
    if not isinstance(summary, dict):
        raise UserError(f"{path} is not a JSON object: move this run away, or train it again")
    return summary


def checkpoint_summary(run: Run) -> dict[str, Any]:
    """The run's summary.json, with the steps and tokens that the checkpoint meant has seen."""
    summary = read_summary(run.folder)
    if run.checkpoint.suffix == ".safetensors":
        return summary
    content = read_checkpoint(run.checkpoint)
    made_of, steps = content["hyper_parameters"], content["global_step"]
    if "init_from" in made_of:  # a run that was killed left no summary
        summary = {**summary, "init_from": made_of["init_from"]}
    if steps == summary.get("steps"):
        return summary
    per_step = made_of.get("tokens_per_step")
    return {**summary, "steps": steps, "tokens": per_step and steps * per_step}


def series(rows: list[Row], name: str) -> tuple[list[float], list[float]]:
    """One column against tokens seen: (tokens, values), where it was measured."""
    measured = [(row["tokens"], row[name]) for row in rows if name in row]
    return [tokens for tokens, _ in measured], [value for _, value in measured]


def last_values(rows: list[Row]) -> Row:
    """The last measured value of every column."""
    return {name: value for row in rows for name, value in row.items()}


def _whole_lines(path: Path) -> list[str]:
    """The lines of the file that have their end; none when there is no file."""
    if not path.is_file():
        return []
    try:
        text = read_text(path, megabytes=1024)
    except ValueError as error:
        raise UserError(
            f"{path} is not the text that a run writes ({error}): move this run away, or train it "
            "again"
        ) from None
    return text.split("\n")[:-1]  # not splitlines, which also cuts at U+2028 inside a story


def _broken(path: Path, line: int, wanted: str) -> str:
    return f"{path}, line {line}: expected {wanted}; mend or delete that line, or leave the run out"
