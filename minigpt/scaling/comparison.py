"""Compare recipes by the validation losses of runs that have the same seeds.

A recipe is all settings of a run, except the seed, the name and those that depend on the machine or
the user. Runs with the same seed, data settings and context length read the same windows in the
same order. The difference of their losses then has less noise than the losses themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from minigpt.core.settings import UserError, flat
from minigpt.core.text import human_time, md_table, value_cell
from minigpt.runs.folder import Run
from minigpt.runs.names import SUMMARY
from minigpt.runs.provenance import (
    MACHINE,
    AveragedRun,
    Parent,
    averaged_runs,
    own_teachers,
    parent_of,
)
from minigpt.runs.records import read_summary
from minigpt.scaling.results import RunResult, portable

COLUMNS = ("change", "seeds", "nats/token", "difference", "standard error", "shown", "time")
NOTE = (
    "Difference: mean over the seeds that a recipe shares with the first one, in nats per token. "
    "It is empty if the validation stories or the tokenizer differ. "
    "Shown: whether it is larger than two standard errors. Time: mean training time of a run."
)
# Settings that select the validation stories.
_VALIDATION = (
    "data.source", "data.dataset", "data.subset", "data.split", "data.valid_split", "data.valid",
    "data.valid_files", "data.holdout", "data.field", "data.separator",
)  # fmt: skip
# Settings that change the tokenizer, unless both runs use the tokenizer of the same run.
_TOKENIZER = (
    "data.vocab_size", "data.tokenizer", "data.max_stories", "data.train_files",
    "data.download_tokens",
)  # fmt: skip
_IGNORED = {*MACHINE, "name", "seed", "size", "overrides"}


@dataclass(frozen=True)
class Comparison:
    """Validation losses of a recipe, and their differences from those of the first recipe."""

    change: str  # settings that differ from the first recipe; "" for the first recipe
    losses: dict[int, float]  # nats per token by seed
    # Loss minus the loss of the first recipe, for each common seed; empty for the first recipe.
    differences: tuple[float, ...]
    seconds: float | None  # mean training time of a run

    @property
    def difference(self) -> float | None:
        """Mean of `differences`, in nats per token; None if there are none."""
        return fmean(self.differences) if self.differences else None

    @property
    def standard_error(self) -> float | None:
        """Standard error of `difference`; None if there are fewer than two differences."""
        n = len(self.differences)
        return stdev(self.differences) / math.sqrt(n) if n > 1 else None

    @property
    def shown(self) -> bool | None:
        """Whether |difference| exceeds two standard errors; None if there is no standard error."""
        if self.difference is None or self.standard_error is None:
            return None
        return abs(self.difference) > 2 * self.standard_error


def compare(
    runs: Sequence[RunResult], defaults: Mapping[str, Any] | None = None
) -> list[Comparison]:
    """Group finished runs by recipe, and compare each recipe with the recipe of the first run.

    Two runs have the same recipe if all settings are equal, except the seed, the name and those
    that depend on the machine or the user.

    Args:
        runs: results of runs. Runs that are unfinished or have no final validation loss are left
            out.
        defaults: current defaults by dotted name, for settings that the config.yaml of a run lacks,
            because it was written by an earlier version.

    Returns:
        A comparison for each recipe. The recipes are in the order of their first runs.

    Raises:
        UserError: all runs are left out, or two runs have the same recipe and seed.
    """
    recipes: list[tuple[dict[str, Any], list[RunResult]]] = []
    for run in runs:
        if run.point is None or run.loss is None:
            continue
        settings = {**_without_ignored(defaults or {}), **_recipe(run.path)}
        settings = {name: value for name, value in settings.items() if value is not None}
        members = next((members for other, members in recipes if other == settings), None)
        if members is None:
            recipes.append((settings, [run]))
            continue
        if same := next((other for other in members if other.seed == run.seed), None):
            message = f"{same.path} and {run.path} have the same settings and seed: leave out one"
            raise UserError(message)
        members.append(run)
    if not recipes:
        raise UserError("no run has a final validation loss: give runs that are finished")
    base, members = recipes[0]
    first, validated = _losses(members), _validation_tokens(members)
    return [_comparison(settings, base, runs, first, validated) for settings, runs in recipes]


def _comparison(
    settings: dict[str, Any], base: dict[str, Any], members: list[RunResult],
    first: dict[int, float], validated: set[int],
) -> Comparison:  # fmt: skip
    """Compare the runs `members` of a recipe with the losses `first` of the first recipe.

    `validated` contains the numbers of validation tokens in the first recipe. Other numbers mean
    other stories or another tokenizer.
    """
    own = _validation_tokens(members)
    sizes, same_tokens = validated | own, bool(own) and own == validated
    names = [name for name in base | settings if settings.get(name) != base.get(name)]
    losses = _losses(members)
    common = [seed for seed in losses if seed in first]
    changes_loss = _changes_loss(settings, base, names, same_tokens)
    is_comparable = names and not changes_loss and len(sizes) < 2
    differences = tuple(losses[seed] - first[seed] for seed in common) if is_comparable else ()
    times = [read_summary(run.path).get("seconds") for run in members]
    seconds = [value for value in times if isinstance(value, int | float)]
    return Comparison(
        ", ".join(f"{name}={settings.get(name)}" for name in names),
        losses,
        differences,
        fmean(seconds) if seconds else None,
    )


def _changes_loss(
    settings: dict[str, Any], base: dict[str, Any], names: list[str], same_tokens: bool
) -> bool:
    """Return whether different settings make losses per token incomparable.

    They do so if other stories are used for validation, or if the tokenizer may be another one.

    Args:
        settings: settings of a recipe.
        base: settings of the first recipe.
        names: names of the settings that differ.
        same_tokens: whether the validation splits are known to have the same number of tokens,
            which another tokenizer would change.
    """
    if {*_VALIDATION} & {*names}:
        return True
    is_held_out = not (settings.get("data.valid_files") or settings.get("data.valid_split"))
    if is_held_out and {"data.train_files", "data.download_tokens"} & {*names}:
        return True  # the validation stories are a part of the training files
    tokenizer = settings.get("data.tokenizer")
    is_shared = tokenizer is not None and tokenizer == base.get("data.tokenizer")
    return bool({*_TOKENIZER} & {*names}) and not (is_shared or same_tokens)


def _validation_tokens(runs: list[RunResult]) -> set[int]:
    """Return the numbers of tokens in the validation splits, as far as the runs recorded them."""
    return {n for run in runs if isinstance(n := read_summary(run.path).get("valid_tokens"), int)}


def _losses(runs: list[RunResult]) -> dict[int, float]:
    return {run.seed: run.loss for run in runs if run.loss is not None}


def _recipe(path: Path) -> dict[str, Any]:
    """Return the settings that define the recipe of the run at `path`.

    Absolute paths are reduced to their last component.
    """
    values = portable(_without_ignored(flat(Run(path, path).config)))
    summary, record = read_summary(path), path / SUMMARY
    if (parent := parent_of(summary, record)) is not None:
        values["init_from"] = _label(parent)
    if teachers := own_teachers(summary, record):
        values["teacher.runs"] = list(map(_label, teachers))
    if averaged := averaged_runs(summary, record):
        values["averaged"] = list(map(_label, averaged))
    return values


def _without_ignored(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings, by dotted name, that belong to a recipe."""
    return {
        name: value
        for name, value in values.items()
        if name.partition(".")[0] not in _IGNORED and name != "data.cache_dir"
    }


def _label(run: Parent | AveragedRun) -> str:
    """Return a run's name and the start of its weight fingerprint, such as "small (1a2b3c4d)"."""
    return f"{run.name} ({run.weights[:8]})"


def cells(comparison: Comparison) -> list[str]:
    """Return the table cells of a recipe, in the order of `COLUMNS`."""
    shown = {True: "yes", False: "no", None: "–"}
    return [
        comparison.change or "(first recipe)",
        ", ".join(map(str, sorted(comparison.losses))),
        f"{fmean(comparison.losses.values()):.4f}",
        value_cell(comparison.difference, "+.4f"),
        value_cell(comparison.standard_error, ".4f"),
        shown[comparison.shown],
        "–" if comparison.seconds is None else human_time(comparison.seconds),
    ]


def markdown(comparisons: Sequence[Comparison]) -> str:
    """Return a Markdown table of the recipes, and a note that explains its columns."""
    return f"{md_table(COLUMNS, map(cells, comparisons))}\n\n{NOTE}\n"
