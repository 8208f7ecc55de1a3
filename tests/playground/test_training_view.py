"""The view of a training: progress, samples, command and errors."""

import json
import re

from minigpt.playground.training_view import job_html
from tests.conftest import naming
from tests.playground.conftest import TEXT, add
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


def test_view_names_the_files_that_the_command_needs(queue, tmp_path):
    files = [tmp_path / folder / "text.txt" for folder in ("a", "b")]
    for path in files:
        path.parent.mkdir()
        path.write_text(TEXT)
    for text in (TEXT, None):
        for path in files:
            path.write_text(TEXT)
        job = add(queue, text, files=files)
        job._request(state="started")
        job.report(phase="finished", command="minigpt train")
        view = job_html(job).partition("<pre")[0]
        assert ("2-text.txt" in view, "3-text.txt" in view) == (True, text is not None)
        numbers = re.findall(r"(\d) \(text\.txt\)", view)
        assert numbers == (["1", "2"] if text is not None else ["2"])
    (tmp_path / "a.txt").write_text(TEXT)
    plain = add(queue, None, files=[tmp_path / "a.txt"])
    plain._request(state="started")
    plain.report(phase="finished", command="minigpt train")
    assert "a.txt" not in job_html(plain)
