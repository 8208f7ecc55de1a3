"""Server of the playground. It loads the runs, and can require a login."""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.request import getproxies

from minigpt.core.console import log
from minigpt.core.settings import UserError
from minigpt.playground.answers import Playground
from minigpt.playground.hosts import Hosts
from minigpt.runs.folder import Run

if TYPE_CHECKING:
    from gradio import Blocks


LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    runs: Sequence[Run],
    host: str = "127.0.0.1",
    port: int | None = None,
    auth: str | None = None,
    root_path: str | None = None,
) -> None:
    """Serve a page with the models of `runs` until Ctrl-C is pressed, and log the page's address.

    Args:
        runs: one to four runs.
        host: host name or address to listen on.
        port: port to listen on; 0 means any free port, None the first free port from 7860.
        auth: login that visitors must enter, "user:password"; None means no login.
        root_path: path such as "/stories", or URL, of the page behind a reverse proxy; None means
            no proxy, or one that serves the page at its root.

    Raises:
        UserError: Gradio is missing, `auth` lacks the user or the password, `root_path` is neither
            a path nor a URL, a run cannot be read, or the address cannot be used.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the playground needs Gradio: run pip install gradio")
    login = read_login(auth)
    if root_path is not None and not root_path.startswith(("/", "http://", "https://")):
        problem = "must be a path or a URL, such as /stories or https://example.org/stories"
        raise UserError(problem, "root_path", root_path)
    page = start(Playground.load(runs), host, port, login, root_path)
    if host.strip("[]") not in LOOPBACK and login is None:
        log.warning("anyone who can reach %s can use the page, because auth is not set", host)
    log.info("open %s in a browser (Ctrl-C stops the page)", page.local_url)
    try:
        page.server.thread.join()
    finally:
        page.close(verbose=False)


def start(
    playground: Playground,
    host: str,
    port: int | None,
    login: tuple[str, str] | None = None,
    root_path: str | None = None,
) -> Blocks:
    """Start the page in a separate thread and return it; its address is `local_url`.

    Args:
        playground: the loaded models.
        host: host name or address to listen on.
        port: port to listen on; 0 means any free port, None the first free port from 7860.
        login: user name and password; None means no login.
        root_path: path or URL of the page behind a reverse proxy; None means no proxy.

    Returns:
        The running page.

    Raises:
        UserError: the port is in use or not allowed, or the host does not exist.
    """
    host = host.strip("[]")
    # Gradio requests its own page as a check, and this request must not go through a proxy.
    os.environ["no_proxy"] = f"{getproxies().get('no', '')},localhost,{host}"
    try:  # Gradio only checks ports of 127.0.0.1, and retries an invalid host for minutes
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, port or 0), family=family) as trial:
            port = trial.getsockname()[1] if port == 0 else port
        from minigpt.playground.page import build_app, build_page, page_theme, static_text

        page = build_page(playground)
        page.launch(
            prevent_thread_lock=True,
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            auth=login,
            root_path=root_path,
            _app=build_app(Hosts(host, root_path)),
            theme=page_theme(),
            css=static_text("playground.css"),
            footer_links=[],
            max_file_size="1kb",  # the page has no uploads
            run_history=False,  # browsers must not store the inputs
            enable_monitoring=False,
            share=False,
            ssr_mode=False,
            quiet=True,
        )
    except (OSError, UnicodeError) as error:  # UnicodeError: not a valid host name
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UnicodeError | socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            problem = f"cannot listen on this host ({reason}); choose another host"
            raise UserError(problem, "host", host) from None
        problem = f"cannot listen on {host} ({reason}); choose another port"
        raise UserError(problem, "port", port) from None
    return page


def read_login(auth: str | None) -> tuple[str, str] | None:
    """Split "user:password" into a pair.

    Args:
        auth: the login; None means no login.

    Returns:
        The user name and the password, or None.

    Raises:
        UserError: the user name or the password is missing.
    """
    if auth is None:
        return None
    user, _, password = auth.partition(":")
    if not (user and password):
        raise UserError("must have the form user:password", "auth")
    return user, password
