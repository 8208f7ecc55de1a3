"""Files of a run may come from anybody: what is read of them is bounded before it is believed.

Nothing here runs code, and no small file takes much memory: what unpacks to more than its own size,
refers to itself, or nests without end is refused with the name of the file.
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
_LARGEST = 1 << 16  # characters of settings, fifty times those of a run
_DEEPEST = 50  # groups within groups of settings
# In C where there is one: the other takes minutes for a megabyte of brackets.
_YAML: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_text(path: Path, megabytes: int = 64) -> str:
    """The UTF-8 text of a file that is small when it is honest.

    Raises:
        ValueError: it is larger than `megabytes`, or not UTF-8.
        OSError: it cannot be read, or is a folder or a device.
    """
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with path.open("rb") as file:
        content = file.read(megabytes * _MEGABYTE + 1)
    if len(content) > megabytes * _MEGABYTE:
        raise ValueError(f"larger than {megabytes} MB")
    return content.decode("utf-8")


def read_json(path: Path) -> Any:
    """What a JSON file holds. ValueError: it is none; otherwise as `read_text`."""
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """json.loads, with a ValueError in place of a RecursionError for what nests too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, without aliases. ValueError: it is none; otherwise as `read_text`.

    An alias repeats a part of the file in a few bytes, and one of aliases repeats them all: a
    kilobyte that prints as gigabytes. What a run writes has none.
    """
    text = read_text(path, megabytes=1)
    if len(text) > _LARGEST:  # some numbers take time that grows as the square of their length
        raise ValueError(f"more than {_LARGEST} characters")
    depth = 0
    try:
        for event in yaml.parse(text, _YAML):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST or isinstance(event, yaml.AliasEvent):
                raise ValueError("nested too deeply, or with aliases")
        return yaml.load(text, _YAML)  # noqa: S506 (a safe loader)
    except Exception as error:  # PyYAML answers values that are none with errors of several kinds
        raise ValueError(str(error)) from None


def check_archive(path: Path) -> None:
    """Whether a zip archive holds no more than its own size: torch packs nothing.

    Raises:
        UserError: it would unpack to more.
        OSError, zipfile.BadZipFile: it cannot be read, or is no such archive.
    """
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
    if packed or sum(part.file_size for part in parts) > path.stat().st_size:
        raise UserError(f"{path} unpacks to more than its size, as no checkpoint does: refused")


def refuse_links_out(folder: Path) -> None:
    """Nothing that a run reads or writes may lie elsewhere than it seems to.

    Whoever goes on with a run that somebody else sent would otherwise write where a link leads.

    Raises:
        UserError: a file or folder of the run `folder` is a link that leads out of it.
    """
    inside = folder.resolve()
    for path in sorted([*folder.glob("*"), *folder.glob("checkpoints/*")]):
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise UserError(
                f"{path} is a link that leads out of its run folder: put the file itself there"
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
    """Write `content` aside, and on the disk for sure; then do the renames `move`, and its own."""
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
