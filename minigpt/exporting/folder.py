"""The folder that an export is written into: what may be replaced, and replacing it whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigpt.core.files import read_json
from minigpt.core.settings import UserError

MARK = "export.json"  # says that this is an export, and which files belong to it
_ALSO = ("report.html", "evaluation*.json")  # what an evaluation may leave in one


def check_output(out: Path) -> None:
    """Raise UserError unless `out` is new, empty, or an earlier export with nothing added.

    The current folder cannot be replaced, nor one above it: programs would continue in a removed
    one.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError("is a file: give a new folder to export into", "out", str(out))
    present = {path.name for path in out.iterdir()}
    ours = {path.name for pattern in _ALSO for path in out.glob(pattern)}
    listed = read_object(out / MARK).get("files")
    if isinstance(listed, list):
        ours |= set(map(str, listed))
    foreign = sorted(present - ours if MARK in present else present)
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(
            f"holds {foreign[0]}{more}, which no export wrote: give a new folder, or move it away",
            "out",
            str(out),
        )
    if Path.cwd().is_relative_to(out.resolve()):
        raise UserError(
            f"{out.resolve()}, which an export would replace, is the current folder or above it: "
            "type cd .. first, or give another folder",
            "out",
        )


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a new folder that takes the place of `out` after the body, or disappears if it fails.

    What was at `out` is removed once the new folder is there, and put back if that never comes.
    """
    target = out.resolve()
    folder = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        folder.mkdir(parents=True)
        yield folder
        if target.exists():
            target.rename(old)
        folder.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} when there is none that can be read."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
