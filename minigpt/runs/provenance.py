"""Where weights come from: the commit of the code, and the run they were initialised from."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt.core.settings import UserError, build


def source_commit() -> str | None:
    """The git commit of this code, with -dirty behind it when changed; None outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


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
