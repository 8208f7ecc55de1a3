"""Averages of the weights of runs with the same origin.

Such weights are usually in the same basin of the loss, where their average has a lower loss than
each of them (Izmailov et al. 2018, arXiv 1803.05407; Wortsman et al. 2022, arXiv 2203.05482;
measured in docs/LOG.md, 2026-11-25).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt.core.settings import UserError, build
from minigpt.model import GPT
from minigpt.runs.checkpoint import weights_fingerprint
from minigpt.runs.folder import Run
from minigpt.runs.names import SUMMARY
from minigpt.runs.provenance import own_teachers, parent_of, portable_overrides


@dataclass(frozen=True)
class AveragedRun:
    """Record of a run whose weights were averaged with those of the exported run.

    Raises:
        ValueError: the name or an override is not printable.
    """

    name: str
    """Name of the folder of the run."""

    weights: str
    """Fingerprint of its weights, from `weights_fingerprint`."""

    overrides: list[str] | None = None
    """Overrides that the run was trained with, without paths; None means unknown."""

    def __post_init__(self) -> None:
        if not all(text.isprintable() for text in (self.name, *(self.overrides or ()))):
            raise ValueError("name and overrides must each be one line of printable text")


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
        raise UserError(
            f"{path}: the entry averaged must be a list of objects; export the run again"
        )
    return [build(AveragedRun, dict(entry), f"{path}: averaged") for entry in entries]


def average(model: GPT, run: Run, others: Sequence[str]) -> dict[str, Any]:
    """Replace the weights of `model` with their mean over `run` and `others`.

    Args:
        model: the model of `run`, changed in place.
        run: a run that was initialised from another run, its parent.
        others: paths of other runs: the parent of `run`, or runs with the same parent as `run`.

    Returns:
        The summary of the mean. `averaged` lists the other runs. The tokens and seconds are sums
        over `run` and all runs with the same parent; those of the parent are not included.

    Raises:
        UserError: `run` has no parent; one of `others` is neither this parent nor a run with the
            same parent; or its model has another shape, or weights that are already in the mean.
    """
    summary = {**run.summary, "averaged": []}
    parent = parent_of(summary, run.folder / SUMMARY)
    if parent is None:
        problem = "this run was not initialised from another run: leave this out"
        raise UserError(problem, "average")
    included = {weights_fingerprint(model)}
    for number, path in enumerate(others, start=2):
        other = Run.load(path, run.model)
        weights = weights_fingerprint(other_model := other.load_model())
        if weights in included:
            raise UserError(f"{path} is already in the mean: name each run once", "average", path)
        included.add(weights)
        if weights != parent.weights:
            origin = parent_of(other.summary, other.folder / SUMMARY)
            if origin is None or origin.weights != parent.weights:
                problem = f"{path} must be {parent.name} or a run that was initialised from it"
                raise UserError(problem, "average", path)
            _add_branch(summary, run.folder / SUMMARY, other)
        if other_model.config != model.config:
            raise UserError(f"{path} has a model of another shape: leave it out", "average", path)
        for mean, weight in zip(model.parameters(), other_model.parameters(), strict=True):
            mean.lerp_(weight, 1 / number)
        overrides = other.config.get("overrides")
        known = portable_overrides(overrides) if isinstance(overrides, list) else None
        record = AveragedRun(other.folder.name, weights, known)
        summary["averaged"].append(dataclasses.asdict(record))
    return summary


def _add_branch(summary: dict[str, Any], path: Path, branch: Run) -> None:
    """Add the tokens, seconds, commits and teachers of `branch` to the summary of the mean.

    All of these are values of its own training, without that of the common parent.

    Args:
        summary: summary of the mean, changed in place.
        path: path of the file that the summary was read from, for error messages.
        branch: the run to add.
    """
    for key in ("tokens", "seconds"):
        total, more = summary.get(key), branch.summary.get(key)
        summary[key] = None if total is None or more is None else total + more
    commits = (record.get("commit") for record in (summary, branch.summary))
    summary["commit"] = ", ".join(dict.fromkeys(", ".join(filter(None, commits)).split(", ")))
    teachers = {t.weights for t in own_teachers(summary, path)}
    of_branch = own_teachers(branch.summary, branch.folder / SUMMARY)
    if new := [dataclasses.asdict(t) for t in of_branch if t.weights not in teachers]:
        summary["teachers"] = [*(summary.get("teachers") or []), *new]
