"""The view of a training: progress, samples, command and errors."""

import json
import re

from minigpt.playground.training_view import job_html
from tests.conftest import naming
from tests.playground.conftest import add
from tests.run_folder import write_run


def test_view_shows_progress_samples_and_at_the_end_the_command(queue, processes):
    job = add(queue)
    assert "1 in the queue" in job_html(job, 1)
    queue.advance()
    run = write_run(queue.runs_dir / "mine")
    story = {"step": 40, "tokens": 327680, "prompt": "<b>", "temperature": 0.8, "text": "<i>"}
    with (run / "samples.jsonl").open("a") as file:
        file.write(json.dumps(story) + "\n")
    job.report(run=str(run), tokens=655_360, command="minigpt train 'name=<x>'")
    view = job_html(job)
    assert re.search(naming("328k", "655k", "4.000", "66.69", "16 s"), view)
    assert "&lt;b&gt;</span>&lt;i&gt;" in view
    assert "<polyline" in view
    assert "name=" not in view
    processes.end(job, phase="finished")
    assert "minigpt train &#x27;name=&lt;x&gt;&#x27;" in job_html(job)


def test_view_shows_the_error_of_a_job_and_of_its_files(queue, processes):
    job = add(queue)
    queue.advance()
    run = write_run(queue.runs_dir / "mine")
    (run / "samples.jsonl").write_text("broken\n")
    processes.end(job, phase="failed", error="<the text is short>", run=str(run))
    view = job_html(job)
    assert "&lt;the text is short&gt;" in view
    assert re.search(naming("samples.jsonl", "line", "1"), view)
