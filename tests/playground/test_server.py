import atexit
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from minigpt.core.settings import UserError
from minigpt.playground import server
from minigpt.playground.answers import Playground
from minigpt.playground.server import read_login, serve, start, store_uploads_privately
from minigpt.runs.folder import Run
from tests.cli.test_app import run_main
from tests.conftest import ROOT, naming


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def test_taken_port_is_an_error_of_port(taken_port):
    with pytest.raises(UserError, match=naming("127.0.0.1", "in use")) as error:
        start(Playground([]), "127.0.0.1", taken_port)
    assert (error.value.argument, error.value.value) == ("port", taken_port)


@pytest.mark.parametrize("port", [None, 1])
@pytest.mark.parametrize("host", ["a..b", "192.0.2.1", "nowhere.invalid"])
def test_unknown_host_is_looked_up_once(monkeypatch, host, port):
    lookups, look_up = [], socket.getaddrinfo

    def counted(host: str, *args: int, **kwargs: int) -> object:
        lookups.append(host)
        if host == "nowhere.invalid":
            raise socket.gaierror(-2, "unknown")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", counted)
    with pytest.raises(UserError, match="cannot") as error:
        start(Playground([]), host, port)
    assert (error.value.argument, error.value.value) == ("host", host)
    assert lookups == [host]


# In a process of its own, because Gradio leaves event loops open. The proxy must not be used.
FREE_PORTS = """
import os
from pathlib import Path

import httpx
from gradio import http_server
from minigpt.playground.answers import Playground
from minigpt.playground.access import Access
from minigpt.playground.server import Training, start
from minigpt.playground.training import TrainingQueue
from minigpt.tokenizer import Tokenizer
from tests.playground.test_answers import model

http_server.INITIAL_PORT_VALUE = {port}
tokenizer = Tokenizer.train(["the dog ran"] * 5, 300)
playground = Playground([model("a", tokenizer), model("b", tokenizer, n_heads=1)])
from minigpt.playground.page import _attention_sliders
for name, n_heads in (("a", 2), ("b", 1)):  # sliders follow the chosen model
    layer, head = _attention_sliders(playground, name, 9, 9)
    assert (layer.maximum, layer.value, head.maximum, head.value) == (2, 2, 2, n_heads)
    assert (layer.visible, head.visible) == (True, n_heads > 1)
training = Training(TrainingQueue(Path("jobs"), Path("runs")), Access())
token = {{"token": training.access.token}}
for host in {hosts}:
    page = start(playground, host, None, root_path="/stories", training=training)
    with httpx.Client(base_url=page.local_url, trust_env=False) as client:
        answers = [
            client.get("/"),
            client.get("/", headers={{"Host": "rebound.example"}}),
            client.get("/", headers={{"Origin": "http://foreign.example"}}),
            client.get("/", params=token, headers={{"Host": "rebound.example"}}),
            client.get("/", params=token),
        ]
        root = client.get("/config").json()["root"]
        files = {{"files": ("story.txt", b"Tom ran.")}}
        (upload,) = client.post("/gradio_api/upload", files=files).json()
    assert ["set-cookie" in answer.headers for answer in answers[-2:]] == [False, True]
    assert not any("access-control-allow-origin" in answer.headers for answer in answers)
    assert Path(upload).is_relative_to(os.environ["GRADIO_TEMP_DIR"])
    assert root.endswith("/stories"), root
    print(page.server_port, *(answer.status_code for answer in answers))
import socket

from gradio import networking
from minigpt.core.settings import UserError

networking.url_ok = lambda url: False  # Gradio's own request of the page has no answer
try:
    start(playground, "127.0.0.1", 0)
except UserError as error:
    port = int(str(error).split("127.0.0.1:")[1].split("/")[0])
with socket.socket() as other:
    assert other.connect_ex(("127.0.0.1", port)) > 0  # the page has ended
"""


@pytest.mark.long
def test_default_port_is_the_next_free_one_and_foreign_hosts_are_refused(taken_port, tmp_path):
    hosts = ["localhost", "[::1]", "0.0.0.0"]
    proxy = {"http_proxy": "http://192.0.2.1:9", "no_proxy": "example.org"}
    process = subprocess.run(
        [sys.executable, "-c", FREE_PORTS.format(port=taken_port, hosts=hosts)],
        cwd=tmp_path,
        env=os.environ | proxy | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not list(tmp_path.glob("minigpt-uploads-*"))
    answers = [line.split() for line in process.stdout.splitlines()]
    ports = [int(port) for port, *_ in answers]
    assert len(ports) == len(hosts)
    assert ports[0] > taken_port
    assert {tuple(statuses) for _, *statuses in answers} == {("200", "403", "403", "403", "303")}


@pytest.mark.parametrize(
    ("variables", "settings", "expected"),
    [
        ({}, {}, True),
        ({}, {"allow_training": False}, False),
        ({}, {"root_path": "/stories"}, False),
        ({"SPACE_ID": "me/space"}, {}, False),
        ({}, {"host": "0.0.0.0"}, False),
        ({}, {"root_path": "/stories", "auth": "me:secret", "allow_training": True}, True),
    ],
)
def test_training_is_off_where_others_reach_the_page(
    variables, settings, expected, monkeypatch, tmp_path
):
    trainings = []

    def start(*arguments: object) -> None:
        trainings.append(arguments[-1])
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server, "start", start)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KeyboardInterrupt):
        serve([], **settings)
    assert [training is not None for training in trainings] == [expected]


def test_page_without_a_folder_for_trainings_is_served(monkeypatch, tmp_path):
    (tmp_path / ".cache").touch()
    trainings = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server, "start", lambda *values: trainings.append(values[-1]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        serve([])
    assert trainings == [None]


def test_uploads_are_stored_in_a_private_folder_that_is_deleted_at_the_end(monkeypatch, tmp_path):
    callbacks = []
    monkeypatch.setattr(atexit, "register", lambda *call, **how: callbacks.append((call, how)))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "named"))
    store_uploads_privately()
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path / "named")
    assert not callbacks
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "gradio").touch()  # Gradio's default, which cannot be used
    store_uploads_privately()
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "story.txt").touch()
    (((function, *arguments), how),) = callbacks
    function(*arguments, **how)
    assert not folder.exists()


@pytest.mark.parametrize("root_path", ["", "stories", "ftp://a/b"])
def test_root_path_that_is_no_path_or_url_is_an_error(root_path):
    with pytest.raises(UserError, match=naming("https://example.org/stories")) as error:
        serve([], root_path=root_path)
    assert error.value.argument == "root_path"


@pytest.mark.parametrize("auth", ["user", "user:", ":password", ""])
def test_auth_without_name_or_password_is_an_error(auth):
    with pytest.raises(UserError, match=naming("user:password")) as error:
        serve([], auth=auth)
    assert error.value.argument == "auth"


def test_auth_may_hold_a_colon_in_the_password():
    assert read_login("me:a:b") == ("me", "a:b")
    assert read_login(None) is None


def test_missing_gradio_is_an_error_with_the_command(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gradio"):
        serve([])
    monkeypatch.setattr(Run, "load", lambda path: None)
    assert run_main(monkeypatch, "playground", "runs/none") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "pip install gradio" in line
