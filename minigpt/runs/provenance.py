"""Where weights come from: the commit of the code, and the run they were initialised from."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from minigpt.core.settings import UserError, build


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


@dataclass(frozen=True)
class Origin:
    """What a run tells of another whose weights it began with (`init_from`).

    The weights may have several runs behind them: what is counted, is counted over them all.
    """

    name: str  # of that run's folder
    path: str  # where it lies, if its own command is typed: runs/<name>, or a checkpoint in it
    weights: str  # their fingerprint
    tokens: int | None  # that they have seen; None: not known
    seconds: float | None  # that they were trained for
    sources: list[str]  # data.source of each run, the first one first
    commits: list[str]
    commands: list[list[str]]  # python train.py ..., as words

    def __post_init__(self) -> None:
        words = (word for command in self.commands for word in command)
        texts = (self.name, self.path, *self.sources, *self.commits, *words)
        if not all(text.isprintable() for text in texts):
            raise ValueError("holds text that cannot be printed on one line")
        if any(command[:2] != ["python", "train.py"] for command in self.commands):
            raise ValueError("holds a command that is not python train.py")
        if (self.tokens or 0) < 0 or (self.seconds or 0) < 0:
            raise ValueError("holds fewer than no tokens or seconds")


def origin(told: Mapping[str, Any], where: Path) -> Origin | None:
    """That of a run, from its summary or the hyper-parameters of its checkpoint; None: it has none.

    Raises:
        UserError: it is not what a run writes. `where` names the file.
    """
    if told.get("init_from") is None:
        return None
    if not isinstance(told["init_from"], Mapping):
        raise UserError(f"{where}: init_from is not an object: restore the file, or train again")
    return build(Origin, told["init_from"], f"{where}: init_from")
