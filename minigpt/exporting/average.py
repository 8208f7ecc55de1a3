"""Averages of the weights of runs with the same origin.

Such weights are usually in the same basin of the loss, where their average has a lower loss than
each of them (Izmailov et al. 2018, arXiv 1803.05407; Wortsman et al. 2022, arXiv 2203.05482;
measured in docs/LOG.md, 2026-11-25).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minigpt.core.settings import UserError
from minigpt.model import GPT
from minigpt.runs.checkpoint import rounded_fingerprint, weights_fingerprint
from minigpt.runs.folder import Run
from minigpt.runs.names import SUMMARY
from minigpt.runs.provenance import AveragedRun, own_teachers, parent_of, portable_overrides


def average(model: GPT, run: Run, others: Sequence[str]) -> dict[str, Any]:
    """Replace the weights of `model` with their mean over `run` and `others`.

    Args:
        model: the model of `run`, changed in place.
        run: a run that was initialised from another run, its parent.
        others: paths of other runs: the parent of `run`, or runs with the same parent as `run`.

    Returns:
        The summary of the mean. The entry `averaged` lists the other runs. The entries `tokens` and
        `seconds` are sums over `run` and `others`, but without the parent.

    Raises:
        UserError: `run` has no parent; one of `others` is neither this parent nor a run with the
            same parent; two runs have the same folder or the same weights in bfloat16; or a run
            other than the parent is itself a mean.
    """
    summary, path = {**run.summary, "averaged": []}, run.folder / SUMMARY
    parent = parent_of(summary, path)
    if parent is None:
        problem = "this run was not initialised from another run: leave this option out"
        raise UserError(problem, "average")
    _refuse_mean(run)
    folders, included = {run.folder.resolve()}, {rounded_fingerprint(model)}
    for number, name in enumerate(others, start=2):
        other = Run.load(name, run.model)
        weights = weights_fingerprint(other_model := other.load_model())
        folder, rounded = other.folder.resolve(), rounded_fingerprint(other_model)
        if folder in folders or rounded in included:
            raise UserError(f"{name} is already in the mean: give each run once", "average", name)
        folders.add(folder)
        included.add(rounded)
        if weights != parent.weights:
            origin = parent_of(other.summary, other.folder / SUMMARY)
            if origin is None or origin.weights != parent.weights:
                problem = f"{name} must be {parent.name} or a run that was initialised from it"
                raise UserError(problem, "average", name)
            _refuse_mean(other)
            _add_branch(summary, path, other)
        for mean, weight in zip(model.parameters(), other_model.parameters(), strict=True):
            mean.lerp_(weight, 1 / number)
        summary["averaged"].append(dataclasses.asdict(_record(other, weights)))
    return summary


def _refuse_mean(run: Run) -> None:
    if run.summary.get("averaged"):
        problem = f"{run.folder} is already a mean: average all of its runs in one command"
        raise UserError(problem, "average", str(run.folder))


def _record(run: Run, weights: str) -> AveragedRun:
    overrides, typed = None, run.config.get("overrides")
    if isinstance(typed, list) and all(isinstance(o, str) and o.isprintable() for o in typed):
        overrides = portable_overrides(typed)
    name = run.config.get("name") or run.folder.resolve().name
    return AveragedRun(name, weights, overrides, [run.config["data"]["source"]])


def _add_branch(summary: dict[str, Any], path: Path, branch: Run) -> None:
    """Add the tokens, seconds, commit and teachers of `branch` to the averaged model's summary.

    These values describe only the training of `branch` itself, not the training of its parent.

    Args:
        summary: summary of the averaged model, changed in place.
        path: path of the file that `summary` was read from, for error messages.
        branch: the run to add.
    """
    for key in ("tokens", "seconds"):
        total, more = summary.get(key), branch.summary.get(key)
        summary[key] = None if total is None or more is None else total + more
    commits = [record.get("commit") for record in (summary, branch.summary)]
    parts = [part for text in commits if isinstance(text, str) for part in text.split(", ")]
    summary["commit"] = ", ".join(dict.fromkeys(parts)) or None
    teachers = {t.weights for t in own_teachers(summary, path)}
    of_branch = own_teachers(branch.summary, branch.folder / SUMMARY)
    if new := [dataclasses.asdict(t) for t in of_branch if t.weights not in teachers]:
        summary["teachers"] = [*(summary.get("teachers") or []), *new]
