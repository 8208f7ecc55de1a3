"""Download a text file, or a prefix of it, from a public dataset on the Hugging Face Hub.

A run often needs only a fifth of a file, but `huggingface_hub` downloads complete files. This
module reads a prefix of the file as byte ranges. An interrupted download of a prefix continues
where it stopped.
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
from minigpt.core.files import sync
from minigpt.data.progress import byte_progress

_BLOCK = 16 << 20  # bytes downloaded by one request and held in memory


def fetch(folder: Path, repo: str, name: str, separator: str, n_bytes: int | None = None) -> Path:
    """Download a file of a dataset, or a prefix of the file, and return the path of the copy.

    A complete file is stored as `name`, a prefix as <stem>.first-<n_bytes>.<version>.txt, where
    <version> is a hash of the Hub's etag. The network is not used if `folder` already contains
    the complete file, or a prefix that an earlier call fetched with at least the same `n_bytes`.
    If only a shorter prefix of the same version is stored, the download continues after the last
    byte of that prefix.
    Only one process downloads a file at a time; the other processes wait. The environment variable
    HF_ENDPOINT sets the Hub's address; the default is huggingface.co.

    Args:
        folder: folder for the file, created if missing.
        repo: name of the dataset, owner/name.
        name: path of the file in the dataset.
        separator: separator after each story; a prefix is cut after its last separator.
        n_bytes: number of bytes to download; None means the whole file.

    Returns:
        The path of the file or of the prefix.

    Raises:
        ConnectionError: the Hub cannot be reached or refuses the request, or the download is
            damaged; the message is one line.
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
                raise  # a disk error; errors of the Hub have no errno
            reason, *_ = str(error).splitlines() or ["no answer"]
            raise ConnectionError(f"{endpoint}, {type(error).__name__}: {reason}") from error
        finally:
            constants.HF_HUB_DISABLE_TELEMETRY = telemetry_off


class HubLines(tqdm):
    """Log lines with the progress of a `huggingface_hub` download, for output without a terminal.

    `huggingface_hub` uses this class in place of `tqdm`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._stack = contextlib.ExitStack()
        super().__init__(*args, **kwargs | {"disable": True})
        total, done = kwargs.get("total"), kwargs.get("initial") or 0
        self._show = self._stack.enter_context(byte_progress(kwargs["desc"], total, done))

    def update(self, n: float | None = 1) -> None:  # type: ignore[override]
        """Add `n` bytes to the progress."""
        self._show(int(n or 0))

    def close(self) -> None:
        """Stop logging."""
        self._stack.close()
        super().close()


def _first_parts(folder: Path, name: str, version: str = "*") -> list[tuple[int, Path]]:
    """Return (number of bytes, path) for each stored prefix of the file `name`.

    The number of bytes is the one that was requested when the prefix was downloaded.

    Args:
        folder: folder of the prefixes.
        name: path of the file in the dataset.
        version: version of the prefixes, as in `fetch`; the default means all versions.
    """
    paths = folder.glob(f"{Path(name).stem}.first-*.{version}.txt")
    return [(int(path.name.split(".")[-3].removeprefix("first-")), path) for path in paths]


def _fetch(
    folder: Path, repo: str, name: str, separator: str, n_bytes: int | None, endpoint: str
) -> Path:
    dataset: Any = {"repo_type": "dataset", "endpoint": endpoint}
    metadata = hub.get_hf_file_metadata(hub.hf_hub_url(repo, name, **dataset))
    if not (metadata.etag and metadata.size and metadata.commit_hash):
        raise ConnectionError("the response lacks an etag, a size or a commit")
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
    # A smaller prefix is copied, not moved, so that it stays usable if this download fails.
    for _, smaller in _first_parts(folder, name, version):
        if smaller.stat().st_size > part.stat().st_size:
            shutil.copyfile(smaller, part)
    file_system, path = hub.HfFileSystem(endpoint=endpoint), f"datasets/{repo}/{name}"
    source = file_system.open(path, "rb", revision=metadata.commit_hash, cache_type="none")
    with source, part.open("ab") as file, byte_progress(name, n_bytes, file.tell()) as show:
        source.seek(file.tell())
        while (wanted := min(_BLOCK, n_bytes - file.tell())) > 0:
            block = source.read(wanted)
            if not isinstance(block, bytes) or len(block) != wanted:  # the server ignores ranges
                raise ConnectionError(f"requested {wanted} bytes, received {len(block)}")
            file.write(block)
            show(wanted)
    try:
        _check(part, separator, n_bytes=n_bytes)
    except ConnectionError:
        part.unlink()  # the next call must not continue from damaged bytes
        raise
    return part.replace(folder / f"{Path(name).stem}.first-{n_bytes}.{version}.txt")


def _check(path: Path, separator: str, etag: str = "", n_bytes: int = 0) -> None:
    """Check a downloaded file; if `n_bytes` is above 0, first cut the file.

    The cut is after the last separator in the first `n_bytes` bytes.

    Raises:
        ConnectionError: the file has no separator, is not UTF-8, or does not match the
            SHA-256 in `etag`.
    """
    mark = separator.encode()
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ) as content:
            end = content.rfind(mark) + len(mark)
        if end < len(mark):
            raise ConnectionError(f"the downloaded file {path.name} contains no {separator}")
        if n_bytes:
            file.truncate(end)
            sync(file.fileno())
        # The etag of a large file is its SHA-256; that of a small file is a shorter git hash.
        if len(etag) == 64 and hashlib.file_digest(file, "sha256").hexdigest() != etag:
            raise ConnectionError(f"{path.name} is damaged: its SHA-256 does not match the Hub's")
    with path.open(encoding="utf-8") as text:
        try:
            while text.read(_BLOCK):
                pass
        except UnicodeDecodeError:
            raise ConnectionError(f"{path.name} is damaged: it is not UTF-8") from None
