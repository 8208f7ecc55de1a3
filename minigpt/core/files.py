"""Read untrusted small files safely, and write files atomically.

The files of a run may come from other people. The readers run no code and use bounded memory: they
accept only plain values, limit the file size and reject YAML aliases. The writers replace a file as
a whole.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import yaml

from minigpt.core.settings import MISSING, DiskFullError, UserError, make_tuples

# Errors when a disk is full or read-only, or a quota or a size limit is exceeded.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

_MEGABYTE = 1 << 20
MAX_YAML_BYTES = 1 << 16  # 50 times a config.yaml; the time to parse a long number is quadratic


def user_path(path: str | Path, argument: str | None = None) -> Path:
    """Return a path with a leading `~` or `~user` replaced by the home folder.

    Args:
        path: the path as typed by the user. A text that begins with ./~ is the path of a file whose
            name begins with ~; it becomes absolute, so that no other function expands it.
        argument: name of the argument, for the error message.

    Raises:
        UserError: the path names a user without a home folder.
    """
    if str(path).startswith("./~"):
        return Path.cwd() / path
    try:
        return Path(path).expanduser()
    except RuntimeError:
        problem = "this user has no home folder; if a file name begins with ~, put ./ before it"
        raise UserError(problem, argument, str(path)) from None


def provide_home() -> None:
    """Let libraries use a temporary folder if the home folder is missing or not writable.

    A container may run with a user id that has no name and no home folder. Matplotlib, W&B,
    fontconfig and the cache for the compiled decode.c would then fail or complain. Programs call
    this function before they import these libraries. The libraries find the temporary folder
    through the environment variables XDG_CACHE_HOME, XDG_CONFIG_HOME and XDG_DATA_HOME. A variable
    that is already set is not changed. The folder is deleted when the process exits.

    Raises:
        UserError: there is no writable temporary folder. PyTorch needs one when it is imported.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        problem = "there is no writable temporary folder, such as /tmp"
        raise UserError(f"{problem}: set the variable TMPDIR to a writable folder") from None
    try:
        if os.access(Path.home(), os.W_OK | os.X_OK):
            return
    except RuntimeError:  # the user id has no name, and HOME is not set
        os.environ["HOME"] = "/nonexistent"
    folder = tempfile.TemporaryDirectory(prefix="minigpt-", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        os.environ[name] = os.environ.get(name) or str(Path(folder.name, name))


def expand_paths(config: Any, *names: str) -> None:
    """Expand `~` in fields of a frozen dataclass.

    Args:
        config: the dataclass instance, which is changed in place.
        *names: names of the fields; the value of each is a path, a tuple of paths or None. For a
            field whose default is a tuple, see `make_tuples`.

    Raises:
        UserError: a path names a user without a home folder.
    """
    for name in names:
        if isinstance(getattr(type(config), name), tuple):
            make_tuples(config, name)
        value = getattr(config, name)
        paths = value if isinstance(value, tuple) else (value,)
        if any(path is not None and path.startswith(("~", "./~")) for path in paths):
            paths = tuple(path and str(user_path(path, name)) for path in paths)
            object.__setattr__(config, name, paths if isinstance(value, tuple) else paths[0])


def read_text(path: Path, max_bytes: int = 64 * _MEGABYTE) -> str:
    """Return the UTF-8 text of a file.

    Args:
        path: the file.
        max_bytes: maximum size of the file.

    Returns:
        The whole content of the file.

    Raises:
        ValueError: the file is larger than `max_bytes`, or not UTF-8.
        OSError: the file cannot be read, or is a folder, a pipe or a device.
    """
    if path.exists() and not path.is_file():  # reading a pipe would block forever
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"larger than {max_bytes} bytes")
    return content.decode("utf-8")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Args:
        path: the file.

    Returns:
        Plain values.

    Raises:
        ValueError: the file is not JSON, or is larger than 64 MB.
        OSError: the file cannot be read.
    """
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """Return the content of a JSON string.

    Args:
        text: the string.

    Returns:
        Plain values.

    Raises:
        ValueError: the string is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


class _PlainLoader(yaml.SafeLoader):
    """YAML loader that rejects aliases, because a kilobyte of aliases can expand to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file of plain values.

    Args:
        path: the file.

    Returns:
        The plain values.

    Raises:
        ValueError: the file is not YAML of plain values, has aliases, or is larger than 64 kB.
        OSError: the file cannot be read.
    """
    text = read_text(path, MAX_YAML_BYTES)
    try:
        return yaml.load(text, _PlainLoader)  # noqa: S506 (a safe loader)
    except Exception as error:  # PyYAML raises many types of errors, even RecursionError
        raise ValueError(str(error)) from None


def check_archive(path: Path) -> None:
    """Check that a zip archive could have been written by torch.

    Torch writes archives without compression and without folders. Reading a compressed archive
    could fill the memory. If an archive contains a folder, `torch.load` could return uninitialised
    memory.

    Args:
        path: the archive.

    Raises:
        UserError: the archive is compressed, contains folders, or unpacks to more than its size.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    folders = any(entry.external_attr & 0x10 for entry in entries)  # the MS-DOS folder attribute
    if compressed or folders or sum(e.file_size for e in entries) > path.stat().st_size:
        problem = "the archive is compressed, contains folders, or unpacks to more than its size"
        raise UserError(f"{path} is not a checkpoint: {problem}; give another file")


def refuse_links_out(folder: Path) -> None:
    """Check that no entry of a run folder or its direct subfolders is a link out of the run folder.

    Without this check, resuming a run from an unknown source could overwrite the target of a link.

    Args:
        folder: the run folder.

    Raises:
        UserError: an entry is a link to a path outside the run folder.
    """
    inside = folder.resolve()
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        try:
            is_outside = path.is_symlink() and not path.resolve().is_relative_to(inside)
        except (OSError, RuntimeError):  # links that lead to each other
            is_outside = True
        if is_outside:
            problem = f"{path} is a link to a path outside the run folder"
            raise UserError(f"{problem}: replace the link with the file itself")


def write_error(problem: str, error: Exception, argument: str, value: Any = MISSING) -> UserError:
    """Return the error for a file or a folder that cannot be written.

    Args:
        problem: start of the message, such as "cannot write this folder".
        error: the exception that was raised.
        argument: name of the argument that contains the path.
        value: value of this argument. Omit it if `problem` already contains the value.

    Returns:
        A `DiskFullError` if the disk is full or read-only, and another `UserError` otherwise.
    """
    is_full = getattr(error, "errno", None) in DISK_FULL
    problem = f"{problem} ({getattr(error, 'strerror', None) or error})"
    remedy = "free some space, or choose another folder" if is_full else "choose another folder"
    return (DiskFullError if is_full else UserError)(f"{problem}: {remedy}", argument, value)


def sync(descriptor: int) -> None:
    """Sync an open file or folder to disk, as far as the file system supports this.

    Some network and FUSE file systems do not support syncing, or support it only for files. Their
    error is ignored.

    Args:
        descriptor: descriptor of the file or folder.

    Raises:
        OSError: the sync failed, for example because the disk is full.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as JSON, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        text = json.dumps(content, indent=2)  # for the name of a file that is not in UTF-8
    write_text(path, f"{text}\n")


def write_text(path: Path, content: str) -> None:
    """Write `content` to `path` in UTF-8, atomically."""
    write_bytes(path, content.encode("utf-8"))


def write_bytes(
    path: Path, content: bytes | memoryview, move: list[tuple[Path, Path]] | None = None
) -> None:
    """Write `content` to `path` atomically.

    Args:
        path: the file, which is replaced if it exists.
        content: the bytes.
        move: pairs (old, new) of paths. Just before `path` is replaced, each `old` is renamed to
            its `new`; a missing `old` is skipped.

    Raises:
        OSError: the file cannot be written. An existing file is unchanged, and renamed files get
            their old names again. The attribute `filename` of the error is `path`.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    moved: list[tuple[Path, Path]] = []
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            sync(file.fileno())
        for old, new in move or []:
            with contextlib.suppress(FileNotFoundError):
                old.replace(new)
                moved.append((old, new))
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for old, new in reversed(moved):
                new.replace(old)
        if isinstance(error, OSError):  # the user does not know the temporary file
            error.filename, error.filename2 = str(path), None
        raise
    if os.name == "posix":  # make the renames durable as well
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            sync(folder)
        finally:
            os.close(folder)
