"""What requests can make the server of the page do, over HTTP and with a process of its own."""

import contextlib
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from minigpt.playground.limits import MAX_BODY, MAX_TRAINING_BODY
from minigpt.playground.training import MAX_UPLOAD
from tests.conftest import ROOT

# Starts a page with and a page without training. Each download writes a line to requested.txt. No
# story ends while the file hold exists.
SERVER = """
import threading
import time
from pathlib import Path

import safehttpx
from gradio import networking
from minigpt.playground import page as page_module
from minigpt.playground.access import Access
from minigpt.playground.answers import Playground
from minigpt.playground.server import Training, start
from minigpt.playground.training import TrainingQueue
from minigpt.tokenizer import Tokenizer
from tests.playground.test_answers import model


async def get(url, *_, **__):
    with open("requested.txt", "a") as file:
        file.write(f"{url}\\n")
    raise OSError("no network")


def write(self, *_):
    while Path("hold").exists():
        time.sleep(0.05)
    yield ("a story",)


Playground.write, page_module.WAITING = write, 3
networking.url_ok = lambda url: True  # it has only three seconds to answer
safehttpx.get = get
tokenizer = Tokenizer.train(["the dog ran"] * 5, 300)
playground = Playground([model("a", tokenizer)])
training = Training(TrainingQueue(Path("jobs"), Path("runs")), Access())
pages = [start(playground, "127.0.0.1", 0, training=each) for each in (training, None)]
access = training.access
print(*(page.local_url for page in pages), access.cookie, access.token, flush=True)
threading.Event().wait()
"""


@dataclass(frozen=True)
class Served:
    """Two running pages, with and without training."""

    urls: dict[str, str]  # of the pages "training" and "plain"
    cookies: dict[str, str]  # with the access token
    folder: Path

    def client(self, page: str, with_token: bool = False) -> httpx.Client:
        cookies = self.cookies if with_token else None
        return httpx.Client(base_url=self.urls[page], cookies=cookies, timeout=300, trust_env=False)

    def jobs(self) -> list[Path]:
        return list((self.folder / "jobs").glob("*/job.json"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=folder, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        training, plain, cookie, token = process.stdout.readline().split()
        yield Served({"training": training, "plain": plain}, {cookie: token}, folder)
        assert process.poll() is None, "the server ended by itself"
    finally:
        process.kill()
        process.wait(timeout=30)
        process.stdout.close()


def events(client: httpx.Client, n_inputs: int) -> list[int]:
    """Return the numbers of the page's events with `n_inputs` inputs."""
    dependencies = client.get("/config").raise_for_status().json()["dependencies"]
    return [event["id"] for event in dependencies if len(event["inputs"]) == n_inputs]


def join(client: httpx.Client, event: int, data: list[Any]) -> httpx.Response:
    body = {"data": data, "fn_index": event, "session_hash": f"session{event}"}
    return client.post("/gradio_api/queue/join", json=body)


def outcome(client: httpx.Client, event: int) -> dict[str, Any]:
    """Return the last message of the event, which `join` started."""
    stream = client.get("/gradio_api/queue/data", params={"session_hash": f"session{event}"})
    lines = [line for line in stream.text.splitlines() if line.startswith("data: ")]
    (last,) = [m for m in map(json.loads, (line[6:] for line in lines))
               if m["msg"] == "process_completed"]  # fmt: skip
    return last


def declared(client: httpx.Client, path: str, n_bytes: int) -> int:
    """Return the status of a request whose body is announced but not sent."""
    connection = http.client.HTTPConnection(client.base_url.netloc.decode(), timeout=300)
    cookies = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    connection.putrequest("POST", path)
    for name, value in {"Content-Length": str(n_bytes), "Cookie": cookies}.items():
        connection.putheader(name, value)
    connection.endheaders()
    with contextlib.closing(connection):
        return connection.getresponse().status


pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]


@pytest.mark.parametrize("page", ["training", "plain"])
def test_url_in_a_request_is_not_downloaded(served, page):
    file = {"path": "https://example.org/a.bin", "meta": {"_type": "gradio.FileData"}}
    with served.client(page) as client:
        for n_inputs in (3, 5) if page == "training" else (3,):
            for event in events(client, n_inputs):
                join(client, event, [file] * n_inputs).raise_for_status()
                assert not outcome(client, event)["success"]
    assert not (served.folder / "requested.txt").exists()


@pytest.mark.parametrize(
    ("page", "with_token", "limit"),
    [
        ("plain", False, MAX_BODY), ("plain", True, MAX_BODY), ("training", False, MAX_BODY),
        ("training", True, MAX_TRAINING_BODY),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/login"])
def test_body_above_the_limit_is_refused(served, page, with_token, limit, path):
    def chunks(n: int) -> Iterator[bytes]:
        for _ in range(n):
            yield b" " * (1 << 18)

    with served.client(page, with_token) as client:
        assert declared(client, path, limit + 1) == 413
        kind = "application/x-www-form-urlencoded" if path == "/login" else "application/json"
        chunked = client.post(path, content=chunks(5), headers={"content-type": kind})
        assert "content-length" not in chunked.request.headers
        assert (chunked.status_code == 413) is (limit < 5 << 18)
        assert client.post(path, content=b" " * 900_000).status_code not in (413, 500)


def test_upload_field_refuses_files_above_the_limit_before_they_are_sent(served):
    with served.client("training") as client:
        components = client.get("/config").raise_for_status().json()["components"]
    parts = {part["props"].get("elem_id"): part["props"] for part in components}
    script = parts["error-files"]["js_on_load"]
    assert f"LIMIT = {MAX_UPLOAD}," in script
    assert "#training-form" in script
    assert "training-form" in parts


def test_start_with_the_token_does_not_wait_for_the_stories_of_others(served):
    hold = served.folder / "hold"
    hold.touch()
    story = {"data": ["the dog", 1.0, 0, 1.0, 0.0, 20, [], 0]}
    with served.client("training") as client:
        answers = (client.post("/gradio_api/call/write", json=story) for _ in range(50))
        assert 503 in (answer.status_code for answer in answers)  # the queue is full
    with served.client("training", with_token=True) as client:
        dependencies = {e["id"]: e for e in client.get("/config").json()["dependencies"]}
        # The start is the event with five inputs that updates the whole tab.
        event = max(events(client, 5), key=lambda i: len(dependencies[i]["outputs"]))
        assert dependencies[event]["queue"] is False  # so the page calls the event directly
        data = ["a story " * 9, None, "w64", "random weights", 1]
        body = {"data": data, "fn_index": event, "session_hash": "owner"}
        assert client.post("/gradio_api/run/predict", json=body).status_code == 200
        assert len(served.jobs()) == 1
    with served.client("training") as client:
        assert client.post("/gradio_api/run/predict", json=body).status_code == 200
    assert len(served.jobs()) == 1
    hold.unlink()
