"""Protection of the playground against pages of other sites in the visitor's browser.

Any web page can send requests to a server on the visitor's own machine. With DNS rebinding, a page
can also read the answers: the host name of the page's site is made to resolve to 127.0.0.1, so the
browser takes the playground for a part of that site. Two headers can reveal these requests. Origin
contains the site of the page that sent the request. With DNS rebinding, the header Host contains
this site, too. So requests with the name of another site in Host or Origin are refused.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]
_ANY = ("0.0.0.0", "::")  # noqa: S104 (the addresses of all interfaces)


class Hosts:
    """Host names and addresses under which the server may be called.

    Args:
        host: host name or address that the server listens on. In a Space of the Hugging Face Hub,
            the host names of the Space are allowed, too.
        root_path: path or URL of the page behind a reverse proxy. If it is a URL, its host is
            allowed, too. None means no proxy.
    """

    def __init__(self, host: str, root_path: str | None = None) -> None:
        self._any_address = host in _ANY
        machine = socket.gethostname()
        own = [machine, f"{machine}.local"] if self._any_address else [host]
        own += os.environ.get("SPACE_HOST", "").split(",")  # set in a Space: me-tales.hf.space
        self._names = {"localhost", *own, _name(urlsplit(root_path or "").netloc)}
        self._names = {name.lower() for name in self._names if name}

    def allow(self, netloc: str) -> bool:
        """Return whether the host in `netloc`, "host:port", is loopback or a host of this server.

        If the server listens on all interfaces, every IP address is allowed, because DNS rebinding
        is only possible with names.
        """
        name = _name(netloc)
        try:
            return name in self._names or ipaddress.ip_address(name).is_loopback | self._any_address
        except ValueError:  # not an address
            return False

    def refusal(self, headers: dict[str, str]) -> str | None:
        """Return the reason to refuse a request; None if the request is allowed.

        Args:
            headers: headers of the request, by name in lower case.
        """
        if not self.allow(host := headers.get("host", "")):
            return f"{host!r} is not a host name of this server"
        origin = headers.get("origin")
        if origin is None or self.allow(urlsplit(origin).netloc):
            return None
        # A proxy sets this header. A page of another site could set it only if CORS allowed it.
        if _name(urlsplit(origin).netloc) == _name(headers.get("x-forwarded-host", "")) != "":
            return None
        return f"the request comes from a page of another site, {origin!r}"


def _name(netloc: str) -> str:
    """Return the host name of `netloc`, "host:port", in lower case; "" if it has no host name."""
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""


def guarded(app: App, hosts: Hosts) -> App:
    """Return an ASGI app that calls `app`, but answers 403 to requests that `hosts` refuses."""

    async def guard(scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":  # the page has no WebSockets
            return await app(scope, receive, send)
        pairs = (
            (name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]
        )
        if (reason := hosts.refusal({name.lower(): value for name, value in pairs})) is None:
            return await app(scope, receive, send)
        advice = "start the playground with the address of the page as its host or root path"
        body = f"403: {reason}; {advice}\n".encode()
        start = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": 403, "headers": start})
        await send({"type": "http.response.body", "body": body})

    return guard
