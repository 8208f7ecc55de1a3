"""Provenance of weights: code, overrides, parent run, teachers and averaged runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from minigpt.core.settings import UserError, build
from minigpt.core.typed import is_quoted, split_items

# Settings that belong to one machine or one user. They are left out of exports.
MACHINE = ("runs_dir", "resume", "logger", "callbacks")
_FOLDERS = re.compile(r"""(?<=[=,\s"'(\[{])(?:~|[A-Za-z]:)?[/\\](?:[^,()\[\]{}"']*[/\\])?""")


def source_commit() -> str:
    """Return the git commit of this code, or the package version if the commit is unknown.

    In a checkout, git reports the commit, with the suffix -dirty if files were changed. For an
    installed package, the commit is in pip's record of the installation (PEP 610). If the package
    is installed inside the repository of another project, that repository is ignored.
    """
    package = Path(__file__).resolve().parents[1]
    return _checkout_commit(package.parent) or _installed_commit(package)


def _checkout_commit(root: Path) -> str | None:
    """Return the commit of the repository at `root`, with the suffix -dirty if files were changed.

    Return None if `root` is not the root folder of this project, or if git fails.
    """
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        if project["name"] != "minigpt":
            return None
        environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        environment["GIT_CEILING_DIRECTORIES"] = str(root.parent)  # ignore outer repositories
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
    direct_url = json.loads(distribution.read_text("direct_url.json") or "{}")
    same = Path(str(distribution.locate_file("minigpt"))).resolve() == package
    commit: str | None = direct_url.get("vcs_info", {}).get("commit_id") if same else None
    return commit or distribution.version


def portable_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a run, without what belongs to one machine or one user.

    Overrides of `runs_dir`, `resume`, `logger`, `callbacks` and `data.cache_dir` are removed. An
    override of `data.dataset` is removed if its value is an absolute path or begins with ~/. In all
    other overrides, paths that are absolute or begin with ~/ are reduced to their last component.

    Args:
        overrides: the overrides as typed, such as "model=large".

    Returns:
        The remaining overrides, in the same order.
    """
    typed = [o for o in overrides if re.split(r"[./=@]", o.lstrip("+~"))[0] not in MACHINE]
    # The name of a local dataset could be that of another dataset on the Hub.
    excluded = re.compile(r"\+*(data\.cache_dir=|data\.dataset=['\"]?(~|[A-Za-z]:)?[/\\])")
    return [_portable(o) for o in typed if not excluded.match(o)]


def _portable(override: str) -> str:
    """Return an override in which absolute paths and ~ paths are cut to their last component."""
    key, equals, value = override.partition("=")
    if value.startswith("{") or re.search(r"(?<!\\)\$\{", value):  # a dict, or with a reference
        return _FOLDERS.sub("", override)
    if not (value.startswith("[") and value.endswith("]")):
        return f"{key}{equals}{_file_name(value)}"
    return f"{key}=[{','.join(map(_file_name, split_items(value[1:-1])))}]"


def _file_name(text: str) -> str:
    """Return the last component of `text` if it is an absolute path or begins with ~, else `text`.

    Quotes around `text` are kept.
    """
    quote, path = (text[0], text[1:-1]) if is_quoted(text) else ("", text)
    absolute = re.match(r"(~[^/\\]*|[A-Za-z]:)?[/\\]", path)
    return quote + (re.split(r"[/\\]", path.rstrip("/\\"))[-1] if absolute else path) + quote


@dataclass(frozen=True)
class Parent:
    """Record that a run stores about its parent run or about one of its teachers.

    The parent run, which the setting `init_from` names, provides the initial weights. Here, the
    parent run or teacher is called the recorded run. `name` and `weights` are those of the recorded
    run alone. All other fields also include its ancestors: its own parent run, the parent of that
    parent, and so on.

    Raises:
        ValueError: the name or a source is not printable, or a number is negative.
    """

    name: str
    """Name of the run folder of the parent run or teacher."""

    weights: str
    """Fingerprint of the weights, from `weights_fingerprint`."""

    tokens: int | None
    """Number of tokens that the weights were trained on; None means unknown."""

    seconds: float | None
    """Training time of the weights in seconds; None means unknown."""

    sources: list[str]
    """Value of the setting `data.source` in each run that trained the weights, oldest first."""

    teachers: list[Parent] = field(default_factory=list)
    """Teachers of the run and of its ancestors, and the teachers of these teachers, each once."""

    def __post_init__(self) -> None:
        if not all(text.isprintable() for text in (self.name, *self.sources)):
            raise ValueError("name and sources must each be one line of printable text")
        if (self.tokens or 0) < 0 or (self.seconds or 0) < 0:
            raise ValueError("tokens and seconds must not be negative")


@dataclass(frozen=True)
class AveragedRun:
    """Record of a run whose weights were averaged with those of the exported run.

    Raises:
        ValueError: the name, an override or a source is not printable.
    """

    name: str
    """Name of the folder of the run."""

    weights: str
    """Fingerprint of the weights of the run, from `weights_fingerprint`."""

    overrides: list[str] | None = None
    """Overrides of the run, as `portable_overrides` returns them; None means unknown."""

    sources: list[str] = field(default_factory=list)
    """Value of the setting `data.source` of the run itself, as a list with one item. The sources of
    the parent run are not included. An empty list means unknown."""

    def __post_init__(self) -> None:
        texts = self.name, *(self.overrides or ()), *self.sources
        if not all(text.isprintable() for text in texts):
            raise ValueError("name, overrides and sources must each be one line of printable text")


def averaged_runs(summary: Mapping[str, Any], path: Path) -> list[AveragedRun]:
    """Return the runs whose weights were averaged with those of an exported run.

    Args:
        summary: summary of the export.
        path: path of the file with the summary, for error messages.

    Raises:
        UserError: an entry is not a valid record.
    """
    entries = summary.get("averaged") or []
    if entries is True:  # exports of earlier versions, averaged with the parent
        parent = parent_of(summary, path)
        return [] if parent is None else [AveragedRun(parent.name, parent.weights)]
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise UserError(f"{path}: 'averaged' must be a list of JSON objects: export the run again")
    return [build(AveragedRun, dict(entry), f"{path}: averaged") for entry in entries]


def parent_of(record: Mapping[str, Any], path: Path) -> Parent | None:
    """Return the record of a run's parent, from the summary or the checkpoint of the run.

    Keys that `Parent` does not have, such as the ancestors' commands in records of earlier
    versions, are ignored.

    Args:
        record: summary of a run, or hyper-parameters in its checkpoint. The parent is under the
            key `init_from`.
        path: path of the file with the record, for error messages.

    Returns:
        The parent; None for a run that started from random weights.

    Raises:
        UserError: the entry is not a valid record of a parent.
    """
    entry = record.get("init_from")
    return None if entry is None else _record(entry, f"{path}: init_from")


def teachers_of(record: Mapping[str, Any], path: Path) -> list[Parent]:
    """Return all teachers that the weights of a run have learned from, each once.

    These are the teachers of the run and of its ancestors, and the teachers of these teachers.

    Args:
        record: summary of a run, or hyper-parameters in its checkpoint. The run's own teachers are
            under the key `teachers`, and the parent is under `init_from`.
        path: path of the file with the record, for error messages.

    Raises:
        UserError: an entry is not a valid record.
    """
    own, parent = own_teachers(record, path), parent_of(record, path)
    return _distinct([*with_their_teachers(own), *(parent.teachers if parent else [])])


def with_their_teachers(teachers: Iterable[Parent]) -> list[Parent]:
    """Return the records of teachers and of those that these have learned from, each once."""
    own = list(teachers)
    return _distinct([*own, *(t for teacher in own for t in teacher.teachers)])


def own_teachers(record: Mapping[str, Any], path: Path) -> list[Parent]:
    """Return the teachers that a run was trained with.

    The teachers of the run's ancestors are left out, and so are the teachers of its own teachers.
    The arguments and the errors are those of `teachers_of`.
    """
    entries = record.get("teachers") or []
    if not isinstance(entries, list):
        raise UserError(f"{path}: 'teachers' must be a list: restore the file, or train again")
    return [_record(entry, f"{path}: teachers") for entry in entries]


def _record(entry: Any, where: str) -> Parent:
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: a record is not a JSON object: restore the file, or train again")
    names = {field.name for field in fields(Parent)}
    return build(Parent, {name: entry[name] for name in entry if name in names}, where)


def _distinct(teachers: Iterable[Parent]) -> list[Parent]:
    """Return one record for each teacher, without the records of its own teachers."""
    by_weights = {t.weights: replace(t, teachers=[]) for t in teachers}
    return list(by_weights.values())


def total_tokens(teachers: Iterable[Parent]) -> int | None:
    """Return the sum of the teachers' training tokens; None if one of them is unknown.

    The tokens of an ancestor that two teachers share are counted for both.
    """
    counts = [teacher.tokens for teacher in teachers]
    return None if None in counts else sum(n for n in counts if n is not None)
