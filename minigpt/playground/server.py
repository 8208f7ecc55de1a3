"""Server of the playground. It loads the runs, and can require a login."""

from __future__ import annotations

import atexit
import errno
import importlib.util
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import getproxies

from minigpt.core.console import log
from minigpt.core.settings import UserError
from minigpt.playground.access import Access, may_train
from minigpt.playground.answers import Playground
from minigpt.playground.hosts import Hosts
from minigpt.playground.training import JOBS, MAX_UPLOAD, SNAPSHOTS, TrainingQueue
from minigpt.runs.folder import Run

if TYPE_CHECKING:
    from gradio import Blocks


LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_TRAINED = (
    8  # maximum number of finished training runs, newest first, to add to the page at a time
)
WATCH_SECONDS = 2.0  # interval at which the server looks for waiting and finished training runs


@dataclass(frozen=True)
class Training:
    """The training queue of a server, and the access token that visitors need to use the queue."""

    queue: TrainingQueue
    access: Access

    def watch(self, playground: Playground, ended: threading.Event) -> None:
        """Start queued jobs, and add the models of finished jobs to the page, until `ended` is set.

        The jobs are checked every WATCH_SECONDS. Each check considers only the newest MAX_TRAINED
        finished jobs.

        Args:
            playground: the models of the page.
            ended: event that ends the loop.
        """
        seen: set[str] = set()
        problem = ""  # the last problem; if it persists, it is not logged again
        while not ended.wait(WATCH_SECONDS):
            try:
                self.queue.advance()
                self._add_models(playground, seen)
                problem = ""
            except Exception as error:  # such as a full disk: waiting jobs must not wait forever
                if str(error) != problem:
                    problem = str(error)
                    log.warning(
                        "the page cannot start training runs or load earlier ones: %s", problem
                    )

    def _add_models(self, playground: Playground, seen: set[str]) -> None:
        """Add the models of the newest finished jobs to the page, and their names to `seen`.

        Jobs in `seen` are left out. If models cannot be added, the last error is raised at the end.
        A job whose run has a mistake is not tried again. After another error, such as a lack of
        memory, the job is not in `seen`, so it can be tried again.
        """
        failure = None
        finished = [job for job in self.queue.jobs() if job.state == "finished"]
        for job in finished[:MAX_TRAINED]:
            if job.name in seen or job.run is None:
                continue
            seen.add(job.name)
            try:
                playground.add(Run.load(job.run))
            except UserError as error:
                failure = error
            except Exception as error:
                seen.discard(job.name)
                failure = error
        if failure is not None:
            raise failure


def serve(
    runs: Sequence[Run],
    host: str = "127.0.0.1",
    port: int | None = None,
    auth: str | None = None,
    root_path: str | None = None,
    allow_training: bool | None = None,
) -> None:
    """Serve a page with the models of `runs` until Ctrl-C is pressed, and log the page's address.

    If `allow_training` permits it, the page can also train models. Each training run is a separate
    process, which writes to runs/ and continues when the server ends.

    Args:
        runs: one to four runs.
        host: host name or address to listen on.
        port: port to listen on; 0 means any free port, None means the first free port from 7860.
        auth: login that visitors must enter, "user:password"; None means no login.
        root_path: URL of the page behind a reverse proxy, or its path, such as "/stories". None
            means that there is no proxy, or that the proxy serves the page at the path "/".
        allow_training: whether the page can train models. None allows it only on a private page:
            `host` is a loopback address, `root_path` is None, and the server is not a Hugging Face
            Space. On any other page, training needs both True and a login.

    Raises:
        UserError: Gradio is missing, `auth` lacks the user or the password, `root_path` is neither
            a path nor a URL, `allow_training` is True without the login that it needs, a run cannot
            be read, or the server cannot listen on the address.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the playground needs Gradio: run pip install gradio")
    login = read_login(auth)
    if root_path is not None and not root_path.startswith(("/", "http://", "https://")):
        problem = "must be a path or a URL, such as /stories or https://example.org/stories"
        raise UserError(problem, "root_path", root_path)
    is_loopback = host.strip("[]") in LOOPBACK
    is_public = root_path is not None or "SPACE_ID" in os.environ
    training = None
    if may_train(is_loopback, is_public, login, allow_training):
        from minigpt.data.config import CACHE  # a Space has no minigpt.data, and cannot train

        try:
            training = Training(TrainingQueue(Path(CACHE) / JOBS, Path("runs")), Access())
        except OSError as error:  # such as a read-only working directory
            log.warning("the page cannot train models: %s", error)
    playground = Playground.load(runs, SNAPSHOTS if training is not None else 0)
    page = start(playground, host, port, login, root_path, training)
    if not is_loopback and login is None:
        log.warning("anyone who can reach this machine can use the page: auth sets a login")
    url = str(page.local_url)
    through_proxy = "" if root_path is None else root_path
    if training is not None:
        url, through_proxy = training.access.url(url), training.access.url(through_proxy)
    log.info("open %s in a browser (Ctrl-C stops the page)", url)
    if root_path is not None:
        log.info("through your proxy, its address is %s", through_proxy)
    ended = threading.Event()
    if training is not None:
        watch = partial(training.watch, playground, ended)
        threading.Thread(target=watch, daemon=True).start()
    try:
        page.server.thread.join()
    finally:
        ended.set()
        page.close(verbose=False)


def start(
    playground: Playground,
    host: str,
    port: int | None,
    login: tuple[str, str] | None = None,
    root_path: str | None = None,
    training: Training | None = None,
) -> Blocks:
    """Start the page in a separate thread, and return the page.

    Args:
        playground: the loaded models.
        host: host name or address to listen on.
        port: port to listen on; 0 means any free port, None means the first free port from 7860.
        login: user name and password; None means no login.
        root_path: path or URL of the page behind a reverse proxy; None means no proxy.
        training: the queue of training runs and its access token; None means no tab Train.

    Returns:
        The running page. The attribute `local_url` contains its URL.

    Raises:
        UserError: the port is in use or not allowed, the host does not exist, or the machine is too
            busy to answer.
    """
    host = host.strip("[]")
    # Gradio requests its own page as a check, and this request must not go through a proxy.
    os.environ["no_proxy"] = f"{getproxies().get('no', '')},localhost,{host}"
    store_uploads_privately()
    try:  # Gradio only checks ports of 127.0.0.1, and retries an invalid host for minutes
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, port or 0), family=family) as trial:
            port = trial.getsockname()[1] if port == 0 else port
        from minigpt.playground.html import static_text
        from minigpt.playground.page import build_app, build_page, page_theme

        page = build_page(playground, training)
        try:
            page.launch(
                prevent_thread_lock=True,
                server_name=f"[{host}]" if ":" in host else host,
                server_port=port,
                auth=login,
                root_path=root_path,
                _app=build_app(Hosts(host, root_path), training),
                theme=page_theme(),
                css=static_text("playground.css"),
                footer_links=[],
                max_file_size="1kb"
                if training is None
                else MAX_UPLOAD,  # only training runs have uploads
                run_history=False,  # browsers must not store the inputs
                enable_monitoring=False,
                share=False,
                ssr_mode=False,
                quiet=True,
            )
        except ValueError:  # Gradio has requested its page five times, for three seconds each
            page.close(verbose=False)
            problem = f"the page does not answer at {page.local_url}"
            raise UserError(f"{problem}; if the machine is busy, try again") from None
    except (OSError, UnicodeError) as error:  # UnicodeError: not a valid host name
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UnicodeError | socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            problem = f"cannot listen on this host ({reason}); choose another host"
            raise UserError(problem, "host", host) from None
        problem = f"cannot listen on {host} ({reason}); choose another port"
        raise UserError(problem, "port", port) from None
    return page


def store_uploads_privately() -> None:
    """Let Gradio store uploads in a new folder that only this user can read.

    The new folder is deleted when the process ends. Without it, Gradio would use a folder
    that all users of the machine share, but in which only the user who created it can write. If
    GRADIO_TEMP_DIR already names a folder, Gradio uses that folder, which is not deleted.
    """
    if not os.environ.get("GRADIO_TEMP_DIR"):
        folder = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="minigpt-uploads-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


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
