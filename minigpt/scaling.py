"""Runs in, scaling table and figure out: how perplexity falls as the model grows.

    >>> runs = [read_run(folder) for folder in find_runs([Path("runs")])]
    >>> write_scaling(runs, Path("runs"))  # scaling.md, scaling.png, scaling.json

A run leaves the same folder whether a W&B agent started it, `python train.py -m model=small,…`, or
a person; reading folders is therefore all there is to do for either kind of sweep. Perplexities
compare only on the same text, cut into the same tokens: the figure draws one line for each data
source and token budget.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from minigpt.config import UserError
from minigpt.records import human_count, last_values, read_metrics, read_summary
from minigpt.runs import CONFIG, METRICS, SUMMARY, Run, write_json, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

# Parameters and validation perplexity of the three models this project sets out to beat: 104M
# tokens of TinyStories, a vocabulary of 3,000.
REFERENCE = {1_046_656: 17.75, 3_404_032: 10.23, 7_072_128: 8.08}
REFERENCE_LABEL = "reference, 104M tokens"


@dataclass(frozen=True)
class RunResult:
    """What one run came to. A number that was never measured, or is not finite, is None."""

    path: Path
    model: str  # the option of the config group: small, medium, large
    data: str  # data.source
    seed: int
    status: str  # finished, interrupted, failed; unfinished: no summary, so running or killed
    parameters: int | None
    non_embedding_parameters: int | None
    tokens: int  # seen in training
    loss: float | None  # nats per token over the validation split, at the end of the run
    perplexity: float | None
    bits_per_byte: float | None

    @property
    def reference_perplexity(self) -> float | None:
        """The reference's perplexity at exactly this parameter count, if it has one."""
        return REFERENCE.get(self.parameters or 0)

    @property
    def point(self) -> tuple[int, float] | None:
        """Its (parameters, perplexity) in the figure: None unless it finished with both."""
        if self.status != "finished" or self.parameters is None or self.perplexity is None:
            return None
        return self.parameters, self.perplexity


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The run folders among and below `folders`, each once, in the order of their names.

    A run folder holds config.yaml, and summary.json or metrics.csv. Hidden folders and what lies
    inside a run are not searched.

    Raises:
        UserError: a folder does not exist, or there is no run in any of them.
    """
    found = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give one with runs in it, such as runs")
        for name, below, files in os.walk(folder):
            below[:] = sorted(inner for inner in below if not inner.startswith("."))
            if CONFIG in files and (SUMMARY in files or METRICS in files):
                found.setdefault(Path(name).resolve(), Path(name))
                below.clear()
    if not found:
        places = " or ".join(map(str, folders))
        raise UserError(f"no run in {places}: make some with python train.py -m model=small,medium")
    return list(found.values())


def read_run(path: Path) -> RunResult:
    """The result of the run in the folder `path`, finished or not.

    Raises:
        UserError: one of its files is missing or cannot be read; the message names it.
    """
    summary, config = read_summary(path), Run(path, path).config()
    numbers: dict[str, Any] = last_values(read_metrics(path))
    numbers |= {name: value for name, value in summary.items() if value is not None}

    def number(name: str) -> Any:
        value = numbers.get(name)
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{path / SUMMARY}: {name} is {value!r}, expected a number")
        return value

    try:
        data, seed = config["data"]["source"], config["seed"]
    except (KeyError, TypeError):
        raise UserError(f"{path / CONFIG} lacks data.source or seed: is it a run's?") from None
    return RunResult(
        path=path,
        model=numbers.get("model", "unknown"),
        data=data,
        seed=seed,
        status=numbers.get("status", "unfinished"),
        parameters=number("parameters"),
        non_embedding_parameters=number("non_embedding_parameters"),
        tokens=int(number("tokens") or 0),
        loss=number("val/loss"),
        perplexity=number("val/perplexity"),
        bits_per_byte=number("val/bits_per_byte"),
    )


def write_scaling(runs: Iterable[RunResult], out: Path) -> None:
    """Write scaling.md, scaling.png and scaling.json into the folder `out`, made if missing."""
    runs = by_size(runs)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "scaling.md", markdown(runs))
    write_json(out / "scaling.json", as_json(runs))
    picture = out / "scaling.png"
    temporary = picture.with_name(f"{picture.name}.{os.getpid()}.tmp")
    scaling_figure(runs).savefig(temporary, format="png", dpi=200)
    temporary.replace(picture)


# ---------------------------------------------------------------------------------------- table

COLUMNS = {  # heading in scaling.md: heading on the terminal, where the row has 80 characters
    "run": "run",
    "model": "model",
    "parameters": "params",
    "non-embedding parameters": "non-emb.",
    "tokens": "tokens",
    "seed": "seed",
    "nats/token": "nats",
    "perplexity": "ppl",
    "bits per byte": "bits/B",
    "reference perplexity": "ref.",
}


def by_size(runs: Iterable[RunResult]) -> list[RunResult]:
    """Smallest model first, then fewest tokens, then by seed; unknown sizes last."""
    return sorted(runs, key=lambda r: (r.parameters or math.inf, r.tokens, r.seed, str(r.path)))


def cells(run: RunResult, count: Callable[[float], str]) -> tuple[str, ...]:
    """One row of the table, under `COLUMNS`; `count` writes the parameters; a dash: not known."""

    def text(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    name = run.path.resolve().name
    return (
        name if run.status == "finished" else f"{name} ({run.status})",
        run.model,
        "–" if run.parameters is None else count(run.parameters),
        "–" if run.non_embedding_parameters is None else count(run.non_embedding_parameters),
        human_count(run.tokens),
        str(run.seed),
        text(run.loss, ".3f"),
        text(run.perplexity, ".2f"),
        text(run.bits_per_byte, ".3f"),
        text(run.reference_perplexity, ".2f"),
    )


def markdown(runs: Sequence[RunResult]) -> str:
    """The table as Markdown, with a note on what the numbers are."""
    ruler = ("---", "---", *["---:"] * (len(COLUMNS) - 2))
    lines = [tuple(COLUMNS), ruler, *(cells(run, "{:,}".format) for run in runs)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# Scaling\n\n{table}\n\n{notes(runs)}\n"


def notes(runs: Sequence[RunResult]) -> str:
    """What a reader must know before comparing two rows."""
    sources = sorted({run.data for run in runs})
    text = (
        f"Validation at the end of each run, on {', '.join(sources)}. The reference saw 104M "
        "tokens of the full TinyStories corpus: a run on other data or fewer tokens is not like "
        "for like."
    )
    left_out = sum(run.point is None for run in runs)
    if left_out:
        text += f" Not in the figure, because they did not finish: {left_out} of {len(runs)} runs."
    return text


def rich_table(runs: Iterable[RunResult]) -> Table:
    """The same table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in COLUMNS.values():
        left = name in ("run", "model")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "run")
    for run in by_size(runs):
        style = "" if run.point else "yellow"
        row = [Text(cell, overflow="fold") for cell in cells(run, human_count)]  # [x] is no markup
        table.add_row(*row, style=style)
    return table


# --------------------------------------------------------------------------------------- figure


@dataclass(frozen=True)
class Point:
    """All finished runs of one size on one line of the figure."""

    parameters: int
    runs: int
    perplexity: float  # arithmetic mean over the runs
    lowest: float
    highest: float


def curves(runs: Iterable[RunResult]) -> dict[str, list[Point]]:
    """One line for each data source and token budget: its label, and its points by size."""
    perplexities: dict[str, dict[int, list[float]]] = {}
    for run in by_size(runs):
        if run.point:
            line = perplexities.setdefault(f"{run.data}, {human_count(run.tokens)} tokens", {})
            line.setdefault(run.point[0], []).append(run.point[1])
    return {
        label: [Point(n, len(ys), fmean(ys), min(ys), max(ys)) for n, ys in line.items()]
        for label, line in perplexities.items()
    }


def as_json(runs: Sequence[RunResult]) -> dict[str, Any]:
    """The rows of the table and the points of the figure, as plain values."""
    return {
        "runs": [
            dataclasses.asdict(run)
            | {"path": run.path.as_posix(), "reference_perplexity": run.reference_perplexity}
            for run in runs
        ],
        "figure": {
            label: [dataclasses.asdict(point) for point in line]
            for label, line in curves(runs).items()
        },
        "reference": [{"parameters": n, "perplexity": y} for n, y in REFERENCE.items()],
    }


def scaling_figure(runs: Iterable[RunResult]) -> Figure:
    """Validation perplexity against parameters, both logarithmic, beside the reference's points.

    A bar spans the lowest and the highest run of a size where there are several.
    """
    from matplotlib.figure import Figure  # here: slow to import; not pyplot: no global figures
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes, reference = list(REFERENCE), list(REFERENCE.values())
    axes.plot(sizes, reference, "D--", color="#6b7280", markersize=6, label=REFERENCE_LABEL)
    _label(axes, REFERENCE.items(), "above")
    for i, (label, line) in enumerate(curves(runs).items()):
        x, y = [point.parameters for point in line], [point.perplexity for point in line]
        bars = [
            [point.perplexity - point.lowest for point in line],
            [point.highest - point.perplexity for point in line],
        ]
        axes.errorbar(x, y, bars, fmt="o-", color=f"C{i}", capsize=4, markersize=7, label=label)
        _label(axes, zip(x, y, strict=True), "below")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 4, 5, 6, 8)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: human_count(value)))
    axes.margins(x=0.1, y=0.12)
    axes.set(xlabel="parameters", ylabel="validation perplexity")
    axes.set_title("Perplexity against model size (both axes logarithmic)", loc="left", fontsize=11)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _label(
    axes: Axes, points: Iterable[tuple[int, float]], side: Literal["above", "below"]
) -> None:
    """Write each perplexity beside its point: on the other side than the other curve's."""
    above = side == "above"
    for size, perplexity in points:
        axes.annotate(
            f"{perplexity:.2f}",
            (size, perplexity),
            textcoords="offset points",
            xytext=(7, 5) if above else (-7, -5),
            ha="left" if above else "right",
            va="bottom" if above else "top",
            fontsize=9,
            color="#374151",
        )
