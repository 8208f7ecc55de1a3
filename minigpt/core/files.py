"""Read and write small files safely: files of a run may come from anybody.

What is read runs no code and takes bounded memory: plain values, a size limit, no YAML aliases.
What is written is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import yaml

from minigpt.core.settings import UserError

_MEGABYTE = 1 << 20
_MAX_YAML_BYTES = 1 << 16  # fifty times the settings of a run; long numbers take quadratic time


def user_path(path: str | Path, argument: str | None = None) -> Path:
    """Return a path that was typed, with `~` and `~user` replaced by the home folder.

    Args:
        path: what was typed.
        argument: name of the argument, for the message.

    Raises:
        UserError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        problem = "names a user without a home folder; put ./ before a name with ~"
        raise UserError(problem, argument, str(path)) from None


def expand_paths(config: Any, *names: str) -> None:
    """Expand `~` in fields of a frozen dataclass that hold a path, paths or None."""
    for name in names:
        value = getattr(config, name)
        paths = value if isinstance(value, tuple) else (value,)
        if any(path is not None and path.startswith("~") for path in paths):
            paths = tuple(path and str(user_path(path, name)) for path in paths)
            object.__setattr__(config, name, paths if isinstance(value, tuple) else paths[0])


def read_text(path: Path, max_bytes: int = 64 * _MEGABYTE) -> str:
    """Return the UTF-8 text of a file.

    Raises:
        ValueError: it is larger than `max_bytes`, or not UTF-8.
        OSError: it cannot be read, or is a folder or a device.
    """
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"larger than {max_bytes} bytes")
    return content.decode("utf-8")


def read_json(path: Path) -> Any:
    """Return what a JSON file holds. ValueError: it is not JSON; otherwise as `read_text`."""
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """Return json.loads(text), with ValueError in place of RecursionError for deep nesting."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


class _PlainLoader(yaml.SafeLoader):
    """Load plain values, without aliases: a kilobyte of those can print as gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases are not allowed")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    """Return what a YAML file of plain values holds.

    Raises:
        ValueError: it is not YAML, has aliases, or is larger than 64 kB; or as `read_text`.
        OSError: as `read_text`.
    """
    text = read_text(path, _MAX_YAML_BYTES)
    try:
        return yaml.load(text, _PlainLoader)  # noqa: S506 (a safe loader)
    except Exception as error:  # PyYAML raises errors of many kinds, RecursionError among them
        raise ValueError(str(error)) from None


def check_archive(path: Path) -> None:
    """Raise UserError if a zip archive would unpack to more than its size: torch packs nothing.

    It has no folders either: torch would return what happens to be in memory as their content.
    """
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
    folders = any(part.external_attr & 0x10 for part in parts)  # the MS-DOS attribute of a folder
    if packed or folders or sum(part.file_size for part in parts) > path.stat().st_size:
        raise UserError(f"{path} would not unpack to its own size, as checkpoints do")


def refuse_links_out(folder: Path) -> None:
    """Raise UserError if a file of the run `folder` is a link that leads out of it.

    Whoever resumes a run that somebody else sent would otherwise write where the link leads.
    """
    inside = folder.resolve()
    for path in sorted([*folder.glob("*"), *folder.glob("checkpoints/*")]):
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise UserError(
                f"{path} is a link that leads out of its run folder; put the file itself there"
            )


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON at `path`, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write `content` at `path` in UTF-8, whole or not at all."""
    write_bytes(path, content.encode("utf-8"))


def write_bytes(
    path: Path, content: bytes | memoryview, move: list[tuple[Path, Path]] | None = None
) -> None:
    """Write `content` at `path`, whole or not at all, after the renames (old, new) in `move`."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        for old, new in move or []:
            with contextlib.suppress(FileNotFoundError):
                old.replace(new)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the renames too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
