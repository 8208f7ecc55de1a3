"""The tab Train of the playground: its layout and its events."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported

import gradio as gr
from gradio.components import Component
from gradio.utils import get_upload_folder

from minigpt.core.settings import UserError, one_line
from minigpt.playground.answers import Playground
from minigpt.playground.html import note_html, static_text
from minigpt.playground.training import MAX_UPLOAD, SIZES, Job, too_large
from minigpt.playground.training_view import job_html
from minigpt.runs.folder import bundled_release

if TYPE_CHECKING:
    from minigpt.playground.server import Training

FIELDS = ("text", "files", "size", "minutes", "start", "job")  # fields that can have an error
N_VIEWS = 6  # number of components that `_views` updates
POLL_SECONDS = 3.0  # interval of the updates; each one takes the browser 0.2 s of one core
VIEW_SHARE = 0.02  # maximum share of one core that the view of a long run takes from the training
START_FROM, RANDOM = "Start from", "random weights"

INTRODUCTION = """Train a model on your own stories. The training is a process of its own: it
continues if you close this page, and you find it here again."""
REFUSAL = (
    "Training needs an access token: open the complete address that minigpt playground printed in "
    "the terminal, including ?token=."
)
FILES = (
    "or files: .txt, .md, .csv, .tsv, .json, .jsonl, .ndjson or .parquet, also compressed; "
    f"at most {MAX_UPLOAD / 1e6:.0f} MB"
)


@dataclass(frozen=True)
class _Form:
    """Gradio components of the tab Train."""

    refusal: gr.HTML
    column: gr.Column  # everything but the refusal
    inputs: list[Component]  # text, files, size, start and minutes
    files: gr.File
    add: gr.Button
    chosen: gr.Dropdown
    known: gr.State  # what the page shows of the jobs; only what has changed is sent again
    stop: gr.Button
    resume: gr.Button
    remove: gr.Button
    view: gr.HTML
    slots: list[gr.HTML]  # errors, in the order of FIELDS
    shown: gr.State  # error of the selected job that the page shows, by field

    @property
    def views(self) -> list[Component]:
        """Components that `_views` updates."""
        return [self.chosen, self.known, self.stop, self.resume, self.remove, self.view]


def training_tab(page: gr.Blocks, tab: gr.Tab, playground: Playground, training: Training) -> None:
    """Add the fields of a new training, the list of training runs, and a view of one of them.

    Args:
        page: the page that contains the tab.
        tab: the tab.
        playground: the models of the page. A training run may start from one of them.
        training: the queue of training runs and its access token.
    """
    form, events = _form(playground), _Events(playground, training)
    # Not in Gradio's queue, which visitors without the token may have filled.
    how: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
    outputs = [*form.slots, *form.views]
    form.add.click(events.add, form.inputs, [*outputs, form.files], **how)
    buttons = (form.stop, events.stop), (form.resume, events.resume), (form.remove, events.remove)
    for button, function in buttons:
        button.click(function, [form.chosen], outputs, **how)
    polled = [form.chosen, form.known, form.shown], [*form.views, *form.slots, form.shown]
    form.chosen.input(events.poll, *polled, **how)
    gr.Timer(POLL_SECONDS).tick(events.poll, *polled, **how)
    for event in (page.load, tab.select):  # the tab too, which is not built until it is opened
        opened = event(events.open_page, None, [form.refusal, form.column], **how)
        opened.then(events.poll, *polled, **how)


def start_choices(playground: Playground) -> list[str]:
    """Return what a training can start from: RANDOM, the models of the page and the releases."""
    return [RANDOM, *playground.models, *_releases(playground)]


def _releases(playground: Playground) -> dict[str, Path]:
    """Return the folders of the released models that the page has not loaded, by name."""
    models = playground.models.values()
    loaded = {m.checkpoint.resolve().parent for m in models if m.checkpoint is not None}
    folders = {}
    for name in SIZES:
        with contextlib.suppress(UserError):  # installed without the releases
            if (folder := bundled_release(name).resolve()) not in loaded:
                folders[f"releases/{name}"] = folder
    return folders


def _form(playground: Playground) -> _Form:
    """Add the components to the tab, and return them."""
    gr.Markdown(INTRODUCTION)
    refusal = gr.HTML(note_html(REFUSAL, "error"), elem_id="no-token")
    errors = {}
    with gr.Column(visible=False, elem_id="training-form") as column:
        text = gr.Textbox(label="Text of the stories", lines=6, max_lines=12)
        errors["text"] = gr.HTML(elem_id="error-text")
        files = gr.File(label=FILES, file_count="multiple", type="filepath", height=140)
        errors["files"] = gr.HTML(elem_id="error-files", js_on_load=_upload_script())
        with gr.Row():
            sizes = [(f"{name}: {size}", name) for name, size in SIZES.items()]
            size = gr.Dropdown(sizes, value="small", label="Size")
            start = gr.Dropdown(start_choices(playground), value=RANDOM, label=START_FROM)
            minutes = gr.Number(5, label="Minutes")
        start.change(  # a training run from a model has the size of that model
            lambda name: gr.Dropdown(visible=name == RANDOM), start, size, show_progress="hidden",
            api_visibility="private",
        )  # fmt: skip
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
    return _Form(
        refusal, column, [text, files, size, start, minutes], files, add, chosen, gr.State({}),
        stop, resume, remove, view, [errors[name] for name in FIELDS], gr.State({}),
    )  # fmt: skip


def _upload_script() -> str:
    """Return the script that refuses files above MAX_UPLOAD before they are uploaded."""
    refusal = json.dumps(note_html(too_large("{}"), "error"))
    return f"const LIMIT = {MAX_UPLOAD}, REFUSAL = {refusal};\n{static_text('upload.js')}"


class _Events:
    """Event handlers of the tab Train.

    All public methods except `allowed` return updates of the components of the tab.
    """

    def __init__(self, playground: Playground, training: Training) -> None:
        self.playground, self.training = playground, training
        self.uploads = Path(get_upload_folder()).resolve()
        self.views: dict[str, tuple[Any, float, str]] = {}  # state, when to renew, HTML, by job

    def allowed(self, request: gr.Request) -> bool:
        """Return whether the request has the cookie with the access token."""
        access = self.training.access
        return access.allows(request.cookies.get(access.cookie))

    def add(
        self, text: str, files: list[str] | None, size: str, start: str, minutes: float,
        request: gr.Request,
    ) -> list[Any]:  # fmt: skip
        """Add a job; if this succeeds, remove the files from the upload field."""

        def add_job() -> Job:
            paths = [Path(name) for name in dict.fromkeys(files or [])]  # a file may be added twice
            if not all(path.resolve().is_relative_to(self.uploads) for path in paths):
                raise UserError("Only uploaded files can be used.", "files")
            return self.training.queue.add(text, paths, size, minutes, self._start_from(start))

        answer = self._act(add_job, None, request)
        started = all(not error for error in answer[: len(FIELDS)])
        return [*answer, None if started else gr.skip()]  # the uploads were moved

    def stop(self, name: str, request: gr.Request) -> list[Any]:
        """Stop a job."""
        return self._act(lambda: self.training.queue.stop(name), name, request)

    def resume(self, name: str, request: gr.Request) -> list[Any]:
        """Continue a job."""
        return self._act(lambda: self.training.queue.resume(name), name, request)

    def remove(self, name: str, request: gr.Request) -> list[Any]:
        """Remove a job from the list."""
        return self._act(lambda: self.training.queue.remove(name), name, request)

    def poll(
        self, name: str | None, known: dict[str, Any], shown: dict[str, str], request: gr.Request
    ) -> list[Any]:
        """Return updates of the list of jobs, the buttons, the view of a job and the errors.

        Args:
            name: name of the job that is selected on the page.
            known: what the page already shows, as returned in `_views`; {} for nothing.
            shown: the error that the page already shows, as a dict from the field to the message;
                {} if it shows none.
            request: request of the visitor.
        """
        if not self.allowed(request):
            return [gr.skip()] * (N_VIEWS + len(FIELDS) + 1)
        views = [gr.skip()] * N_VIEWS
        try:
            job, failure = _selected(self.training, name), self.training.queue.problem
            problem = {} if job is None or job.error is None else _field_error(job)
            if failure is not None and job is not None and job.state == "waiting":
                problem = {"start": failure}
            views = self._views(name, known, name)
        except UserError as error:
            problem = {_field(error): error.message}
        fields = [gr.skip()] * len(FIELDS)
        if problem != shown:
            fields = _errors(*next(iter(problem.items()), ()))
        return [*views, *fields, problem]

    def open_page(self, request: gr.Request) -> list[Any]:
        """Show the form, or a refusal if the visitor may not train."""
        may = self.allowed(request)
        return [gr.HTML(visible=not may), gr.Column(visible=may)]

    def _act(
        self, action: Callable[[], Job | None], name: str | None, request: gr.Request
    ) -> list[Any]:
        """Call `action` if the visitor may train, and return updates of the components of the tab.

        The updates are for the errors, the list of jobs, the buttons and the view of a job.

        Args:
            action: function to call without arguments. It returns the job that it added, or None.
            name: name of the job to show if no job was added.
            request: request of the visitor.
        """
        views = [gr.skip()] * N_VIEWS
        if not self.allowed(request):
            return [*_errors("start", REFUSAL), *views]
        try:
            job = action()
            name = name if job is None else job.name
            return [*_errors(), *self._views(name, {}, None)]
        except UserError as error:
            return [*_errors(_field(error), error.message), *views]

    def _views(self, name: str | None, known: dict[str, Any], current: str | None) -> list[Any]:
        """Return updates for the components that show the jobs, in the order of `_Form.views`.

        Args:
            name: name of the job to show. If there is no such job, the running job is shown, or
                else the newest one.
            known: what the page already shows: the second element of an earlier result; {} for
                nothing.
            current: name of the job that is now selected on the page.
        """
        jobs, job = self.training.queue.jobs(), _selected(self.training, name)
        choices = [[_label(each), each.name] for each in jobs]
        value = None if job is None else job.name
        listed = gr.skip()
        if choices != known.get("choices") or value != current:
            # An update without a value keeps what the visitor selects in the meantime.
            chosen: dict[str, Any] = {} if value == current else {"value": value}
            pairs = [(label, key) for label, key in choices]
            listed = gr.Dropdown(pairs, visible=bool(choices), **chosen)
        state = None if job is None else job.state
        buttons = [
            state in ("waiting", "running"),
            job is not None and job.can_continue,
            state not in (None, "running"),
        ]
        n_waiting = sum(each.state == "waiting" for each in jobs)
        view = "" if job is None else self._html(job, n_waiting)
        shows = {"choices": choices, "buttons": buttons, "view": hash(view)}
        same = {key: known.get(key) == value for key, value in shows.items()}
        updates = [gr.skip() if same["buttons"] else gr.Button(visible=b) for b in buttons]
        return [listed, shows, *updates, gr.skip() if same["view"] else view]

    def _html(self, job: Job, n_waiting: int) -> str:
        """Return the HTML of a job.

        Until the state of the job changes, the HTML is renewed at intervals that grow with the time
        that this takes: for all pages together, at most VIEW_SHARE of one core.
        """
        state = job.state, job.settings.get("state"), job.status.get("phase"), job.error, n_waiting
        known, renew, view = self.views.get(job.name, (None, 0.0, ""))
        if state != known or time.monotonic() >= renew:
            began = time.perf_counter()
            view = job_html(job, n_waiting)
            seconds = time.perf_counter() - began
            self.views[job.name] = state, time.monotonic() + seconds / VIEW_SHARE, view
        return view

    def _start_from(self, name: str) -> dict[str, str] | None:
        """Return the `path` of the checkpoint and the `name` of the model to start from.

        The result is None for random weights.

        Args:
            name: the choice in the menu, one of `start_choices`.

        Raises:
            UserError: the server has no such model.
        """
        if name == RANDOM:
            return None
        model = self.playground.models.get(name)
        path = _releases(self.playground).get(name) if model is None else model.checkpoint
        if path is None:
            raise UserError(f"There is no model {name}. Reload the page.", "start")
        return {"path": str(path.absolute()), "name": name}


def _field(error: UserError) -> str:
    """Return the field at which to show an error: `error.argument` if in FIELDS, else "start"."""
    return error.argument if error.argument in FIELDS else "start"


def _errors(field: str | None = None, message: str = "") -> list[str]:
    """Return the HTML of all error slots: `message` for `field`, "" for the other fields."""
    return [note_html(one_line(message), "error") if name == field else "" for name in FIELDS]


def _field_error(job: Job) -> dict[str, str]:
    field = job.status.get("field") or "job"  # "job": its process was killed
    return {field: job.error or ""}


def _selected(training: Training, name: str | None) -> Job | None:
    """Return the job `name`, else the running job, else the newest; None if there are no jobs."""
    jobs = training.queue.jobs()
    running = [job for job in jobs if job.state == "running"]
    chosen = [job for job in jobs if job.name == name]
    return next(iter([*chosen, *running, *jobs]), None)


def _label(job: Job) -> str:
    settings = job.settings
    start = settings["init_from"]
    size = settings["size"] if start is None else start["name"]
    begun = time.strftime("%H:%M", time.localtime(settings["queued"]))
    return f"{size}, {settings['minutes']:g} min, {begun}: {job.state}"
