"""Runs that can be compared, taken together: sizes, fits, and whether repetition bends the curve.

Perplexities compare only on the same text, cut into the same tokens, after as many of them: there
is one line, and one fit, for each data source, token budget and recipe.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from minigpt.scaling.fit import (
    LEAST_SIZES,
    REPLICATES,
    Fit,
    Forecast,
    Size,
    fit_sizes,
    forecasts,
)
from minigpt.scaling.results import RunResult

COUNTED = {  # attribute of a run: what is counted
    "parameters": "all parameters",
    "non_embedding_parameters": "without the embedding",
}


@dataclass(frozen=True)
class SizeResult:
    """The finished runs of one size on a line, on average. None: not known of any of them."""

    model: str
    parameters: int
    runs: int
    epochs: float | None
    train_loss: float | None  # nats per token
    loss: float | None
    spread: float | None  # of the validation loss over the runs; None: there is one
    rise: float | None  # of the validation loss, from its lowest to the end

    @property
    def gap(self) -> float | None:
        """Validation loss − training loss."""
        if self.loss is None or self.train_loss is None:
            return None
        return self.loss - self.train_loss


@dataclass(frozen=True)
class Line:
    """What the runs of one data source, budget and recipe say together."""

    label: str
    sizes: tuple[SizeResult, ...]  # smallest first
    fits: dict[str, Fit]  # by what is counted, as in COUNTED; empty with too few sizes
    forecasts: tuple[Forecast, ...]  # by all parameters

    @property
    def no_fit(self) -> str:
        """Why there is no fit, in one line."""
        return (
            f"{self.label}: no fit, as three unknowns need at least {LEAST_SIZES} sizes and "
            f"{len(self.sizes)} finished: python train.py -m experiment=scaling trains eight"
        )

    @property
    def verdict(self) -> str:
        """Whether repetition of the data bends the curve, as far as these runs can tell."""
        epochs = max((s.epochs for s in self.sizes if s.epochs is not None), default=None)
        if epochs is None:
            return "How often these runs saw their stories was not recorded."
        if epochs <= 1:
            return "No story was seen twice: repetition plays no part."
        seen = f"The training stories were seen {epochs:.1f} times."
        small, large = self.sizes[0], self.sizes[-1]
        grows = small.gap is not None and large.gap is not None and large.gap > small.gap
        if small.gap is not None and large.gap is not None:
            both = f" and {large.gap:+.3f} for {large.model}" if large is not small else ""
            seen += (
                f" Validation loss less training loss is {small.gap:+.3f} nats for {small.model}"
                f"{both}."
            )
        if not self.forecasts:
            return f"{seen} With fewer than {LEAST_SIZES + 1} sizes none is foretold by the others."
        last = self.forecasts[-1]
        off = last.measured - last.predicted
        seen += f" {large.model} came out {off:+.3f} nats from what the smaller sizes foretell"
        if last.interval is None:
            return f"{seen}; without a second seed, whether that is chance cannot be said."
        if not last.above:
            return f"{seen}, which is not above the interval: no bend shows here."
        if grows:
            return f"{seen}, above the interval, and the gap grows: repetition bends the curve."
        return f"{seen}, above the interval, but the gap does not grow: not for the repetition."


def by_size(runs: Iterable[RunResult]) -> list[RunResult]:
    """Smallest model first, then fewest tokens, then by seed; unknown sizes last."""
    return sorted(runs, key=lambda r: (r.parameters or math.inf, r.tokens, r.seed, str(r.path)))


def study_lines(runs: Iterable[RunResult], replicates: int = REPLICATES) -> list[Line]:
    """The finished runs line by line, each fitted where it has four sizes."""
    groups: dict[str, list[RunResult]] = {}
    for run in by_size(runs):
        if run.point and run.loss is not None:
            groups.setdefault(run.line, []).append(run)
    return [_line(label, group, replicates) for label, group in groups.items()]


def doubts(runs: Iterable[RunResult]) -> list[str]:
    """Runs of one size on one line that are not seeds of one recipe, a sentence for each."""
    sizes: dict[tuple[str, int | None], list[RunResult]] = {}
    for run in by_size(runs):
        if run.point:
            sizes.setdefault((run.line, run.parameters), []).append(run)
    found = []
    for same in sizes.values():
        names, first = ", ".join(run.name for run in same), same[0].settings
        changed = {
            key
            for run in same
            for key in first | run.settings
            if run.settings.get(key) != first.get(key)
        }
        if changed:
            found.append(f"{names} are taken together, but differ in {', '.join(sorted(changed))}.")
        elif len({run.seed for run in same}) < len(same):
            found.append(f"{names} are taken together, but some have the same seed.")
    return found


def _line(label: str, runs: list[RunResult], replicates: int) -> Line:
    sizes = _sizes(runs, "parameters")
    fits, foretold = {}, []
    if len(sizes) >= LEAST_SIZES:
        fits = {
            counted: fit_sizes(found, replicates)
            for counted in COUNTED
            if len(found := _sizes(runs, counted)) >= LEAST_SIZES
        }
        foretold = forecasts(sizes, replicates)
    return Line(label, tuple(map(_size_result, _grouped(runs))), fits, tuple(foretold))


def _grouped(runs: list[RunResult]) -> list[list[RunResult]]:
    sizes: dict[int | None, list[RunResult]] = {}
    for run in runs:
        sizes.setdefault(run.parameters, []).append(run)
    return list(sizes.values())


def _sizes(runs: list[RunResult], counted: str) -> list[Size]:
    losses: dict[int, list[float]] = {}
    for run in runs:
        n = getattr(run, counted)
        if n is not None and run.loss is not None:
            losses.setdefault(n, []).append(run.loss)
    return [Size(n, tuple(found)) for n, found in losses.items()]


def _size_result(runs: list[RunResult]) -> SizeResult:
    def mean(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    losses = [run.loss for run in runs if run.loss is not None]
    return SizeResult(
        model=runs[0].model,
        parameters=runs[0].parameters or 0,
        runs=len(runs),
        epochs=mean(run.epochs for run in runs),
        train_loss=mean(run.train_loss for run in runs),
        loss=mean(run.loss for run in runs),
        spread=max(losses) - min(losses) if len(losses) > 1 else None,
        rise=mean(
            run.loss - run.best_loss
            for run in runs
            if run.loss is not None and run.best_loss is not None
        ),
    )
