"""Fetch a text file of a public dataset from the Hugging Face Hub: all of it, or its first part.

`huggingface_hub` fetches whole files only; a training budget often needs a fifth of one. So this
asks for ranges of bytes itself, and goes on where a broken download stopped.
"""

from __future__ import annotations

import codecs
import hashlib
import mmap
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock
from huggingface_hub import get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, httpx
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

_CHUNK = 1 << 20  # bytes read at a time
_RETRY_WAITS = (0.5, 2.0, 5.0)  # seconds before each further try on a broken connection
_TIMEOUT = 30.0  # seconds without a byte before a connection counts as broken


def fetch(
    folder: Path,
    repo: str,
    name: str,
    separator: str,
    n_bytes: int | None = None,
    endpoint: str | None = None,
) -> Path:
    """The file `name` of the dataset `repo`, or what whole stories its first `n_bytes` hold.

    It is kept in `folder` as `name` when whole, else as <stem>.first-<n_bytes>.<version>.txt. So
    the name tells a later request whether there is enough, which then needs no network; a larger
    one goes on from there if the version (a hash of the hub's etag) is still the same. Only one
    process at a time downloads; another waits, then finds the file there.

    Args:
        folder: made when missing.
        separator: what stands after each story; a first part is cut behind the last one.
        n_bytes: how much to fetch; None for the whole file.
        endpoint: address of the hub; the default is HF_ENDPOINT, else huggingface.co.

    Raises:
        ConnectionError: the hub cannot be reached or refuses, or what arrived is damaged; the
            message is one line. Of a broken download the part that came is kept.
        OSError: the folder cannot be written.
    """
    endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        if found := _find(folder, name, n_bytes):
            return found
        try:
            return _fetch(folder, repo, name, separator, n_bytes, endpoint)
        except (httpx.HTTPError, ConnectionError) as error:
            reason = (str(error).splitlines() or ["no answer"])[0]
            raise ConnectionError(f"{endpoint}, {type(error).__name__}: {reason}") from error


def _find(folder: Path, name: str, n_bytes: int | None) -> Path | None:
    """What an earlier call left that is enough: the whole file, else the smallest first part."""
    if (folder / name).is_file():
        return folder / name
    enough = [part for part in _first_parts(folder, name) if n_bytes and part[0] >= n_bytes]
    return min(enough)[1] if enough else None


def _first_parts(folder: Path, name: str, version: str = "*") -> list[tuple[int, Path]]:
    """Finished first parts of a file, each with the number of bytes that was asked for."""
    paths = folder.glob(f"{Path(name).stem}.first-*.{version}.txt")
    return [(int(re.findall(r"\.first-(\d+)\.", path.name)[-1]), path) for path in paths]


def _fetch(
    folder: Path, repo: str, name: str, separator: str, n_bytes: int | None, endpoint: str
) -> Path:
    def url(revision: str) -> str:
        return hf_hub_url(repo, name, repo_type="dataset", revision=revision, endpoint=endpoint)

    hub = _patiently(lambda: get_hf_file_metadata(url("main"), token=False))
    if not (hub.etag and hub.size and hub.commit_hash):
        raise ConnectionError("no etag, size or commit in the answer")
    whole = n_bytes is None or n_bytes >= hub.size
    target = hub.size if n_bytes is None else min(n_bytes, hub.size)
    version = hashlib.sha256(hub.etag.encode()).hexdigest()[:12]

    part = folder / f"{name}.{version}.part"
    for stale in set(folder.glob(f"{name}.*.part")) - {part}:
        stale.unlink()
    part.touch()
    # A smaller first part is copied, not moved: should this download break, it still serves.
    for _, smaller in _first_parts(folder, name, version):
        if smaller.stat().st_size > part.stat().st_size:
            shutil.copyfile(smaller, part)

    _download(url(hub.commit_hash), part, target)  # by commit: the file cannot change meanwhile
    try:
        end = _end_of_last_story(part, target, separator)
        with part.open("r+b") as file:
            file.truncate(hub.size if whole else end)
            os.fsync(file.fileno())
        _check(part, hub.etag if whole else "")
    except ConnectionError:
        part.unlink()  # damaged: the next call must not go on from here
        raise
    final = folder / (name if whole else f"{Path(name).stem}.first-{n_bytes}.{version}.txt")
    os.replace(part, final)
    return final


def _patiently(request: Callable[[], T]) -> T:
    """The answer to a request that is repeated, a few times, when its connection breaks."""
    for wait in _RETRY_WAITS:
        try:
            return request()
        except httpx.TransportError:
            time.sleep(wait)
    return request()


def _download(url: str, part: Path, target: int) -> None:
    """Make `part` at least `target` bytes long, under a progress bar when there is a terminal."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(url.rsplit("/", 1)[-1], total=target)

        def show(n_bytes: int) -> None:
            progress.update(task, completed=n_bytes)

        while part.stat().st_size < target:
            _patiently(lambda: _stream(url, part, target, show))


def _stream(url: str, part: Path, target: int, show: Callable[[int], None]) -> None:
    """Add to `part`, up to `target` bytes. A connection that broke is an error if it gave nothing.

    Otherwise the next call goes on, so that a long download may break any number of times.
    """
    have = part.stat().st_size
    headers = build_hf_headers(token=False)
    headers |= {"Range": f"bytes={have}-{target - 1}", "Accept-Encoding": "identity"}
    broken = None
    try:
        with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT) as response:
            hf_raise_for_status(response)
            resumes = response.status_code == httpx.codes.PARTIAL_CONTENT  # else from byte 0
            with part.open("ab" if resumes else "wb") as file:
                for chunk in response.iter_raw():
                    file.write(chunk[: target - file.tell()])
                    show(file.tell())
                    if file.tell() == target:
                        break
    except httpx.TransportError as error:
        broken = error
    if part.stat().st_size <= have:
        raise broken or httpx.RemoteProtocolError("the answer was empty")


def _end_of_last_story(part: Path, n_bytes: int, separator: str) -> int:
    """Offset behind the last separator in the first `n_bytes`."""
    mark = separator.encode()
    with (
        part.open("rb") as file,
        mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ) as view,
    ):
        start = view.rfind(mark)
    if start < 0:
        raise ConnectionError(
            f"no {separator} in the first {n_bytes} bytes: ask for more, or it is another file"
        )
    return start + len(mark)


def _check(part: Path, etag: str) -> None:
    """Raise ConnectionError when `part` is not UTF-8, or not what a sha256 etag says."""
    digest, utf8 = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    try:
        with part.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                utf8.decode(chunk)
            utf8.decode(b"", final=True)
    except UnicodeDecodeError:
        raise ConnectionError(f"{part.name} arrived damaged: it is not UTF-8") from None
    # Large files have their sha256 for an etag; small ones have a git hash, which is shorter.
    if len(etag) == 64 and digest.hexdigest() != etag:
        raise ConnectionError(f"{part.name} arrived damaged: its sha256 is not the hub's")
