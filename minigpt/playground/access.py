"""Token that a visitor needs to train, as in Jupyter: in the printed URL first, then in a cookie.

Every request of the browser to this server carries the cookie. SameSite=Strict keeps it from pages
of other sites.
"""

from __future__ import annotations

import secrets
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode

from minigpt.core.settings import UserError

PARAMETER = "token"


class Access:
    """Random token of one server, and the name of its cookie."""

    def __init__(self) -> None:
        self.token = secrets.token_urlsafe(32)
        self.cookie = f"minigpt-training-{secrets.token_hex(4)}"  # cookies do not depend on ports

    def allows(self, token: str | None) -> bool:
        """Return whether `token` is the token; the time does not depend on its characters."""
        return secrets.compare_digest((token or "").encode("utf-8", "replace"), self.token.encode())

    def url(self, address: str) -> str:
        """Return the address of the page with the token."""
        return f"{address.rstrip('/')}/?{urlencode({PARAMETER: self.token})}"


def may_train(
    host_is_loopback: bool, is_public: bool, login: tuple[str, str] | None, allow: bool | None
) -> bool:
    """Return whether the page may train models at all.

    Args:
        host_is_loopback: whether the server listens on this machine only.
        is_public: whether the server is behind a proxy or on a Hugging Face Space.
        login: user name and password of the page; None means no login.
        allow: whether training was allowed explicitly; None means only if nobody else can reach the
            page.

    Raises:
        UserError: training on a host that others can reach was allowed without a login.
    """
    is_private = host_is_loopback and not is_public
    if allow is None or is_private:
        return is_private if allow is None else allow
    if allow and login is None:
        message = "others can reach this host, so training also needs a login"
        raise UserError(message, "allow_training", fix={"auth": "user:password"})
    return allow


def with_token(app: Any, access: Access) -> Any:
    """Return an ASGI app that checks the token.

    A page request with the right token sets the cookie and is redirected to the URL without the
    token, so that the token is neither in the history nor sent to other sites. Uploads without the
    cookie get status 403. The handlers of the page check the cookie of all other requests.

    Args:
        app: the ASGI app of the page.
        access: the token.
    """

    async def guard(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        token = dict(query).get(PARAMETER)
        if scope["method"] == "GET" and access.allows(token):
            rest = urlencode([pair for pair in query if pair[0] != PARAMETER])
            cookie = f"{access.cookie}={access.token}; Path=/; HttpOnly; SameSite=Strict"
            # A relative URL, because a proxy may have changed the path.
            return await _answer(send, 303, location=f"?{rest}", set_cookie=cookie)
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        is_upload = headers.get(b"content-type", "").lower().startswith("multipart/")
        is_login = scope["path"].rstrip("/").endswith("/login")
        if is_upload and not is_login and not access.allows(_cookie(headers, access)):
            return await _answer(send, 403)
        await app(scope, receive, send)

    return guard


def _cookie(headers: dict[bytes, str], access: Access) -> str | None:
    cookie = SimpleCookie(headers.get(b"cookie", "")).get(access.cookie)
    return None if cookie is None else cookie.value


async def _answer(send: Any, status: int, **headers: str) -> None:
    pairs = [(k.replace("_", "-").encode(), v.encode("latin-1")) for k, v in headers.items()]
    pairs.append((b"cache-control", b"no-store"))
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    body = b"open the address with the token that minigpt playground printed\n"
    await send({"type": "http.response.body", "body": body if status == 403 else b""})
