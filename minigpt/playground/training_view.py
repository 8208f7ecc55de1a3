"""HTML that shows a training run on the page: its state, its loss curve and its sample stories."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

from minigpt.core.settings import UserError, one_line
from minigpt.core.text import human_count, human_time
from minigpt.playground.curves import Curve, curve_svg, metrics
from minigpt.playground.html import note_html, prompt_html
from minigpt.playground.training import TEXT, Job
from minigpt.runs.records import last_values, read_samples, series

N_SAMPLES = 2  # sample stories on the page
PHASES = {
    "starting": "starting",
    "preparing": "reading the text",
    "calibrating": "measuring the speed, to convert minutes into tokens",
    "training": "training",
}


def job_html(job: Job, n_waiting: int = 0) -> str:
    """Return state, error, loss curve and sample stories of a training run, as HTML.

    For a finished training run, the result also has a command that repeats it.

    Args:
        job: the training.
        n_waiting: number of waiting training runs.
    """
    parts = [note_html(_state_line(job, n_waiting))]
    if job.error is not None:
        parts.append(note_html(one_line(job.error), "error"))
    run = job.run
    if run is not None and run.is_dir():
        try:
            parts.append(_run_html(run, job.status.get("tokens")))
        except UserError as error:
            parts.append(note_html(str(error), "error"))
    command = job.status.get("command")
    if command and job.state == "finished":
        first = _files_to_save(job.settings)
        parts.append(note_html(f"The run is in {run}. To repeat it in a terminal, {first}type:"))
        parts.append(f'<pre class="command">{html.escape(command)}</pre>')
    return "".join(parts)


def _files_to_save(settings: dict[str, Any]) -> str:
    """Return the part of a sentence that says which files the command of a job needs.

    It names the pasted text, and each upload whose name an earlier file has. The result is "" if
    there are none.
    """
    names, is_pasted = settings["names"], settings["pasted"]
    steps = [f"the pasted text as {TEXT}"] if is_pasted else []
    for new, name in settings.get("renamed", {}).items():
        number = names.index(new) + (0 if is_pasted else 1)
        steps.append(f"uploaded file {number} ({name}) as {new}")
    return f"save {' and '.join(steps)}, then " if steps else ""


def _state_line(job: Job, n_waiting: int) -> str:
    state = job.state
    if state == "waiting":
        return f"waiting for another training run to end; {n_waiting} in the queue"
    if state != "running":
        return state
    if job.settings["state"] == "stopping":
        return "stopping after a checkpoint"
    phase = str(job.status.get("phase"))
    return PHASES.get(phase, phase)


def _run_html(run: Path, tokens: int | None) -> str:
    rows = metrics(run)
    values, parts = last_values(rows), []
    if rows:
        facts = [f"{human_count(values['tokens'])} of {human_count(tokens or 0)} tokens"]
        if "train/loss" in values:
            loss = values["train/loss"]
            facts.append(f"loss {loss:.3f}, perplexity {math.exp(min(loss, 99)):.2f}")
        if "val/perplexity" in values:
            facts.append(f"validation perplexity {values['val/perplexity']:.2f}")
        if rate := values.get("tokens_per_second"):
            left = max((tokens or 0) - values["tokens"], 0) / rate
            facts += [f"{rate:,.0f} tokens/s", f"{human_time(left)} of training left"]
        parts.append(note_html(", ".join(facts)))
        curve = Curve(series(rows, "train/loss"), series(rows, "val/loss"))
        parts.append(curve_svg(curve, tokens))
    for sample in reversed(read_samples(run)[-N_SAMPLES:]):
        title = f"After {human_count(sample['tokens'])} tokens:"
        story = prompt_html(str(sample["prompt"])) + html.escape(str(sample["text"]))
        parts.append(f'{note_html(title)}<div class="story sample" dir="auto">{story}</div>')
    return "".join(parts)
