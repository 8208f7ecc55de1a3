"""Fetch a text file of a public dataset from the Hugging Face Hub: all of it, or its first part.

A training budget often needs a fifth of a file. `huggingface_hub` fetches whole files, and reads
ranges of bytes of the others, so that a download that was interrupted continues where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub as hub
from filelock import FileLock
from huggingface_hub import constants
from huggingface_hub.utils import httpx, tqdm

from minigpt.core.console import console
from minigpt.data.progress import byte_progress

_BLOCK = 16 << 20  # bytes fetched by one request, and held in memory


def fetch(folder: Path, repo: str, name: str, separator: str, n_bytes: int | None = None) -> Path:
    """Return the file `name` of the dataset `repo`, or the whole stories in its first `n_bytes`.

    A whole file is stored as `name`, a first part as <stem>.first-<n_bytes>.<version>.txt. From
    the name a later request knows whether the part is long enough, and then needs no network; a
    longer one continues from there if the version (a hash of the hub's etag) is the same. One
    process downloads at a time; the others wait for its file. The hub is HF_ENDPOINT, else
    huggingface.co.

    Args:
        folder: where to store the file; created when missing.
        repo: owner and name of the dataset.
        name: path of the file in the dataset.
        separator: text after each story; a first part ends with it.
        n_bytes: number of bytes to fetch; None means the whole file.

    Returns:
        The path of the file or of the first part.

    Raises:
        ConnectionError: the hub cannot be reached or refuses, or the download is damaged; the
            message is one line.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        parts = sorted(_first_parts(folder, name))
        enough = [path for size, path in parts if n_bytes is not None and size >= n_bytes]
        for path in (folder / name, *enough):
            if path.is_file():
                return path
        endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        telemetry_off, constants.HF_HUB_DISABLE_TELEMETRY = constants.HF_HUB_DISABLE_TELEMETRY, True
        try:
            return _fetch(folder, repo, name, separator, n_bytes, endpoint)
        except (OSError, RuntimeError, httpx.HTTPError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # an error of the disk; those of the hub have no number
            reason, *_ = str(error).splitlines() or ["no answer"]
            raise ConnectionError(f"{endpoint}, {type(error).__name__}: {reason}") from error
        finally:
            constants.HF_HUB_DISABLE_TELEMETRY = telemetry_off


class HubLines(tqdm):
    """Stands in for the bar of `huggingface_hub`, which is silent without a terminal."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._stack = contextlib.ExitStack()
        super().__init__(*args, **kwargs | {"disable": True})
        total, done = kwargs.get("total"), kwargs.get("initial") or 0
        self._show = self._stack.enter_context(byte_progress(kwargs["desc"], total, done))

    def update(self, n: float | None = 1) -> None:  # type: ignore[override]
        """Count `n` more bytes."""
        self._show(int(n or 0))

    def close(self) -> None:
        """End the lines."""
        self._stack.close()
        super().close()


def _first_parts(folder: Path, name: str, version: str = "*") -> list[tuple[int, Path]]:
    """Return the finished first parts of a file, each with its number of bytes requested."""
    paths = folder.glob(f"{Path(name).stem}.first-*.{version}.txt")
    return [(int(path.name.split(".")[-3].removeprefix("first-")), path) for path in paths]


def _fetch(
    folder: Path, repo: str, name: str, separator: str, n_bytes: int | None, endpoint: str
) -> Path:
    dataset: Any = {"repo_type": "dataset", "endpoint": endpoint}
    metadata = hub.get_hf_file_metadata(hub.hf_hub_url(repo, name, **dataset))
    if not (metadata.etag and metadata.size and metadata.commit_hash):
        raise ConnectionError("no etag, size or commit in the answer")
    version = hashlib.sha256(metadata.etag.encode()).hexdigest()[:12]
    if n_bytes is None or n_bytes >= metadata.size:
        aside = folder / f"{name}.incoming"
        try:
            bar = None if console.is_terminal else HubLines
            hub.hf_hub_download(repo, name, local_dir=aside, tqdm_class=bar, **dataset)
            _check(aside / name, separator, metadata.etag)
            (aside / name).replace(folder / name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return folder / name

    part = folder / f"{name}.{version}.part"
    for stale in set(folder.glob(f"{name}.*.part")) - {part}:
        stale.unlink()
    part.touch()
    # A smaller first part is copied, not moved: should this download break, it still serves.
    for _, smaller in _first_parts(folder, name, version):
        if smaller.stat().st_size > part.stat().st_size:
            shutil.copyfile(smaller, part)
    file_system, path = hub.HfFileSystem(endpoint=endpoint), f"datasets/{repo}/{name}"
    source = file_system.open(path, "rb", revision=metadata.commit_hash, cache_type="none")
    with source, part.open("ab") as file, byte_progress(name, n_bytes, file.tell()) as show:
        source.seek(file.tell())
        while (wanted := min(_BLOCK, n_bytes - file.tell())) > 0:
            block = source.read(wanted)
            if not isinstance(block, bytes) or len(block) != wanted:  # ranges are ignored
                raise ConnectionError(f"asked for {wanted} bytes, got {len(block)}")
            file.write(block)
            show(wanted)
    try:
        _check(part, separator, n_bytes=n_bytes)
    except ConnectionError:
        part.unlink()  # the next call must not continue from damaged bytes
        raise
    return part.replace(folder / f"{Path(name).stem}.first-{n_bytes}.{version}.txt")


def _check(path: Path, separator: str, etag: str = "", n_bytes: int = 0) -> None:
    """Check a download; cut a first part of `n_bytes` after its last separator.

    Raises:
        ConnectionError: there is no separator, the text is not UTF-8, or its sha256 is not `etag`.
    """
    mark = separator.encode()
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ) as content:
            end = content.rfind(mark) + len(mark)
        if end < len(mark):
            raise ConnectionError(f"{path.name} holds no {separator} in the bytes that arrived")
        if n_bytes:
            file.truncate(end)
            os.fsync(file.fileno())
        # Large files have their sha256 for an etag; small ones have a git hash, which is shorter.
        if len(etag) == 64 and hashlib.file_digest(file, "sha256").hexdigest() != etag:
            raise ConnectionError(f"{path.name} arrived damaged: its sha256 is not the hub's")
    with path.open(encoding="utf-8") as text:
        try:
            while text.read(_BLOCK):
                pass
        except UnicodeDecodeError:
            raise ConnectionError(f"{path.name} arrived damaged: it is not UTF-8") from None
