"""Check the output folder of an export, and replace it only if the whole export succeeds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigpt.core.files import read_json, write_error
from minigpt.core.settings import UserError

MARKER = "export.json"  # marks a folder as an export, and lists its files
_RESULTS = ("report.html", "evaluation*.json")  # of an evaluation; they may be replaced


def check_output(out: Path, sources: Iterable[Path] = ()) -> None:
    """Raise UserError unless a folder is new, empty, or an earlier export without other files.

    The export replaces the folder. So the working directory and its parent directories are not
    allowed: programs in the working directory would keep running in a directory that was removed.

    Args:
        out: the output folder.
        sources: files and folders that the export reads; `out` must not contain them.
    """
    if not out.exists():
        return
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()):
            problem = f"the export would replace {source}, which it reads: choose a new folder"
            raise UserError(problem, "out", str(out))
    if not out.is_dir():
        raise UserError("this is a file: choose a new folder", "out", str(out))
    present = {path.name for path in out.iterdir()}
    own = {path.name for pattern in _RESULTS for path in out.glob(pattern)}
    if isinstance(files := read_object(out / MARKER).get("files"), list):
        own |= set(map(str, files))
    if foreign := sorted(present - own if MARKER in present else present):
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        problem = f"this folder contains files that are not from an export ({foreign[0]}{more})"
        raise UserError(f"{problem}: choose a new folder", "out", str(out))
    if Path.cwd().is_relative_to(out.resolve()):
        problem = "cannot be replaced, because it is or contains the current folder"
        fix = "run cd .. first, or choose another folder"
        raise UserError(f"{out.resolve()} {problem}: {fix}", "out")


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder, which replaces `out` if the `with` block succeeds.

    If the block fails, the temporary folder is removed, and `out` is unchanged.

    Args:
        out: the output folder.

    Yields:
        The path of the temporary folder.

    Raises:
        UserError: the folder cannot be written.
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
        raise write_error("cannot write this folder", error, "out", str(out)) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} if the file is missing or not a JSON object."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
