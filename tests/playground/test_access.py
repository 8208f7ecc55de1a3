"""The token without which nothing can be trained."""

import asyncio
from typing import Any

import pytest

from minigpt.core.settings import UserError
from minigpt.playground.access import Access, may_train, with_token


def answer(
    access: Access | None, path: str = "/", method: str = "GET", query: str = "",
    more: list[tuple[bytes, bytes]] | None = None, **headers: str,
):  # fmt: skip
    """Return the status and the headers of the answer; 200 if the request reaches the page."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    pairs += more or []
    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode()}
    asyncio.run(with_token(app, access)({**scope, "headers": pairs}, None, send))
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}


def test_token_becomes_a_cookie_and_leaves_the_url():
    access = Access()
    status, headers = answer(access, query=f"a=1&token={access.token}")
    assert (status, headers["location"]) == (303, "?a=1")
    cookie, *attributes = headers["set-cookie"].split("; ")
    assert cookie == f"{access.cookie}={access.token}"
    assert {"HttpOnly", "SameSite=Strict"} <= set(attributes)
    for query in ("", "token=", "token=wrong", f"token={access.token[:-1]}", "token=é%ff"):
        status, headers = answer(access, query=query)
        assert status == 200
        assert "set-cookie" not in headers


def test_uploads_need_the_cookie():
    access = Access()
    upload = {"path": "/gradio_api/upload", "method": "POST", "content_type": "Multipart/form-data"}
    assert answer(access, **upload)[0] == 403
    for cookie in (f"{access.cookie}=wrong", f"{access.cookie}2={access.token}", "=;;", "a"):
        assert answer(access, **upload, cookie=cookie)[0] == 403
    assert answer(access, **upload, cookie=f"a=b; {access.cookie}={access.token}")[0] == 200
    assert answer(access, **{**upload, "path": "/login"})[0] == 200
    for other in ('prefs={"theme":"dark"}', "user=John Doe", "a/b=c"):  # of other programs
        cookie = f"{other}; {access.cookie}={access.token}"
        assert answer(access, **upload, cookie=cookie)[0] == 200


def test_page_that_cannot_train_takes_no_uploads():
    upload = {"path": "/gradio_api/upload", "method": "POST", "content_type": "multipart/form-data"}
    assert answer(None, **upload)[0] == 403
    assert answer(None, **{**upload, "path": "/login"})[0] == 200
    assert answer(None, query="token=")[0] == 200


@pytest.mark.parametrize("types", [["multipart/x", "text/plain"], ["text/plain", "multipart/x"]])
def test_second_content_type_does_not_hide_an_upload(types: list[str]):
    access, headers = Access(), [(b"Content-Type", value.encode()) for value in types]
    assert answer(access, path="/gradio_api/upload", method="POST", more=headers)[0] == 403


def test_each_server_has_its_own_token():
    first, second = Access(), Access()
    assert len(first.token) >= 32
    assert not first.allows(second.token)
    assert not first.allows(None)
    assert first.cookie != second.cookie
    assert first.url("http://127.0.0.1:1/") == f"http://127.0.0.1:1/?token={first.token}"


@pytest.mark.parametrize(
    ("loopback", "public", "login", "allow", "expected"),
    [
        (True, False, None, None, True),
        (True, False, None, True, True),
        (True, False, ("a", "b"), False, False),
        (True, True, None, None, False),
        (False, False, None, None, False),
        (False, False, ("a", "b"), None, False),
        (False, False, ("a", "b"), False, False),
        (False, False, ("a", "b"), True, True),
        (True, True, ("a", "b"), True, True),
    ],
)
def test_training_on_other_hosts_needs_allow_training_and_a_login(
    loopback, public, login, allow, expected
):
    assert may_train(loopback, public, login, allow) is expected


@pytest.mark.parametrize(("loopback", "public"), [(False, False), (True, True)])
def test_allow_training_without_a_login_is_an_error(loopback, public):
    with pytest.raises(UserError) as error:
        may_train(loopback, public, None, allow=True)
    assert error.value.argument == "allow_training"
    assert "auth" in error.value.fix
