"""Access token, similar to Jupyter's: a visitor of the page needs it to train models.

The token is in the URL that `minigpt playground` prints. When a browser opens this URL, the server
sets a cookie with the token, and the browser adds the cookie to its later requests to this server.
With SameSite=Strict, requests from pages of other sites are sent without the cookie.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qsl, urlencode

from minigpt.core.settings import UserError

PARAMETER = "token"
_NO_TOKEN = b"403: open the whole address that minigpt playground printed, with ?token=...\n"
_NO_UPLOADS = b"403: this page trains no models, so it takes no files: start minigpt playground\n"


class Access:
    """Random access token of one server, and the name of the cookie that contains the token."""

    def __init__(self) -> None:
        self.token = secrets.token_urlsafe(32)
        # Random, because servers on different ports of one host share their cookies.
        self.cookie = f"minigpt-training-{secrets.token_hex(4)}"

    def allows(self, token: str | None) -> bool:
        """Return whether `token` is the token of this server, with a constant-time comparison."""
        return secrets.compare_digest((token or "").encode("utf-8", "replace"), self.token.encode())

    def admits(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Return whether the cookie with the token is in the headers of an ASGI request."""
        # http.cookies would stop at a cookie of another program that is not valid.
        from starlette.requests import cookie_parser

        values = (value.decode("latin-1") for name, value in headers if name.lower() == b"cookie")
        return self.allows(cookie_parser("; ".join(values)).get(self.cookie))

    def url(self, address: str) -> str:
        """Return the URL of the page with the token; `address` is the URL without it."""
        return f"{address.rstrip('/')}/?{urlencode({PARAMETER: self.token})}"


def may_train(
    host_is_loopback: bool, is_public: bool, login: tuple[str, str] | None, allow: bool | None
) -> bool:
    """Return whether the page may train models at all.

    Args:
        host_is_loopback: whether the server listens on this machine only.
        is_public: whether the server is behind a proxy or on a Hugging Face Space.
        login: user name and password of the page; None means no login.
        allow: whether to allow training; None allows it only if other machines cannot reach the
            page.

    Raises:
        UserError: `allow` is True and other machines can reach the page, but the page has no login.
    """
    is_private = host_is_loopback and not is_public
    if allow is None or is_private:
        return is_private if allow is None else allow
    if allow and login is None:
        message = "others can reach this host, so training also needs a login"
        raise UserError(message, "allow_training", fix={"auth": "user:password"})
    return allow


def with_token(app: Any, access: Access | None) -> Any:
    """Return an ASGI app that checks the access token and calls `app`.

    If the URL of a GET request has the right token, the answer sets a cookie with the token and
    redirects to the URL without the token. So the token is neither in the browser's history nor
    sent to other sites. A multipart request is an upload, unless it is the login. An upload without
    the cookie gets status 403, and so does any upload to a page that cannot train. All other
    requests are passed on to `app`; the event handlers of the tab Train check the cookie.

    Args:
        app: the ASGI app of the page.
        access: the token and the name of its cookie; None for a page that cannot train.
    """

    async def guard(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        token = dict(query).get(PARAMETER)
        if access is not None and scope["method"] == "GET" and access.allows(token):
            rest = urlencode([pair for pair in query if pair[0] != PARAMETER])
            cookie = f"{access.cookie}={access.token}; Path=/; HttpOnly; SameSite=Strict"
            # A relative URL, because a proxy may have changed the path.
            return await _answer(send, 303, location=f"?{rest}", set_cookie=cookie)
        headers = scope["headers"]
        types = [value for name, value in headers if name.lower() == b"content-type"]
        is_upload = any(value.strip().lower().startswith(b"multipart/") for value in types)
        is_login = scope["path"].rstrip("/").endswith("/login")
        if is_upload and not is_login and not (access is not None and access.admits(headers)):
            return await _answer(send, 403, _NO_UPLOADS if access is None else _NO_TOKEN)
        await app(scope, receive, send)

    return guard


async def _answer(send: Any, status: int, body: bytes = b"", **headers: str) -> None:
    pairs = [(k.replace("_", "-").encode(), v.encode("latin-1")) for k, v in headers.items()]
    pairs.append((b"cache-control", b"no-store"))
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
