import hashlib
import json
import math
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfFileSystem, constants
from huggingface_hub.utils import close_session

from minigpt.core.settings import UserError
from minigpt.data import download
from minigpt.data.corpus import Corpus
from minigpt.data.sources import download_tinystories
from minigpt.tokenizer import END_OF_TEXT
from tests.conftest import naming

TRAIN, VALID = "TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"
COMMIT = "c0ffee" + "0" * 34
WAYS_ON = ("data.source", "tinystories_sample", "text")
STORIES = [f"{n} birds — {'sang in the old tree ' * (20 + n % 30)}end" for n in range(600)]


class Hub:
    """The hub and its file store as two loopback servers, which can be told to fail."""

    def __init__(self) -> None:
        text = "".join(f"{story}\n{END_OF_TEXT}\n" for story in STORIES)
        held_out = "".join(f"{story} of it\n{END_OF_TEXT}\n" for story in STORIES[:12])
        self.files = {TRAIN: text.encode(), VALID: held_out.encode()}
        self.drops: Counter[str] = Counter()  # answers to break off in the middle, by file
        self.ignores_ranges = False  # answer with the file from its start, whatever was asked for
        self.refuse_from: float = math.inf  # hang up on requests for bytes from this offset on
        self.ranges: list[tuple[str, int, int]] = []  # requests: file, start, end
        self.n_requests = 0
        self.etags: dict[str, str] = {}  # what to say instead of the sha256
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.n_requests += 1
                name = self.path.rsplit("/", 1)[-1]
                size = str(len(hub.files[name]))
                self.redirect({"X-Linked-Etag": f'"{hub.etag(name)}"', "X-Linked-Size": size})

            def do_GET(self) -> None:
                hub.n_requests += 1
                assert "torch" not in self.headers["User-Agent"]  # telemetry of the library
                if self.path.startswith(f"/api/datasets/roneneldan/TinyStories/revision/{COMMIT}"):
                    return self.answer({"id": "roneneldan/TinyStories", "sha": COMMIT})
                if self.path.startswith(f"/api/datasets/roneneldan/TinyStories/tree/{COMMIT}"):
                    return self.answer(hub.tree())
                if self.server is hub.servers[0]:
                    return self.redirect({})
                name = self.path.rsplit("/", 1)[-1]
                size = len(hub.files[name])
                span = self.headers["Range"] or "bytes=0-"
                start, end = (int(n or size - 1) for n in span.removeprefix("bytes=").split("-"))
                hub.ranges.append((name, start, end))
                self.close_connection = True
                if start >= hub.refuse_from:
                    return None
                whole = hub.ignores_ranges or "Range" not in self.headers
                body = hub.files[name] if whole else hub.files[name][start : end + 1]
                self.send_response(200 if whole else 206)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if hub.drops[name] > 0:
                    hub.drops[name] -= 1
                    body = body[: len(body) // 2]
                self.wfile.write(body)

            def answer(self, content: object) -> None:
                body = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def redirect(self, headers: dict[str, str]) -> None:
                assert self.path.startswith("/datasets/roneneldan/TinyStories/resolve/")
                self.send_response(302)
                name = self.path.rsplit("/", 1)[-1]
                self.send_header("Location", f"{hub.address(1)}/store/{name}")
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", "0")
                for key, value in headers.items():
                    self.send_header(key, value)
                self.end_headers()

            def log_message(self, format: str, *args) -> None:
                pass

        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        self.threads = [
            threading.Thread(target=server.serve_forever, args=(0.02,)) for server in self.servers
        ]

    def address(self, server: int = 0) -> str:
        return f"http://127.0.0.1:{self.servers[server].server_port}"

    def etag(self, name: str) -> str:
        return self.etags.get(name, sha256(self.files[name]))

    def tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
            for name, content in self.files.items()
        ]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    for thread in hub.threads:
        thread.start()
    monkeypatch.setenv("HF_ENDPOINT", hub.address())
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what the library resumes by
    yield hub
    close_session()
    HfFileSystem.clear_instance_cache()
    for server, thread in zip(hub.servers, hub.threads, strict=True):
        server.shutdown()
        server.server_close()
        thread.join()


def content(corpus: Corpus) -> bytes:
    return corpus.train_files[0].read_bytes()


def test_the_whole_file_arrives_and_a_second_call_needs_no_network(hub, tmp_path):
    first = download_tinystories(tmp_path, None)
    assert content(first) == hub.files[TRAIN]
    assert first.valid_files[0].read_bytes() == hub.files[VALID]
    assert list(first.stories("train")) == STORIES
    hub.n_requests = 0
    assert download_tinystories(tmp_path, None) == first
    assert download_tinystories(tmp_path, 1000).train_files == first.train_files
    assert hub.n_requests == 0
    assert not list(tmp_path.glob("*.part"))


def test_the_validation_stories_alone_need_no_training_file(hub, tmp_path):
    corpus = download_tinystories(tmp_path, None, valid_only=True)
    assert list(corpus.stories("valid"))
    assert {name for name, *_ in hub.ranges} == {VALID}


def test_a_budget_fetches_only_its_bytes_and_a_larger_one_goes_on_from_there(hub, tmp_path):
    small = download_tinystories(tmp_path, 20_000)
    taken = math.ceil(20_000 * 3.84 * 1.05)
    assert hub.ranges[-1] == (TRAIN, 0, taken - 1)
    assert taken - 1200 < len(content(small)) <= taken
    assert content(small).endswith(END_OF_TEXT.encode())
    stories = list(small.stories("train"))
    assert stories == STORIES[: len(stories)]
    assert 20_000 * 3.84 <= len("".join(stories).encode()) <= 20_000 * 3.84 * 1.02 + 1

    larger = download_tinystories(tmp_path, 50_000)
    assert hub.ranges[-1][:2] == (TRAIN, len(content(small)))
    assert hub.files[TRAIN].startswith(content(larger))

    hub.n_requests = 0
    assert download_tinystories(tmp_path, 20_000) == small
    again = download_tinystories(tmp_path, 15_000)  # less than is there: the same stories as ever
    assert len("".join(again.stories("train")).encode()) <= 15_000 * 3.84 * 1.02 + 1
    assert hub.n_requests == 0
    assert content(download_tinystories(tmp_path, 10**6)) == hub.files[TRAIN]


def test_a_download_resumes_where_a_connection_broke(hub, tmp_path):
    hub.drops[TRAIN] = 3
    assert content(download_tinystories(tmp_path / "whole", None)) == hub.files[TRAIN]
    starts = [start for name, start, _ in hub.ranges if name == TRAIN]
    size = len(hub.files[TRAIN])
    assert len(starts) == 4
    assert starts[0] == 0
    assert 0.4 * size < starts[1] < starts[2] < starts[3]


def test_an_interrupted_first_part_is_resumed_by_the_next_call(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_BLOCK", 10_000)
    wanted = math.ceil(20_000 * 3.84 * 1.05)
    hub.refuse_from = 30_000
    with pytest.raises(UserError, match=naming(hub.address(), *WAYS_ON)) as error:
        download_tinystories(tmp_path, 20_000)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*first*"))
    starts = [start for name, start, _ in hub.ranges if name == TRAIN]
    assert starts[:4] == [0, 10_000, 20_000, 30_000]
    assert set(starts[4:]) == {30_000}  # the tries of the library

    hub.refuse_from = math.inf
    hub.ranges.clear()
    interrupted = content(download_tinystories(tmp_path, 20_000))
    assert [start for _, start, _ in hub.ranges] == list(range(30_000, wanted, 10_000))
    assert {end for _, _, end in hub.ranges} == {*range(39_999, wanted - 1, 10_000), wanted - 1}
    assert interrupted == content(download_tinystories(tmp_path / "again", 20_000))


def test_an_interrupted_whole_file_leaves_nothing(hub, tmp_path):
    hub.refuse_from = 1
    hub.drops[TRAIN] = 1
    with pytest.raises(UserError, match=naming(hub.address(), *WAYS_ON)) as error:
        download_tinystories(tmp_path, None)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.glob(f"{TRAIN}*")) == [f"{TRAIN}.lock"]
    hub.refuse_from = math.inf
    assert content(download_tinystories(tmp_path, None)) == hub.files[TRAIN]


def test_a_file_that_changed_on_the_hub_is_not_resumed(hub, tmp_path):
    hub.drops[TRAIN] = 1
    first = download_tinystories(tmp_path, 20_000)
    (tmp_path / f"{TRAIN}.0123456789ab.part").write_bytes(b"an older version")
    hub.files[TRAIN] = hub.files[TRAIN].replace(b"birds", b"foxes")
    second = download_tinystories(tmp_path, 40_000)
    assert hub.ranges[-1][:2] == (TRAIN, 0)
    assert content(first)[:9] == b"0 birds \xe2"
    assert content(second)[:9] == b"0 foxes \xe2"
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("tokens", "damage", "name"),
    [
        (None, lambda hub: hub.etags.update({TRAIN: "0" * 64}), "SHA-256"),
        (None, lambda hub: hub.files.update({TRAIN: b"caf\xe9" + END_OF_TEXT.encode()}), "UTF-8"),
        (None, lambda hub: hub.files.update({TRAIN: b"<html>log in</html>"}), END_OF_TEXT),
        (9, lambda hub: hub.files.update({TRAIN: b"\xe9" + END_OF_TEXT.encode() * 9}), "UTF-8"),
        (9, lambda hub: hub.files.update({TRAIN: b"<html>log in</html>" * 9}), END_OF_TEXT),
    ],
)
def test_damaged_files_never_get_the_final_name(hub, tmp_path, tokens, damage, name):
    damage(hub)
    with pytest.raises(UserError, match=naming(name)):
        download_tinystories(tmp_path, tokens)
    stem = TRAIN.removesuffix(".txt")  # a .part would be continued by the next call
    assert sorted(path.name for path in tmp_path.glob(f"{stem}*")) == [f"{TRAIN}.lock"]


def test_a_server_that_ignores_ranges_is_refused(hub, tmp_path):
    hub.ignores_ranges = True
    with pytest.raises(UserError, match=naming(hub.address(), *WAYS_ON)):
        download_tinystories(tmp_path, 20_000)
    hub.ignores_ranges = False
    assert hub.files[TRAIN].startswith(content(download_tinystories(tmp_path, 20_000)))


def test_two_processes_at_once_download_once(hub, tmp_path):
    with ThreadPoolExecutor() as pool:  # the lock is on the file, so threads show it as well
        calls = [pool.submit(download_tinystories, tmp_path, None) for _ in range(4)]
        assert {content(call.result()) for call in calls} == {hub.files[TRAIN]}
    assert sorted(name for name, _, _ in hub.ranges) == [TRAIN, VALID]


def test_without_a_network_one_line_names_the_ways_on(hub, tmp_path, monkeypatch):
    close = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    close.server_close()
    nobody = f"http://127.0.0.1:{close.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", nobody)
    with pytest.raises(UserError, match=naming(nobody, "ConnectError", *WAYS_ON)):
        download_tinystories(tmp_path, 1000)
    monkeypatch.setenv("HF_ENDPOINT", hub.address())
    hub.files.clear()  # the hub breaks down over each request
    monkeypatch.setattr(hub.servers[0], "handle_error", lambda *_: None)
    with pytest.raises(UserError, match=naming(*WAYS_ON)):
        download_tinystories(tmp_path, 1000)


def test_a_download_folder_that_is_a_file_is_refused(tmp_path):
    file = Path(tmp_path / "file")
    file.touch()
    with pytest.raises(UserError, match=naming("data.cache_dir", str(file))):
        download_tinystories(file, 1000)
