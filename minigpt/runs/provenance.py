"""Where weights come from: the commit of the code, what was typed, and the parent run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from minigpt.core.settings import UserError, build

# Settings of the machine that a run was trained on, which no copy of it needs.
MACHINE = ("runs_dir", "resume", "logger", "callbacks")
_FOLDERS = re.compile(r"""(?<=[=,\s"'(\[{])(?:~|[A-Za-z]:)?[/\\](?:[^,()\[\]{}"']*[/\\])?""")


def source_commit() -> str:
    """Return the git commit of this code, or its version where the commit is not known.

    A checkout is asked through git, and its commit ends in -dirty if files were changed. An
    installed copy knows the commit that pip installed it from (PEP 610). The repository of
    somebody else that surrounds it, such as a project with a virtual environment in it, does not
    count.
    """
    package = Path(__file__).resolve().parents[1]
    return _checkout_commit(package.parent) or _installed_commit(package)


def _checkout_commit(root: Path) -> str | None:
    """Return what git says of the repository at `root`; None if that is not this project's."""
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        if project["name"] != "minigpt":
            return None
        environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        environment["GIT_CEILING_DIRECTORIES"] = str(root.parent)  # look no higher than `root`
        command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        process = subprocess.run(  # noqa: S603
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=10
        )
    except (OSError, ValueError, KeyError, TypeError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None


def _installed_commit(package: Path) -> str:
    try:
        distribution = metadata.distribution("minigpt")
    except metadata.PackageNotFoundError:
        return "unknown"
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    same = Path(str(distribution.locate_file("minigpt"))).resolve() == package
    commit: str | None = origin.get("vcs_info", {}).get("commit_id") if same else None
    return commit or distribution.version


def portable_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a run as they were typed, without what is about its machine.

    Settings of logging and of places are left out; of an absolute path only the last name stays.
    """
    kept = [o for o in overrides if re.split(r"[./=@]", o.lstrip("+~"))[0] not in MACHINE]
    return [_FOLDERS.sub("", o) for o in kept if not o.lstrip("+").startswith("data.cache_dir=")]


@dataclass(frozen=True)
class Parent:
    """The run whose weights another run was initialised with (`init_from`).

    Tokens, seconds and sources include those of the parent's own parents.
    """

    name: str
    """Name of the run's folder."""

    weights: str
    """Fingerprint of the weights."""

    tokens: int | None
    """Tokens that the weights were trained on; None if not known."""

    seconds: float | None
    """Time that the weights were trained for; None if not known."""

    sources: list[str]
    """Every `data.source` that the weights were trained on, in order."""

    def __post_init__(self) -> None:
        if not all(text.isprintable() for text in (self.name, *self.sources)):
            raise ValueError("name and sources must be printable text on one line")
        if (self.tokens or 0) < 0 or (self.seconds or 0) < 0:
            raise ValueError("tokens and seconds must not be negative")


def parent_of(record: Mapping[str, Any], path: Path) -> Parent | None:
    """Return the parent in a run's summary or in the hyper-parameters of its checkpoint.

    Entries that earlier versions wrote, such as the commands of all ancestors, are ignored.

    Args:
        record: what was read, with the parent under the key `init_from`.
        path: the file it was read from, for messages.

    Returns:
        The parent; None for a run that began with random weights.

    Raises:
        UserError: the entry is not what a run writes.
    """
    entry = record.get("init_from")
    if entry is None:
        return None
    if not isinstance(entry, Mapping):
        raise UserError(f"{path}: init_from is not an object: restore the file, or train again")
    names = {field.name for field in fields(Parent)}
    known = {name: value for name, value in entry.items() if name in names}
    return build(Parent, known, f"{path}: init_from")
