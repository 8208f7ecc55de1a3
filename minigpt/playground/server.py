"""The playground's server: where it listens and who may come in."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import socket

from minigpt.core.settings import UserError
from minigpt.playground.answers import Playground

log = logging.getLogger("minigpt")

FIRST_PORT, N_PORTS = 7860, 100
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def require_gradio() -> None:
    """UserError with the command to type, where Gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the playground needs Gradio: pip install -e '.[playground]'")


def read_auth(text: str | None) -> tuple[str, str] | None:
    """`user:password` as a pair. UserError for anything else."""
    if text is None:
        return None
    user, _, password = text.partition(":")
    if not (user and password):
        raise UserError("--auth takes a name and a password: --auth user:password")
    return user, password


def listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens at `host`; without a port, at the first free one from 7860 on.

    Raises:
        UserError: the port is taken or not allowed, or there is no such host.
    """
    ports = range(FIRST_PORT, FIRST_PORT + N_PORTS) if port is None else [port]
    try:
        family = socket.getaddrinfo(host, ports[0], type=socket.SOCK_STREAM)[0][0]
        for candidate in ports[:-1]:
            with contextlib.suppress(OSError):
                return socket.create_server((host, candidate), family=family, backlog=128)
        return socket.create_server((host, ports[-1]), family=family, backlog=128)
    except (OSError, UnicodeError) as error:  # UnicodeError: no host is spelled so
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen at {host}, port {ports[0]}: {reason}; choose another --host or --port"
        ) from None


def serve(
    playground: Playground, host: str, port: int | None, auth: tuple[str, str] | None = None
) -> None:
    """Serve the page until ctrl-C, and say on the log where it is.

    Raises:
        UserError: Gradio is missing, or nothing can listen there.
    """
    require_gradio()
    from minigpt.playground.page import run_server

    listening = listen(host, port)
    if host not in LOOPBACK and auth is None:
        log.warning("everybody who reaches %s can use the page: --auth user:password asks", host)
    shown = f"[{host}]" if ":" in host else host
    run_server(playground, listening, auth, f"http://{shown}:{listening.getsockname()[1]}")
