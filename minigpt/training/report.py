"""report.html: one page that says how a run went, readable without a network or a server.

    >>> write_report(Path("runs/small-20260101-120000"))
    PosixPath('runs/small-20260101-120000/report.html')

The charts are drawn with matplotlib as SVG text inside the page. Their colours are swapped for the
page's CSS variables, so that one drawing serves light and dark mode.
"""

from __future__ import annotations

import io
import math
import re
import shlex
from importlib import resources
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined, Template

from minigpt.core.files import write_text
from minigpt.core.text import human_count, human_time
from minigpt.runs.names import CONFIG, REPORT
from minigpt.runs.records import (
    Row,
    last_values,
    read_metrics,
    read_samples,
    read_summary,
    series,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID = "#57606a", "#e6e4df"  # axis text, grid lines
TRAIN, VAL, OTHER = "#2a6fb0", "#d2571e", "#3f8f6b"
CSS_VARIABLES = {
    INK: "var(--muted)",
    GRID: "var(--line)",
    TRAIN: "var(--train)",
    VAL: "var(--val)",
    OTHER: "var(--other)",
}
PERPLEXITY = "val/perplexity"
CURVES = (  # column of metrics.csv, title, axis label, colour
    (PERPLEXITY, "Validation perplexity", "perplexity (log scale)", VAL),
    ("tokens_per_second", "Throughput", "tokens per second", OTHER),
    ("lr", "Learning rate", "learning rate", OTHER),
)
OPEN_STAGES = 5  # stages of the sample stories shown unfolded, spread from first to last


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run folder from whatever the run has written so far.

    Returns:
        The path of the page. It is replaced whole, so a browser never sees half of one.

    Raises:
        UserError: one of the run's own files cannot be read; the message names it.
    """
    rows, summary = read_metrics(run_dir), read_summary(run_dir)
    config = run_dir / CONFIG
    page = _template().render(
        name=run_dir.resolve().name,
        subtitle=_subtitle(summary),
        status=summary.get("status", "unfinished"),
        status_line=_status_line(rows, summary),
        headline=_headline(rows, summary),
        details=_details(summary),
        charts=_charts(rows),
        stages=_stages(read_samples(run_dir), rows),
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        commands=_commands(run_dir),
    )
    path = run_dir / REPORT
    write_text(path, page)
    return path


# ------------------------------------------------------------------------------------- numbers


def _subtitle(summary: dict[str, Any]) -> str:
    words = {"model": "{} model", "device": "on {}", "precision": "in {}"}
    return " ".join(text.format(summary[key]) for key, text in words.items() if key in summary)


def _status_line(rows: list[Row], summary: dict[str, Any]) -> str:
    """How the run ended, in one sentence."""
    tokens = summary.get("tokens") or last_values(rows).get("tokens", 0)
    seen = f"after {human_count(tokens)} tokens"
    last = "The numbers are the last that were measured."
    return {
        "finished": f"Finished {seen}.",
        "interrupted": f"Interrupted {seen}. {last}",
        "failed": f"Failed {seen}. {last}",
        None: f"Not finished: still training, or killed, {seen}. {last}",
    }[summary.get("status")]


def _headline(rows: list[Row], summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, value, small print) of the numbers on top; those never measured are left out."""
    numbers = last_values(rows) | {k: v for k, v in summary.items() if v is not None}
    shown = [
        ("val/perplexity", "validation perplexity", "{:.2f}".format),
        ("val/bits_per_byte", "bits per byte", "{:.3f}".format),
        ("parameters", "parameters", human_count),
        ("tokens", "tokens seen", human_count),
        ("seconds", "time", human_time),
        ("tokens_per_second", "tokens per second", human_count),
    ]
    notes = {
        "val/perplexity": ("val/loss", "{:.3f} nats per token".format),
        "parameters": ("non_embedding_parameters", lambda n: f"{human_count(n)} non-embedding"),
        "tokens": ("steps", "{:,} steps".format),
    }
    tiles = []
    for key, label, text in shown:
        if key in numbers:
            other, note = notes.get(key, ("", str))
            tiles.append(
                (label, text(numbers[key]), note(numbers[other]) if other in numbers else "")
            )
    return tiles


def _details(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Every entry of summary.json as text."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.6g}"
        if isinstance(value, dict):  # init_from: the run whose weights this one began with
            return str(value.get("name"))
        return f"{value:,}" if isinstance(value, int) else str(value)

    return [
        (key, "not measured" if value is None else text(value)) for key, value in summary.items()
    ]


def _commands(run_dir: Path) -> list[tuple[str, str]]:
    """(why, command line) to type next, from where the run was started if that is still here."""
    folder = run_dir.resolve()
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    run = folder.as_posix()
    return [
        (
            "Perplexity over the whole validation split, stories at four temperatures, embeddings",
            f"python evaluate.py {shlex.quote(f'ckpt={run}')}",
        ),
        ("Stories of your own", f"minigpt generate {shlex.quote(run)}"),
    ]


# ------------------------------------------------------------------------------------- stories


def _stages(samples: list[dict[str, Any]], rows: list[Row]) -> list[dict[str, Any]]:
    """The samples grouped by the step they were taken at, with the perplexity at that step."""
    perplexity = {row["step"]: f"{row[PERPLEXITY]:.2f}" for row in rows if PERPLEXITY in row}
    stages = []
    for step, group in groupby(samples, key=lambda sample: sample["step"]):
        stories = [
            # `text` may begin with the prompt or go on after it: either way the two are set apart
            sample | {"continuation": sample["text"].removeprefix(sample["prompt"])}
            for sample in group
        ]
        stages.append(
            {
                "step": f"{step:,}",
                "tokens": human_count(stories[0]["tokens"]),
                "perplexity": perplexity.get(step, ""),
                "stories": stories,
                "open": False,
            }
        )
    for i in range(OPEN_STAGES if stages else 0):
        stages[round(i * (len(stages) - 1) / (OPEN_STAGES - 1))]["open"] = True
    return stages


# -------------------------------------------------------------------------------------- charts


def smooth(values: list[float], reach: int) -> list[float]:
    """The mean over `reach` neighbours on either side, over fewer near the ends.

    As many on the left as on the right, so that a falling curve is not drawn late or too high.
    """
    means = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        means.append(fmean(values[i - near : i + near + 1]))
    return means


def _charts(rows: list[Row]) -> list[tuple[str, str]]:
    """(title, SVG) of each chart for which there are measurements."""
    charts = []
    if series(rows, "train/loss")[1] or series(rows, "val/loss")[1]:
        charts.append(("Loss", _svg(loss_figure(rows))))
    for column, title, label, colour in CURVES:
        if series(rows, column)[1]:
            charts.append((title, _svg(curve_figure(rows, column, label, colour))))
    return charts


def loss_figure(rows: list[Row]) -> Figure:
    """Training loss (each logged step faint, its average strong) and validation loss, in nats."""
    figure, axes = _axes("loss (nats per token)")
    tokens, loss = series(rows, "train/loss")
    if loss:
        reach = max(1, len(loss) // 50)
        axes.plot(tokens, loss, color=TRAIN, alpha=0.35, linewidth=0.8, label="train")
        label = f"train, mean of {2 * reach + 1} points"
        axes.plot(tokens, smooth(loss, reach), color=TRAIN, linewidth=1.8, label=label)
    tokens, loss = series(rows, "val/loss")
    if loss:
        axes.plot(tokens, loss, "o-", color=VAL, markersize=4, linewidth=1.2, label="validation")
    axes.set_xlim(left=0)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    return figure


def curve_figure(rows: list[Row], column: str, label: str, colour: str) -> Figure:
    """One column of metrics.csv against tokens; perplexity on a logarithmic scale."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    figure, axes = _axes(label)
    tokens, values = series(rows, column)
    sparse = len(values) <= 60
    axes.plot(tokens, values, "o-" if sparse else "-", color=colour, markersize=4, linewidth=1.6)
    if column == PERPLEXITY:
        axes.set_yscale("log")
        finite = [value for value in values if math.isfinite(value)] or [1.0]
        ratio = max(finite) / min(finite)
        subs = (1, 2, 5) if ratio > 30 else (1, 1.5, 2, 3, 5, 7)
        axes.yaxis.set_major_locator(LogLocator(subs=subs) if ratio > 3 else MaxNLocator(5))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    else:
        unit = human_count if column == "tokens_per_second" else "{:g}".format
        axes.set_ylim(bottom=0)  # the height of the curve is then its true proportion
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: unit(value)))
    axes.set_xlim(left=0)
    return figure


def _axes(label: str) -> tuple[Figure, Axes]:
    """An empty figure whose horizontal axis is tokens seen."""
    from matplotlib.figure import Figure  # here: slow to import; not pyplot: no global figures
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.set_xlabel("tokens seen", color=INK, fontsize=9)
    axes.set_ylabel(label, color=INK, fontsize=9)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_count(value)))
    return figure, axes


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element: real text, a clear background, the page's own colours."""
    from matplotlib import rc_context

    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    text = io.StringIO()
    salt = figure.axes[0].get_ylabel()  # so that no two charts of the page share an id
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML prolog, which HTML does not take
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # groups: in every chart the same, never used
    for colour, variable in CSS_VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg


def _template() -> Template:
    source = resources.files("minigpt").joinpath("training/report.html.j2")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(source.read_text(encoding="utf-8"))
