"""The tab Train of the playground: its layout and its events."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported

import gradio as gr
from gradio.utils import get_upload_folder

from minigpt.core.settings import UserError, one_line
from minigpt.playground.answers import Playground
from minigpt.playground.html import note_html
from minigpt.playground.training import MAX_UPLOAD, SIZES, Job
from minigpt.playground.training_view import job_html

if TYPE_CHECKING:
    from minigpt.playground.server import Training

FIELDS = ("text", "files", "size", "minutes", "start", "job")  # fields that can have an error
POLL_SECONDS = 1.5  # interval at which the page shows a training again
START_FROM, RANDOM = "Start from", "random weights"

INTRODUCTION = """Train a model on your own stories. The training is a process of its own: it
continues if you close this page, and you find it here again."""
REFUSAL = (
    "Training needs an access key: open the whole address that minigpt playground printed in its "
    "terminal, with ?token=."
)
FILES = (
    "or files: .txt, .md, .csv, .tsv, .json, .jsonl or .parquet, also compressed; "
    f"at most {MAX_UPLOAD / 1e6:.0f} MB"
)


def training_tab(page: gr.Blocks, tab: gr.Tab, playground: Playground, training: Training) -> None:
    """Add the fields of a new training, the list of trainings, and a view of one of them.

    Args:
        page: the page that contains the tab.
        tab: the tab.
        playground: the models of the page, from which a training may start.
        training: the queue, and the token that a visitor needs.
    """
    queue, access = training.queue, training.access
    uploads = Path(get_upload_folder()).resolve()

    def allowed(request: gr.Request) -> bool:
        return access.allows(request.cookies.get(access.cookie))

    gr.Markdown(INTRODUCTION)
    refusal = gr.HTML(note_html(REFUSAL, "error"), elem_id="no-token")
    errors = {}
    with gr.Column(visible=False) as form:
        text = gr.Textbox(label="Text of the stories", lines=6, max_lines=12)
        errors["text"] = gr.HTML(elem_id="error-text")
        files = gr.File(label=FILES, file_count="multiple", type="filepath", height=140)
        errors["files"] = gr.HTML(elem_id="error-files")
        with gr.Row():
            sizes = [(f"{name}: {size}", name) for name, size in SIZES.items()]
            size = gr.Dropdown(sizes, value="small", label="Size")
            start = gr.Dropdown([RANDOM, *playground.models], value=RANDOM, label=START_FROM)
            minutes = gr.Number(5, label="Minutes")
        errors["size"] = gr.HTML(elem_id="error-size")
        errors["minutes"] = gr.HTML(elem_id="error-minutes")
        add = gr.Button("Start", variant="primary", elem_id="start-training")
        errors["start"] = gr.HTML(elem_id="error-start")
        chosen = gr.Dropdown([], label="Training", visible=False, elem_id="trainings")
        with gr.Row():
            stop = gr.Button("Stop", visible=False, elem_id="stop-training")
            resume = gr.Button("Continue", visible=False, elem_id="continue-training")
            remove = gr.Button("Remove from the list", visible=False, elem_id="remove-training")
        errors["job"] = gr.HTML(elem_id="error-job")
        view = gr.HTML(elem_id="training")
    known = gr.State([])  # choices of the list, which is sent again only if it changes
    shown = gr.State({})  # errors of the job on the page
    views = [chosen, known, stop, resume, remove, view]
    slots = [errors[name] for name in FIELDS]

    def act(action: Callable[..., Job | None], *values: Any, request: gr.Request) -> list[Any]:
        """Call `action` if the visitor may; return the error slots, the list and the view."""
        if not allowed(request):
            return [*_errors("start", REFUSAL), *[gr.skip()] * len(views)]
        try:
            job = action(*values)
        except UserError as error:
            field = error.argument if error.argument in FIELDS else "start"
            return [*_errors(field, error.message), *[gr.skip()] * len(views)]
        name = values[0] if job is None else job.name
        return [*_errors(), *_views(training, name, [], None)]

    def start_from(name: str) -> dict[str, str] | None:
        model = playground.models.get(name)
        if model is None or model.checkpoint is None:
            return None
        return {"path": str(model.checkpoint.absolute()), "name": name}

    def add_job(text: str, files: list[str] | None, size: str, start: str, minutes: float) -> Job:
        paths = [Path(name) for name in files or []]
        if not all(path.resolve().is_relative_to(uploads) for path in paths):
            raise UserError("Only uploaded files can be used.", "files")
        return queue.add(text, paths, size, minutes, start_from(start))

    def on_add(
        text: str, files: list[str] | None, size: str, start: str, minutes: float,
        request: gr.Request,
    ) -> list[Any]:  # fmt: skip
        answer = act(add_job, text, files, size, start, minutes, request=request)
        started = all(not error for error in answer[: len(FIELDS)])
        return [*answer, None if started else gr.skip()]  # the uploads were moved

    def on_stop(name: str, request: gr.Request) -> list[Any]:
        return act(queue.stop, name, request=request)

    def on_resume(name: str, request: gr.Request) -> list[Any]:
        return act(queue.resume, name, request=request)

    def on_remove(name: str, request: gr.Request) -> list[Any]:
        return act(queue.remove, name, request=request)

    def poll(name: str | None, known: list[Any], shown: dict[str, str], request: gr.Request) -> Any:
        """Return the list and the view, and the error of the job at its field."""
        if not allowed(request):
            return [gr.skip()] * (len(views) + len(slots) + 1)
        job = _selected(training, name)
        error = {} if job is None or job.error is None else _field_error(job)
        fields = [gr.skip()] * len(FIELDS)
        if error != shown:
            fields = _errors(*next(iter(error.items()), ()))
        return [*_views(training, name, known, name), *fields, error]

    def open_page(request: gr.Request) -> list[Any]:
        may = allowed(request)
        return [gr.HTML(visible=not may), gr.Column(visible=may)]

    how: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    outputs = [*slots, *views]
    fields = [text, files, size, start, minutes]
    add.click(on_add, fields, [*outputs, files], concurrency_limit=1, **how)
    for button, function in ((stop, on_stop), (resume, on_resume), (remove, on_remove)):
        button.click(function, [chosen], outputs, concurrency_limit=1, **how)
    polled = [chosen, known, shown], [*views, *slots, shown]
    chosen.input(poll, *polled, **how)
    gr.Timer(POLL_SECONDS).tick(poll, *polled, **how)
    for event in (page.load, tab.select):  # also the tab, which is built when it is opened
        event(open_page, None, [refusal, form], **how).then(poll, *polled, **how)


def _errors(field: str | None = None, message: str = "") -> list[str]:
    """Return the HTML of all error slots; only that of `field` is not empty."""
    return [note_html(one_line(message), "error") if name == field else "" for name in FIELDS]


def _field_error(job: Job) -> dict[str, str]:
    field = job.status.get("field") if job.state == "failed" else "job"
    return {field or "start": job.error or ""}


def _selected(training: Training, name: str | None) -> Job | None:
    """Return the job called `name`, or else the running or newest job; None if there is none."""
    jobs = training.queue.jobs()
    running = [job for job in jobs if job.state == "running"]
    chosen = [job for job in jobs if job.name == name]
    return next(iter([*chosen, *running, *jobs]), None)


def _views(
    training: Training, name: str | None, known: list[Any], current: str | None
) -> list[Any]:
    """Return updates for the menu of jobs, its choices, the buttons and the view of a job.

    Args:
        training: the queue.
        name: name of the job to show.
        known: choices that the page already has.
        current: name that is chosen on the page.
    """
    jobs, job = training.queue.jobs(), _selected(training, name)
    choices = [[_label(each), each.name] for each in jobs]
    value = None if job is None else job.name
    listed = gr.skip()
    if choices != known or value != current:
        # Without a value, what the visitor chooses meanwhile stays.
        chosen: dict[str, Any] = {} if value == current else {"value": value}
        pairs = [(label, key) for label, key in choices]
        listed = gr.Dropdown(pairs, visible=bool(choices), **chosen)
    state = None if job is None else job.state
    buttons = [
        gr.Button(visible=state in ("waiting", "running")),
        gr.Button(visible=job is not None and job.can_continue),
        gr.Button(visible=state not in (None, "running")),
    ]
    waiting = [each.name for each in jobs if each.state == "waiting"]
    return [listed, choices, *buttons, "" if job is None else job_html(job, len(waiting))]


def _label(job: Job) -> str:
    settings = job.settings
    start = settings["init_from"]
    size = settings["size"] if start is None else start["name"]
    begun = time.strftime("%H:%M", time.localtime(settings["queued"]))
    return f"{size}, {settings['minutes']:g} min, {begun}: {job.state}"
