"""Requests that a page of another site could send to the playground."""

import asyncio
from typing import Any

import pytest

from minigpt.playground.hosts import Hosts, guarded

LOCAL = {"host": "127.0.0.1:7860"}
URL = "https://example.org/stories"
CASES = [  # address of the server, root path, headers of the request, whether it is answered
    ("127.0.0.1", None, {"host": "127.0.0.1:7860"}, True),
    ("127.0.0.1", None, {"host": "LOCALHOST:7860"}, True),
    ("127.0.0.1", None, {"host": "[::1]:7860"}, True),
    ("127.0.0.1", None, {"host": "rebound.example:7860"}, False),
    ("127.0.0.1", None, {"host": "127.0.0.1.rebound.example"}, False),
    ("127.0.0.1", None, {"host": "localhost.rebound.example"}, False),
    ("127.0.0.1", None, {"host": "192.168.1.5:7860"}, False),
    ("127.0.0.1", None, {"host": "[::1"}, False),
    ("127.0.0.1", None, {"host": ""}, False),
    ("127.0.0.1", None, {}, False),
    ("127.0.0.1", None, {**LOCAL, "origin": "http://127.0.0.1:7860"}, True),
    ("127.0.0.1", None, {**LOCAL, "origin": "http://foreign.example"}, False),
    ("127.0.0.1", None, {**LOCAL, "origin": "null"}, False),
    ("box.lan", None, {"host": "box.lan:7860", "origin": "http://box.lan:7860"}, True),
    ("box.lan", None, {"host": "box.lan", "origin": "http://foreign.example"}, False),
    ("0.0.0.0", None, {"host": "192.168.1.5:7860"}, True),
    ("::", None, {"host": "[fe80::1]:7860"}, True),
    ("0.0.0.0", None, {"host": "rebound.example"}, False),
    ("127.0.0.1", URL, {"host": "example.org", "origin": "https://example.org"}, True),
    ("127.0.0.1", URL, {"host": "other.org"}, False),
    ("127.0.0.1", "/stories", {**LOCAL, "origin": "https://example.org"}, False),
    ("127.0.0.1", "/stories",
     {**LOCAL, "origin": "https://example.org", "x-forwarded-host": "example.org"}, True),
    ("127.0.0.1", None, {"host": "rebound.example", "x-forwarded-host": "127.0.0.1"}, False),
]  # fmt: skip


@pytest.mark.parametrize(("address", "root_path", "headers", "answered"), CASES)
def test_requests_with_a_foreign_host_or_origin_get_403(address, root_path, headers, answered):
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def call() -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        pairs = [(name.title().encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "headers": pairs}
        await guarded(app, Hosts(address, root_path))(scope, None, send)
        return sent

    start, *_ = asyncio.run(call())
    assert start["status"] == (200 if answered else 403)


def test_host_names_of_a_space_are_allowed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPACE_HOST", "me-tales.hf.space,tales.example.org")
    hosts = Hosts("0.0.0.0")
    assert hosts.allow("me-tales.hf.space")
    assert hosts.allow("tales.example.org")
    assert not hosts.allow("other.hf.space")
