"""report.html: the results of one run on an HTML page that needs neither network nor server.

    >>> write_report(Path("runs/small-20260101-120000"))
    PosixPath('runs/small-20260101-120000/report.html')

The charts are SVG elements inside the page. Chart text has the page's colour for secondary text.
Curves, except the raw training loss, have a contrast of at least 3 on a light and on a dark
background.
"""

from __future__ import annotations

import base64
import math
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from minigpt.core.files import write_text
from minigpt.core.plots import COLOURS, INK, log_ticks, new_figure, to_svg
from minigpt.core.settings import next_step
from minigpt.core.text import human_count, human_time
from minigpt.runs.folder import read_config
from minigpt.runs.names import (
    CONFIG,
    OVER_TIME_ANIMATION,
    OVER_TIME_FIGURE,
    OVER_TIME_TABLE,
    REPORT,
    SNAPSHOTS,
)
from minigpt.runs.records import Row, last_values, read_metrics, read_samples, read_summary, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, VAL, OTHER = COLOURS
PERPLEXITY = "val/perplexity"
CURVES = (  # column of metrics.csv, title, axis label, colour
    (PERPLEXITY, "Validation perplexity", "perplexity (log scale)", VAL),
    ("train/divergence", "Divergence from the teachers", "KL (nats per token)", TRAIN),
    ("tokens_per_second", "Throughput", "tokens per second", OTHER),
    ("lr", "Learning rate", "learning rate", OTHER),
)
OPEN_STAGES = 5  # number of steps, evenly spaced, whose stories are shown unfolded


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run folder from the files that the run has written so far.

    If the folder also contains the results of `minigpt study --over-time`, the page shows them.

    Args:
        run_dir: the run folder.

    Returns:
        The path of the page. An existing page is replaced atomically.

    Raises:
        UserError: a file of the run cannot be read; the message names the file.
    """
    rows, summary = read_metrics(run_dir), read_summary(run_dir)
    config = run_dir / CONFIG
    options: Any = {"loader": PackageLoader("minigpt", "training"), "undefined": StrictUndefined}
    environment = Environment(autoescape=True, trim_blocks=True, **options)
    page = environment.get_template("report.html.j2").render(
        name=run_dir.resolve().name,
        status=summary.get("status", "unfinished"),
        tokens=human_count(summary.get("tokens") or last_values(rows).get("tokens", 0)),
        summary=summary,
        headline=_headline(rows, summary),
        details=_details(summary, run_dir),
        charts=_charts(rows),
        stages=_stages(read_samples(run_dir), rows),
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        over_time=_over_time(run_dir),
        commands=_commands(run_dir),
    )
    write_text(run_dir / REPORT, page)
    return run_dir / REPORT


# ------------------------------------------------------------------------------------- numbers


def _headline(rows: list[Row], summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (name, value, note) for each measured number at the top of the page."""
    numbers = last_values(rows) | {k: v for k, v in summary.items() if v is not None}
    nats, non_embedding = "{:.3f} nats per token", "{} non-embedding"
    tiles = [  # key, label and format of the number; key and format of the note
        ("val/perplexity", "validation perplexity", "{:.2f}".format, "val/loss", nats.format),
        ("val/bits_per_byte", "bits per byte", "{:.3f}".format, "", str),
        ("parameters", "parameters", human_count, "non_embedding_parameters",
         lambda n: non_embedding.format(human_count(n))),
        ("tokens", "training tokens", human_count, "steps", "{:,} steps".format),
        ("seconds", "training time", human_time, "", str),
        ("tokens_per_second", "tokens per second", human_count, "", str),
    ]  # fmt: skip
    return [
        (name, text(numbers[key]), note(numbers[other]) if other in numbers else "")
        for key, name, text, other, note in tiles
        if key in numbers
    ]


def _details(summary: dict[str, Any], run_dir: Path) -> list[tuple[str, str]]:
    """Return (key, value as text) for every entry of summary.json, and the settings of teachers."""

    def text(value: Any) -> str:
        if value is None:
            return "not measured"
        if isinstance(value, list):  # teachers
            return ", ".join(map(text, value))
        if isinstance(value, dict):  # init_from, the parent run, or a teacher
            return str(value.get("name"))
        if isinstance(value, float):
            return f"{value:,.6g}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    teacher = _config(run_dir).get("teacher") or {}
    names = ("weight", "temperature") if teacher.get("runs") else ()
    settings = {f"teacher.{name}": teacher.get(name) for name in names}
    return [(key, text(value)) for key, value in {**summary, **settings}.items()]


def _config(run_dir: Path) -> dict[str, Any]:
    return read_config(run_dir) if (run_dir / CONFIG).is_file() else {}


def _over_time(run_dir: Path) -> dict[str, str] | None:
    """Return figure (a data URL) and table (Markdown) of the study of the snapshots, or None.

    `animation` is the name of the page with the animation of the embeddings, in the run folder; ""
    means that there is none.
    """
    figure, table = run_dir / OVER_TIME_FIGURE, run_dir / OVER_TIME_TABLE
    if not (figure.is_file() and table.is_file()):
        return None
    url = f"data:image/png;base64,{base64.b64encode(figure.read_bytes()).decode()}"
    animation = OVER_TIME_ANIMATION if (run_dir / OVER_TIME_ANIMATION).is_file() else ""
    return {"figure": url, "table": table.read_text(encoding="utf-8"), "animation": animation}


def _commands(run_dir: Path) -> list[tuple[str, str]]:
    """Return (purpose, call or command) for each next step that the page suggests."""
    run = run_dir.resolve()
    run = (run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run).as_posix()
    generation = "Generate stories from your own prompts"
    evaluation = "Evaluate: perplexity of the whole validation split, stories at four temperatures"
    model_class = _config(run_dir).get("model_class")
    own = {} if model_class is None else {"class_path": str(model_class)}
    commands = [
        (evaluation, next_step("evaluate", ckpt=run, **own)),
        (generation, next_step("generate", run=run, **own)),
    ]
    if n := len(list((run_dir / SNAPSHOTS).glob("step-*.safetensors"))):
        study = f"Measure what the model learned when, on its {n} snapshots: tables, a figure and "
        study += "an animation of the embeddings; this page then shows the figure and the tables"
        page = f"See the {n} snapshots in the playground, with a slider for the age of the model"
        over_time = f"{next_step('study', run=run, **own, out=run)} --over-time"
        commands += [(study, over_time), (page, next_step("playground", run=run, **own))]
    return commands


# ------------------------------------------------------------------------------------- stories


def _stages(samples: list[dict[str, Any]], rows: list[Row]) -> list[dict[str, Any]]:
    """Return the sample stories grouped by step, with the validation perplexity at each step."""
    perplexity = {row["step"]: f"{row[PERPLEXITY]:.2f}" for row in rows if PERPLEXITY in row}
    groups = [(step, list(group)) for step, group in groupby(samples, key=lambda s: s["step"])]
    spread = {round(i * (len(groups) - 1) / (OPEN_STAGES - 1)) for i in range(OPEN_STAGES)}
    return [
        {
            "step": f"{step:,}",
            "tokens": human_count(stories[0]["tokens"]),
            "perplexity": perplexity.get(step, ""),
            # `text` may begin with the prompt or continue it.
            "stories": [s | {"continuation": s["text"].removeprefix(s["prompt"])} for s in stories],
            "open": i in spread,
        }
        for i, (step, stories) in enumerate(groups)
    ]


# -------------------------------------------------------------------------------------- charts


def smooth(values: list[float], reach: int) -> list[float]:
    """Return the centred moving average over `reach` neighbours on either side.

    The window shrinks near the ends and stays symmetric, so that a falling curve is not shifted.

    Args:
        values: the values of a curve.
        reach: number of neighbours on each side.

    Returns:
        One smoothed value for each of `values`.
    """
    near = [min(reach, i, len(values) - 1 - i) for i in range(len(values))]
    return [fmean(values[i - n : i + n + 1]) for i, n in enumerate(near)]


def _charts(rows: list[Row]) -> list[tuple[str, str]]:
    """Return (title, SVG) of each chart that has measurements."""
    charts = []
    if series(rows, "train/loss")[1] or series(rows, "val/loss")[1]:
        charts.append(("Loss", to_svg(loss_figure(rows))))
    for column, title, label, colour in CURVES:
        if series(rows, column)[1]:
            charts.append((title, to_svg(curve_figure(rows, column, label, colour))))
    return charts


def loss_figure(rows: list[Row]) -> Figure:
    """Plot the training loss, raw and smoothed, and the validation loss against tokens."""
    figure, axes = _axes("loss (nats per token)")
    tokens, loss = series(rows, "train/loss")
    if loss:
        reach = max(1, len(loss) // 50)
        axes.plot(tokens, loss, color=TRAIN, alpha=0.5, linewidth=0.6, label="train")
        label = f"train, mean of {2 * reach + 1} points"
        axes.plot(tokens, smooth(loss, reach), color=TRAIN, linewidth=1.8, label=label)
    tokens, loss = series(rows, "val/loss")
    if loss:
        axes.plot(tokens, loss, "o-", color=VAL, markersize=4, linewidth=1.2, label="validation")
    axes.set_xlim(left=0)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    return figure


def curve_figure(rows: list[Row], column: str, label: str, colour: str) -> Figure:
    """Plot a column of metrics.csv against tokens; perplexity has a logarithmic scale.

    Args:
        rows: rows of metrics.csv.
        column: name of the column.
        label: label of the vertical axis.
        colour: colour of the curve.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(label)
    tokens, values = series(rows, column)
    sparse = len(values) <= 60
    axes.plot(tokens, values, "o-" if sparse else "-", color=colour, markersize=4, linewidth=1.6)
    if column == PERPLEXITY:
        axes.set_yscale("log")
        finite = [value for value in values if math.isfinite(value)] or [1.0]
        ratio = max(finite) / min(finite)
        log_ticks(axes.yaxis, (1, 2, 5) if ratio > 30 else (1, 1.5, 2, 3, 5, 7), "{:,.4g}".format)
        if ratio <= 3:
            axes.yaxis.set_major_locator(MaxNLocator(5))
    else:
        unit = human_count if column == "tokens_per_second" else "{:g}".format
        axes.set_ylim(bottom=0)  # heights are then proportional to values
        axes.yaxis.set_major_formatter(lambda value, _: unit(value))
    axes.set_xlim(left=0)
    return figure


def _axes(label: str) -> tuple[Figure, Axes]:
    """Return an empty figure and its axes; the x-axis is the number of training tokens."""
    figure = new_figure(5, 3)
    (axes,) = figure.axes
    axes.set(xlabel="training tokens", ylabel=label)
    axes.xaxis.set_major_formatter(lambda value, _: human_count(value))
    return figure, axes
