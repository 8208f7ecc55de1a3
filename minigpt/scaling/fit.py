"""Fit L = E + A / N^α to the loss of several model sizes, with intervals and predictions.

    >>> fit = fit_sizes([Size(138_784, (3.1, 3.2)), Size(359_488, (2.8,)), ...])
    >>> fit.loss(7_072_128)
    >>> groups = run_groups(runs)  # comparable runs, with one fit for each group

E is the irreducible loss and A / N^α the excess loss of a model with N parameters (Kaplan et al.
2020, arXiv:2001.08361; Hoffmann et al. 2022, arXiv:2203.15556, section 3.3). Hoffmann et al. also
have a term for the number of tokens. It is left out here, because all sizes of a fit are trained on
the same number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, geometric_mean
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import curve_fit

from minigpt.scaling.results import RunResult

MIN_SIZES = 4  # minimum number of sizes to fit three unknowns
REPLICATES = 500  # number of bootstrap fits
LEVEL = 0.95  # confidence level of the intervals
MAX_ALPHA = 5.0  # upper bound of α
STARTS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # values of α; the search begins at the best of them
PARAMETER_COUNTS = {  # attribute of a run: which parameters N counts
    "parameters": "all parameters",
    "non_embedding_parameters": "without embedding",
}

Array = NDArray[np.float64]


# ---------------------------------------------------------------------------- one law


class Interval(NamedTuple):
    """The central 95 % of the bootstrap replicates."""

    low: float
    high: float


@dataclass(frozen=True)
class Size:
    """The losses of all runs of one size."""

    n: int  # parameters
    losses: tuple[float, ...]  # nats per token, one for each seed

    @property
    def mean(self) -> float:
        """Mean loss over the seeds."""
        return float(np.mean(self.losses))


@dataclass(frozen=True)
class Fit:
    """A law fitted to the mean losses of several sizes; every size has the same weight."""

    sizes: tuple[Size, ...]
    e: float  # nats per token
    a: float
    alpha: float
    residual: float  # root mean square residual, nats per token
    seed_noise: float | None  # standard deviation between seeds; None if no size has two runs
    intervals: dict[str, Interval] | None  # of e, a and alpha; None if `seed_noise` is None
    deviations: Array  # scaled deviations of runs from the mean of their size, see `fit_sizes`
    replicates: Array  # [replicates, 3]: e, a, alpha; empty if `seed_noise` is None

    def loss(self, n: float) -> float:
        """Return the loss that the law predicts for `n` parameters, in nats per token."""
        return self.e + self.a * n**-self.alpha

    def interval(self, n: float, runs: int) -> Interval | None:
        """Return the 95 % interval of the mean loss of `runs` runs with `n` parameters.

        Args:
            n: number of parameters.
            runs: number of runs in the mean.

        Returns:
            The interval in nats per token; None if the seed noise is unknown, because no size in
            the fit has several runs.
        """
        if not len(self.replicates):
            return None
        e, a, alpha = self.replicates.T
        noise = np.random.default_rng(0).choice(self.deviations, (len(e), runs)).mean(1)
        return _interval(e + a * n**-alpha + noise)

    @property
    def at_limit(self) -> str | None:
        """Reason not to trust E, A and α, such as α at its bound; None if no reason is known."""
        if self.e < 1e-3:
            return "E is at its lower bound 0"
        if self.alpha > MAX_ALPHA - 1e-2:
            return f"α is at its upper bound {MAX_ALPHA:g}"
        if self.loss(self.sizes[0].n) - self.loss(self.sizes[-1].n) < 1e-3:
            return "the loss does not fall with model size"
        return None


def fit_sizes(sizes: Sequence[Size], replicates: int = REPLICATES, seed: int = 0) -> Fit:
    """Fit L = E + A / N^α by least squares, with E >= 0, A >= 0 and 0 <= α <= 5.

    N is the number of parameters. Each size contributes one value of L: the mean loss of its runs.

    The intervals of E, A and α come from a bootstrap over seeds. Resampling the runs within each
    size would not work: two runs give only three different means, and a single run gives one.
    Instead, the method pools deviations: the loss of each run minus the mean loss of its size, for
    all sizes with several runs. The deviations of a size with k runs are first multiplied by
    sqrt(k / (k − 1)). In each replicate, a size with m runs gets the loss of the fitted law plus
    the mean of m deviations, drawn at random from the pool. This method assumes equal noise at all
    sizes, and it does not test the form of the law.

    Args:
        sizes: the losses of each size, in any order.
        replicates: number of bootstrap fits.
        seed: seed of the bootstrap.

    Returns:
        The fitted law.

    Raises:
        ValueError: there are fewer than four different sizes.
    """
    sizes = tuple(sorted(sizes, key=lambda size: size.n))
    if (distinct := len({size.n for size in sizes})) < MIN_SIZES:
        raise ValueError(f"{distinct} distinct sizes are too few: at least {MIN_SIZES} are needed")
    n, means = np.array([s.n for s in sizes], float), np.array([s.mean for s in sizes])
    e, a, alpha = _fit(n, means)
    law = e + a * n**-alpha
    several = [(np.array(s.losses) - s.mean, len(s.losses)) for s in sizes if len(s.losses) > 1]
    pool, samples = np.empty(0), np.empty((0, 3))
    seed_noise = intervals = None
    if several:
        squares = sum((loss - s.mean) ** 2 for s in sizes for loss in s.losses)
        seed_noise = float(np.sqrt(squares / sum(k - 1 for _, k in several)))
        pool = np.concatenate([deviations * np.sqrt(k / (k - 1)) for deviations, k in several])
        random = np.random.default_rng(seed)
        noise = [random.choice(pool, (replicates, len(s.losses))).mean(1) for s in sizes]
        # Noise is added to the law, not to the means: residuals of the law are not seed noise.
        samples = np.array([_fit(n, law + shift, (alpha,)) for shift in np.array(noise).T])
        columns = zip(("e", "a", "alpha"), samples.T, strict=True)
        intervals = {name: _interval(column) for name, column in columns}
    residual = float(np.sqrt(np.mean((means - e - a * n**-alpha) ** 2)))
    return Fit(sizes, e, a, alpha, residual, seed_noise, intervals, pool, samples)


def _fit(n: Array, losses: Array, starts: Sequence[float] = STARTS) -> tuple[float, float, float]:
    """Return (E, A, α) of the law, fitted by least squares.

    The search begins at the best of `starts`, which are values of α. The search uses B instead of
    A. B is the excess loss at the geometric mean of the sizes, and is of order one.
    """
    middle = np.exp(np.log(n).mean())

    def law(size: Array, e: float, b: float, alpha: float) -> Array:
        return e + b * (size / middle) ** -alpha

    def linear(alpha: float) -> tuple[float, Array]:
        """Return the residual sum of squares for `alpha`, and the array [E, B, `alpha`].

        E and B are fitted by linear least squares without bounds. If E or B is negative, it is
        replaced by 0, and the residuals are computed with 0.
        """
        falling = (n / middle) ** -alpha
        (b, e), *_ = np.linalg.lstsq(np.stack([falling, np.ones_like(n)], 1), losses, rcond=None)
        start = np.array([max(e, 0.0), max(b, 0.0), alpha])
        return float(np.sum((law(n, *start) - losses) ** 2)), start

    _, first = min(map(linear, starts), key=lambda candidate: candidate[0])
    bounds = [0, 0, 0], [np.inf, np.inf, MAX_ALPHA]
    best, _ = curve_fit(law, n, losses, first, bounds=bounds, max_nfev=2000)
    e, b, alpha = map(float, best)
    return e, b * float(middle) ** alpha, alpha


def _interval(values: Array) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


# ---------------------------------------------------------------------------- predictions


@dataclass(frozen=True)
class Prediction:
    """Loss of a model size: measured, and predicted by the law fitted to all smaller sizes."""

    n: int  # parameters
    predicted: float  # nats per token
    interval: Interval | None  # of the predicted mean loss of as many runs as were measured
    measured: float  # mean loss of the runs
    above: bool | None  # whether `measured` is above `interval`; None without an interval


def predictions(sizes: Sequence[Size], replicates: int = REPLICATES) -> list[Prediction]:
    """Predict the loss of each size from all smaller sizes, if there are at least four of them.

    Args:
        sizes: the losses of each size, in any order.
        replicates: number of bootstrap fits for each prediction.
    """
    sizes = sorted(sizes, key=lambda size: size.n)
    results = []
    for i, size in enumerate(sizes[MIN_SIZES:], start=MIN_SIZES):
        fit = fit_sizes(sizes[:i], replicates)
        interval = fit.interval(size.n, len(size.losses))
        above = size.mean > interval.high if interval else None
        results.append(Prediction(size.n, fit.loss(size.n), interval, size.mean, above))
    return results


# ---------------------------------------------------------------------------- groups of runs


@dataclass(frozen=True)
class SizeResult:
    """Mean results of the finished runs of one size; a number that no run recorded is None."""

    model: str
    parameters: int
    runs: int
    perplexity: float  # geometric mean over the runs, which is exp(mean loss)
    lowest: float  # perplexity of the best run
    highest: float
    epochs: float | None
    train_loss: float | None  # nats per token
    loss: float | None
    spread: float | None  # highest − lowest validation loss of the runs; None for a single run
    rise: float | None  # final − lowest validation loss
    gap: float | None  # validation loss − training loss


@dataclass(frozen=True)
class RunGroup:
    """Comparable runs: the same data, token budget and recipe."""

    label: str
    corpus: str
    sizes: tuple[SizeResult, ...]  # smallest first
    fits: dict[str, Fit]  # by key of PARAMETER_COUNTS; empty with fewer than MIN_SIZES sizes
    predictions: tuple[Prediction, ...]  # N counts all parameters


def by_size(runs: Iterable[RunResult]) -> list[RunResult]:
    """Sort runs by parameters, tokens and seed; an unknown number comes last."""
    return sorted(
        runs, key=lambda r: (r.parameters or math.inf, r.tokens or math.inf, r.seed, str(r.path))
    )


def run_groups(runs: Iterable[RunResult], replicates: int = REPLICATES) -> list[RunGroup]:
    """Group finished runs by `RunResult.group`; fit a law to each group with at least four sizes.

    Args:
        runs: results of runs, finished or not, in any order.
        replicates: number of bootstrap fits for each law.

    Returns:
        The groups, sorted by the size of the smallest model in each group.
    """
    finished = [run for run in by_size(runs) if run.point and run.loss is not None]
    return [_run_group(runs, replicates) for _, runs in _by(finished, "group")]


def run_warnings(runs: Iterable[RunResult]) -> list[str]:
    """Return warnings about runs, such as "a, b: differ in data.batch_size"."""
    warnings, finished = [], []
    for run in by_size(runs):
        if run.point:
            finished.append(run)
        else:
            status = "no finite loss" if run.status == "finished" else run.status
            warnings.append(f"{run.name}: {status}, left out of figures and fits")
    for _, group in _by(finished, "group"):
        for _, same in _by(group, "parameters"):
            names, settings = ", ".join(run.name for run in same), [run.settings for run in same]
            keys = sorted(set().union(*settings))
            different = [k for k in keys if any(s.get(k) != settings[0].get(k) for s in settings)]
            if different:
                warnings.append(f"{names}: differ in {', '.join(different)}")
            elif len({run.seed for run in same}) < len(same):
                warnings.append(f"{names}: several have the same seed")
    return warnings


def _by(runs: Iterable[RunResult], attribute: str) -> Iterable[tuple[Any, list[RunResult]]]:
    groups: dict[Any, list[RunResult]] = {}
    for run in runs:
        groups.setdefault(getattr(run, attribute), []).append(run)
    return groups.items()


def _run_group(runs: list[RunResult], replicates: int) -> RunGroup:
    fits = {}
    for attribute in PARAMETER_COUNTS:
        groups = [(n, same) for n, same in _by(runs, attribute) if n is not None]
        sizes = [Size(n, tuple(r.loss for r in same if r.loss is not None)) for n, same in groups]
        if len(sizes) >= MIN_SIZES:
            fits[attribute] = fit_sizes(sizes, replicates)
    law = fits.get("parameters")
    predicted = tuple(predictions(law.sizes, replicates)) if law else ()
    sizes = tuple(size_result(same) for _, same in _by(runs, "parameters"))
    return RunGroup(runs[0].group, runs[0].corpus, sizes, fits, predicted)


def size_result(runs: Sequence[RunResult]) -> SizeResult:
    """Return the mean results of the finished runs of one size."""

    def mean(values: Iterable[float | None]) -> float | None:
        numbers = [value for value in values if value is not None]
        return fmean(numbers) if numbers else None

    points = [run.point for run in runs if run.point]
    perplexities = [perplexity for _, perplexity in points]
    losses = [run.loss for run in runs if run.loss is not None]
    loss, train_loss = mean(losses), mean(run.train_loss for run in runs)
    rises = [r.loss - r.best_loss for r in runs if r.loss is not None and r.best_loss is not None]
    return SizeResult(
        model=runs[0].model,
        parameters=points[0][0],
        runs=len(runs),
        perplexity=geometric_mean(perplexities),
        lowest=min(perplexities),
        highest=max(perplexities),
        epochs=mean(run.epochs for run in runs),
        train_loss=train_loss,
        loss=loss,
        spread=max(losses) - min(losses) if len(losses) > 1 else None,
        rise=mean(rises),
        gap=None if loss is None or train_loss is None else loss - train_loss,
    )
