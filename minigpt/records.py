"""What a run wrote down as it trained, read back: metrics.csv, samples.jsonl, summary.json.

    >>> rows = read_metrics(Path("runs/small-20260101-120000"))
    >>> tokens, loss = series(rows, "val/loss")

Training appends to the first two files, so a run that was killed may leave half a line at the end;
that half is not read. Anything else that makes no sense is a UserError with the file's name in it.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt.config import UserError, build
from minigpt.runs import METRICS, SAMPLES, SUMMARY, Run, read_checkpoint
from minigpt.untrusted import parse_json, read_json, read_text

BAR = "\\|"  # a bar inside a cell of a Markdown table
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


@dataclass(frozen=True)
class Origin:
    """What a run tells of another whose weights it began with (`init_from`).

    The weights may have several runs behind them: what is counted, is counted over them all.
    """

    name: str  # of that run's folder
    path: str  # where it lies, if its own command is typed: runs/<name>, or a checkpoint in it
    weights: str  # their fingerprint
    tokens: int | None  # that they have seen; None: not known
    seconds: float | None  # that they were trained for
    sources: list[str]  # data.source of each run, the first one first
    commits: list[str]
    commands: list[list[str]]  # python train.py ..., as words

    def __post_init__(self) -> None:
        words = (word for command in self.commands for word in command)
        texts = (self.name, self.path, *self.sources, *self.commits, *words)
        if not all(text.isprintable() for text in texts):
            raise ValueError("holds text that cannot be printed on one line")
        if any(command[:2] != ["python", "train.py"] for command in self.commands):
            raise ValueError("holds a command that is not python train.py")
        if (self.tokens or 0) < 0 or (self.seconds or 0) < 0:
            raise ValueError("holds fewer than no tokens or seconds")


def origin(told: Mapping[str, Any], where: Path) -> Origin | None:
    """That of a run, from its summary or the hyper-parameters of its checkpoint; None: it has none.

    Raises:
        UserError: it is not what a run writes. `where` names the file.
    """
    if told.get("init_from") is None:
        return None
    if not isinstance(told["init_from"], Mapping):
        raise UserError(f"{where}: init_from is not an object: restore the file, or train again")
    return build(Origin, told["init_from"], f"{where}: init_from")


def check_facts(told: Mapping[str, Any], kinds: Mapping[str, Any], where: Path) -> None:
    """Whether what a file tells can be shown: of the type that is written there, on one line.

    Args:
        told: what the file `where` holds.
        kinds: of each fact its type, such as `str | None`, or a mapping for facts within it.

    Raises:
        UserError: one of them is another, or text with a line break or the like in it.
    """
    for name, kind in kinds.items():
        value = told.get(name)
        inner = isinstance(kind, Mapping)
        right = isinstance(value, Mapping if inner else kind)
        if not right or (isinstance(value, str) and not value.isprintable()):
            raise UserError(
                f"{where}: {name} is {value!r}, as Mini GPT never writes it: restore that file or "
                "make it again"
            )
        if inner:
            check_facts(told[name], kind, where)


def series(rows: list[Row], name: str) -> tuple[list[float], list[float]]:
    """One column against tokens seen: (tokens, values), where it was measured."""
    measured = [(row["tokens"], row[name]) for row in rows if name in row]
    return [tokens for tokens, _ in measured], [value for _, value in measured]


def last_values(rows: list[Row]) -> Row:
    """The last measured value of every column."""
    return {name: value for row in rows for name, value in row.items()}


def human_count(number: float) -> str:
    """Three digits and a letter: 1.05M parameters, 104M tokens, 39.5k tokens per second."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:  # what would round up to 1000 takes the next letter
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


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
