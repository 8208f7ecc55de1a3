"""A private dataset on a loopback server that answers as the Hub does, read by `datasets`."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

pytestmark = pytest.mark.long
COMMIT, TOKEN = "c0ffee" + "0" * 34, "hf_secret"
STORIES = [f"Story {n}: the dog ran." for n in range(300)]
FILES = {
    "train.jsonl": "\n".join(json.dumps({"text": story}) for story in STORIES).encode(),
    "validation.jsonl": b'{"text": "Held out."}\n',
}
# Prints the stories of both splits; HF_ENDPOINT must be set before `datasets` is imported.
PROGRAM = """
import json, sys
from minigpt.data.config import DataConfig
from minigpt.data.sources import open_corpus
settings = dict(dataset="owner/name", valid_split="validation", download_tokens=500)
corpus = open_corpus(DataConfig("hf", cache_dir=sys.argv[1], **settings))
print(json.dumps([list(corpus.stories(split)) for split in ("train", "valid")]))
"""


class Hub(BaseHTTPRequestHandler):
    """Repository owner/name, which only requests with the token may read."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, api = unquote(self.path).partition("?")[0], "/api/datasets/owner/name"
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer(b"{}", 401, {"X-Error-Code": "RepoNotFound"})
        elif path in (api, f"{api}/revision/{COMMIT}"):
            self.answer(json.dumps({"id": "owner/name", "sha": COMMIT, "tags": []}).encode())
        elif path == f"{api}/tree/{COMMIT}":
            sizes = {name: {"type": "file", "oid": "0", "size": len(FILES[name])} for name in FILES}
            rows = [{"path": name, **entry} for name, entry in sizes.items()]
            self.answer(json.dumps(rows).encode())
        elif (name := path.removeprefix(f"/datasets/owner/name/resolve/{COMMIT}/")) in FILES:
            span = self.headers["Range"] or "bytes=0-"
            start, end = span.removeprefix("bytes=").split("-")
            body = FILES[name][int(start) : int(end) + 1 if end else None]
            self.answer(body, 206 if self.headers["Range"] else 200, {"X-Repo-Commit": COMMIT})
        else:
            self.answer(b"{}", 404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET  # noqa: N815 (the name is that of http.server)

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("token", [TOKEN, ""])
def test_private_dataset_needs_the_token(address: str, tmp_path: Path, token: str):
    home = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": token}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "cache")],
        env=os.environ | home, capture_output=True, text=True,
    )  # fmt: skip
    if token:
        assert process.returncode == 0, process.stderr
        train, valid = json.loads(process.stdout)
        assert (train, valid) == (STORIES[: len(train)], ["Held out."])
        assert 0 < len(train) < len(STORIES)  # only what the budget needs
    else:
        error = process.stderr.splitlines()[-1]
        assert "UserError" in error
        assert "hf auth login" in error
