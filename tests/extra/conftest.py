"""Start the playground by its command, as a process on a free port."""

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest

from minigpt.data.sources import bundled_sample
from tests.conftest import trained_folder

# Python runs this at its start: it records each connection to another machine in a file beside it.
# A training has the same PYTHONPATH as the server, but no other variable of these tests.
WATCH = """
import os, socket
OUTBOUND = os.path.join(os.path.dirname(os.path.abspath(__file__)), "outbound.txt")
def watched(name, where):
    real = getattr(where, name)
    def call(*args):
        address = args[1] if name.startswith("connect") else args[0]
        host = address[0] if isinstance(address, tuple) else address
        if host not in (None, "127.0.0.1", "localhost", "::1", b"127.0.0.1"):
            with open(OUTBOUND, "a") as file:
                file.write(f"{name} {address}\\n")
        return real(*args)
    return call
class Socket(socket.socket):
    connect = watched("connect", socket.socket)
    connect_ex = watched("connect_ex", socket.socket)
socket.socket = Socket
resolve = socket.getaddrinfo
def getaddrinfo(host, *args, **kwargs):
    if host not in (None, "127.0.0.1", "localhost", "::1", b"127.0.0.1"):
        with open(OUTBOUND, "a") as file:
            file.write(f"getaddrinfo {host}\\n")
    return resolve(host, *args, **kwargs)
socket.getaddrinfo = getaddrinfo
"""


@dataclass(frozen=True)
class Served:
    """A running playground."""

    url: str
    token_url: str  # with the token to train
    outbound: Path  # has a line for each attempt of the server to reach another machine

    def reached_out(self) -> str:
        return self.outbound.read_text() if self.outbound.exists() else ""


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model trained on a few real stories, whose tokenizer has whole words."""
    folder = tmp_path_factory.mktemp("trained")
    stories = list(islice(bundled_sample().stories("train"), 1500))
    for name, part in (("train", stories[100:]), ("valid", stories[:100])):
        text = "\n<|endoftext|>\n".join(part)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return trained_folder(
        [
            "data=text",
            f"data.train_files=[{folder / 'train.txt'}]",
            f"data.valid_files=[{folder / 'valid.txt'}]",
            f"data.cache_dir={folder / 'cache'}",
            "data.vocab_size=1500",
            "data.batch_size=4",
            f"runs_dir={folder}",
            "name=tiny",
            "model=small",
            "model.context_length=128",
            "model.n_layers=2",
            "budget.tokens=80000",
            "optimizer.warmup_steps=15",
            "trainer.accelerator=cpu",
            "trainer.n_validations=1",
            "callbacks.progress_bar=false",
            "callbacks.snapshots=4",
        ]
    )


@pytest.fixture(scope="session")
def served(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with playground([str(tiny_run)], tmp_path_factory.mktemp("served")) as served:
        yield served


@pytest.fixture(scope="session")
def guarded(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two checkpoints side by side, behind a login."""
    both = [str(tiny_run), str(tiny_run / "checkpoints/last.ckpt"), "--auth", "student:secret"]
    with playground(both, tmp_path_factory.mktemp("guarded")) as served:
        yield served


@contextlib.contextmanager
def playground(arguments: list[str], folder: Path, before: Sequence[str] = ()) -> Iterator[Served]:
    """`minigpt playground <arguments>`, watched from the scratch folder `folder`.

    The words in `before` are put before the command; they may start it as another user.
    """
    command = ["-m", "minigpt.cli.app", "playground", *arguments, "--port", "0"]
    with page_of(command, folder, before) as served:
        yield served


@contextlib.contextmanager
def page_of(
    command: list[str], folder: Path, before: Sequence[str] = (), **variables: str
) -> Iterator[Served]:
    """The page that `python <command>` serves, watched from the scratch folder `folder`."""
    (folder / "sitecustomize.py").write_text(WATCH)
    outbound = folder / "outbound.txt"
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = os.environ | {"PYTHONPATH": paths} | variables
    environment.pop("GRADIO_ANALYTICS_ENABLED", None)  # the page must set it itself
    command = [*before, sys.executable, *command]
    where = {"cwd": folder, "env": environment}  # trainings are in the working directory
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **where)
    assert process.stderr is not None
    lines: queue.Queue[str] = queue.Queue()
    reader = threading.Thread(target=lambda: [lines.put(line) for line in process.stderr or ()])
    reader.start()
    try:
        line = lines.get(timeout=120)
        url = re.search(r"(http://127\.0\.0\.1:\d+)\S*", line)
        assert url, line
        yield Served(url[1], url[0], outbound)
        assert process.poll() is None, "the server ended by itself"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        reader.join(timeout=10)
        output = "".join(lines.get() for _ in range(lines.qsize()))
        assert "minigpt/" not in output, output  # no traceback of ours; Gradio logs bad requests
    finally:
        process.kill()
        process.wait(timeout=30)
        reader.join(timeout=10)
        process.stderr.close()
