import hashlib
import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub.utils import close_session

from minigpt.core.settings import UserError
from minigpt.data import download
from minigpt.data.sources import END_OF_TEXT, Corpus, download_tinystories
from tests.conftest import naming

TRAIN, VALID = "TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"
WAYS_ON = ("data=tinystories_sample", "data=text")
STORIES = [f"{n} birds — {'sang in the old tree ' * (20 + n % 30)}end" for n in range(600)]


class Hub:
    """The hub and its file store as two loopback servers, which can be told to fail."""

    def __init__(self) -> None:
        text = "".join(f"{story}\n{END_OF_TEXT}\n" for story in STORIES)
        self.files = {TRAIN: text.encode(), VALID: text[: len(text) // 50].encode()}
        self.drops: Counter[str] = Counter()  # answers to break off in the middle, by file
        self.ignores_ranges = False  # answer with the file from its start, whatever was asked for
        self.refuse = False  # hang up on every request for bytes
        self.ranges: list[tuple[str, int, int]] = []  # what was asked for: file, start, end
        self.n_requests = 0
        self.etags: dict[str, str] = {}  # what to say instead of the sha256
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.n_requests += 1
                content = hub.files[self.path.rsplit("/", 1)[-1]]
                etag = hub.etags.get(self.path.rsplit("/", 1)[-1], sha256(content))
                self.redirect({"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))})

            def do_GET(self) -> None:
                hub.n_requests += 1
                if self.server is hub.servers[0]:
                    return self.redirect({})
                name = self.path.rsplit("/", 1)[-1]
                start, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
                hub.ranges.append((name, start, end))
                start, end = (0, -1) if hub.ignores_ranges else (start, end)
                body = hub.files[name][start : end + 1 or None]
                self.close_connection = True
                if hub.refuse:
                    return None
                self.send_response(200 if hub.ignores_ranges else 206)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if hub.drops[name] > 0:
                    hub.drops[name] -= 1
                    body = body[: len(body) // 2]
                self.wfile.write(body)

            def redirect(self, headers: dict[str, str]) -> None:
                assert self.path.startswith("/datasets/roneneldan/TinyStories/resolve/")
                self.send_response(302)
                name = self.path.rsplit("/", 1)[-1]
                self.send_header("Location", f"{hub.address(1)}/store/{name}")
                self.send_header("X-Repo-Commit", "c0ffee")
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


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    for thread in hub.threads:
        thread.start()
    monkeypatch.setenv("HF_ENDPOINT", hub.address())
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(download, "_RETRY_WAITS", (0.0, 0.0))
    yield hub
    close_session()
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


def test_connections_that_break_on_the_way_are_taken_up_again(hub, tmp_path):
    hub.drops[TRAIN] = 5  # more often than a request that brings nothing is repeated
    assert content(download_tinystories(tmp_path, None)) == hub.files[TRAIN]
    starts = [start for name, start, _ in hub.ranges if name == TRAIN]
    size = len(hub.files[TRAIN])
    assert starts[:3] == [0, size // 2, size // 2 + (size - size // 2) // 2]
    assert len(starts) == 6


def test_a_download_that_dies_is_explained_and_the_next_call_resumes_it(hub, tmp_path, monkeypatch):
    half = len(hub.files[TRAIN]) // 2
    stream = download._stream

    def die_after_the_first_half(url, part, target, show):
        hub.refuse = part.stat().st_size > 0 and part.name.startswith(TRAIN)
        stream(url, part, target, show)

    hub.drops[TRAIN] = 1
    monkeypatch.setattr(download, "_stream", die_after_the_first_half)
    with pytest.raises(UserError, match=naming(*WAYS_ON)) as error:
        download_tinystories(tmp_path, None)
    assert "\n" not in str(error.value)
    assert not (tmp_path / TRAIN).exists()
    assert [start for name, start, _ in hub.ranges if name == TRAIN] == [0, half, half, half]

    hub.refuse = False
    monkeypatch.setattr(download, "_stream", stream)
    hub.ranges.clear()
    assert content(download_tinystories(tmp_path, None)) == hub.files[TRAIN]
    assert hub.ranges == [(TRAIN, half, 2 * half + len(hub.files[TRAIN]) % 2 - 1)]


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
    ("damage", "name"),
    [
        (lambda hub: hub.etags.update({TRAIN: "0" * 64}), "sha256"),
        (lambda hub: hub.files.update({TRAIN: b"caf\xe9" + END_OF_TEXT.encode()}), "UTF-8"),
        (lambda hub: hub.files.update({TRAIN: b"<html>log in</html>"}), END_OF_TEXT),
    ],
)
def test_what_is_damaged_never_gets_the_final_name(hub, tmp_path, damage, name):
    damage(hub)
    with pytest.raises(UserError, match=naming(name)):
        download_tinystories(tmp_path, None)
    assert not (tmp_path / TRAIN).exists()
    assert not list(tmp_path.glob(f"{TRAIN}*.part"))  # else a next call would go on from there


def test_a_server_that_ignores_ranges_starts_the_file_over(hub, tmp_path):
    small = download_tinystories(tmp_path, 20_000)
    hub.ignores_ranges = True
    larger = download_tinystories(tmp_path, 50_000)
    assert content(larger).startswith(content(small))
    assert hub.files[TRAIN].startswith(content(larger))


def test_two_processes_at_once_download_once(hub, tmp_path):
    with ThreadPoolExecutor() as pool:  # the lock is on the file, so threads show it as well
        calls = [pool.submit(download_tinystories, tmp_path, None) for _ in range(4)]
        assert {content(call.result()) for call in calls} == {hub.files[TRAIN]}
    assert sorted(name for name, _, _ in hub.ranges) == [TRAIN, VALID]


def test_without_a_network_one_line_names_the_ways_on(hub, tmp_path, monkeypatch):
    close = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    close.server_close()
    nobody = f"http://127.0.0.1:{close.server_port}"
    with pytest.raises(UserError, match=naming(nobody, "ConnectError", *WAYS_ON)):
        download_tinystories(tmp_path, 1000, endpoint=nobody)
    hub.files.clear()  # the hub breaks down over each request
    monkeypatch.setattr(hub.servers[0], "handle_error", lambda *_: None)
    with pytest.raises(UserError, match=naming(*WAYS_ON)):
        download_tinystories(tmp_path, 1000)


def test_a_wrong_budget_and_a_folder_that_is_a_file_are_refused(tmp_path):
    with pytest.raises(UserError, match=naming("data.download_tokens", "0")):
        download_tinystories(tmp_path, 0)
    file = Path(tmp_path / "file")
    file.touch()
    with pytest.raises(UserError, match=naming(str(file))):
        download_tinystories(file, 1000)
