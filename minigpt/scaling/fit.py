"""Fit L = E + A / N^α to the loss of several model sizes, with intervals and predictions.

    >>> fit = fit_sizes([Size(138_784, (3.1, 3.2)), Size(359_488, (2.8,)), ...])
    >>> fit.loss(7_072_128)
    >>> groups = run_groups(runs)  # the fits of all runs, one for each group that can be compared

E is the irreducible loss and A / N^α the excess of a finite size (Kaplan et al. 2020; Hoffmann et
al. 2022, section 3.3, without their term for the number of tokens, which is one number here).
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

MIN_SIZES = 4  # for three unknowns
REPLICATES = 500  # of the bootstrap
LEVEL = 0.95
MAX_ALPHA = 5.0
STARTS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # values of α; the search begins at the best of them
COUNTED = {  # attribute of a run: how its N is counted
    "parameters": "all parameters",
    "non_embedding_parameters": "without the embedding",
}

Array = NDArray[np.float64]


# ---------------------------------------------------------------------------- one law


class Interval(NamedTuple):
    """Limits between which 95 % of the bootstrap replicates lie."""

    low: float
    high: float


@dataclass(frozen=True)
class Size:
    """The losses of the runs of one size."""

    n: int  # parameters
    losses: tuple[float, ...]  # nats per token, one for each seed

    @property
    def mean(self) -> float:
        """Mean loss over the seeds."""
        return float(np.mean(self.losses))


@dataclass(frozen=True)
class Fit:
    """The law through the mean losses of some sizes, all of the same weight."""

    sizes: tuple[Size, ...]
    e: float  # nats per token
    a: float
    alpha: float
    residual: float  # root mean square residual, nats per token
    seed_noise: float | None  # standard deviation between seeds; None: no size has two
    intervals: dict[str, Interval] | None  # of e, a and alpha; None without seed noise
    deviations: Array  # of runs from the mean of their size, as the bootstrap samples them
    replicates: Array  # [replicates, 3]: e, a, alpha; empty without seed noise

    def loss(self, n: float) -> float:
        """Return the loss of a model of `n` parameters by the law, nats per token."""
        return self.e + self.a * n**-self.alpha

    def interval(self, n: float, runs: int) -> Interval | None:
        """Return the 95 % interval of the mean loss of `runs` runs at `n` parameters.

        None without seed noise.
        """
        if not len(self.replicates):
            return None
        e, a, alpha = self.replicates.T
        noise = np.random.default_rng(0).choice(self.deviations, (len(e), runs)).mean(1)
        return _interval(e + a * n**-alpha + noise)

    @property
    def at_limit(self) -> str | None:
        """The limit that the fit has reached, so that E, A and α mean little; None: none."""
        if self.e < 1e-3:
            return "E is at its limit 0"
        if self.alpha > MAX_ALPHA - 1e-2:
            return f"α is at its limit {MAX_ALPHA:g}"
        if self.loss(self.sizes[0].n) - self.loss(self.sizes[-1].n) < 1e-3:
            return "the loss does not fall with size"
        return None


def fit_sizes(sizes: Sequence[Size], replicates: int = REPLICATES, seed: int = 0) -> Fit:
    """Fit by least squares on the mean loss of each size, with E >= 0, A >= 0 and 0 <= α <= 5.

    The intervals are a bootstrap over seeds. Two runs of a size have only three different means
    to sample, and one run has none. So the deviations of all runs from the mean of their size,
    each times sqrt(k / (k − 1)) for k runs, are pooled, and every size samples as many of them as
    it has runs. That assumes the same noise at all sizes, and does not test the law itself.

    Raises:
        ValueError: fewer than four different sizes.
    """
    sizes = tuple(sorted(sizes, key=lambda size: size.n))
    if len({size.n for size in sizes}) < MIN_SIZES:
        raise ValueError(f"{len(sizes)} sizes: a fit of three unknowns needs {MIN_SIZES}")
    n, means = np.array([s.n for s in sizes], float), np.array([s.mean for s in sizes])
    e, a, alpha = _fit(n, means)
    deviations = _deviations(sizes)
    samples = np.empty((0, 3))
    if len(deviations):
        random = np.random.default_rng(seed)
        noise = [random.choice(deviations, (replicates, len(s.losses))).mean(1) for s in sizes]
        # Around the law and not around the means: residuals of the law are no noise of seeds.
        law = e + a * n**-alpha
        samples = np.array([_fit(n, law + shift, alpha) for shift in np.array(noise).T])
    columns = zip(("e", "a", "alpha"), samples.T, strict=True)
    return Fit(
        sizes=sizes,
        e=e,
        a=a,
        alpha=alpha,
        residual=float(np.sqrt(np.mean((means - e - a * n**-alpha) ** 2))),
        seed_noise=_seed_noise(sizes),
        intervals={k: _interval(column) for k, column in columns} if len(samples) else None,
        deviations=deviations,
        replicates=samples,
    )


def _fit(n: Array, losses: Array, start: float | None = None) -> tuple[float, float, float]:
    """Return (E, A, α).

    The search has B, the excess at the middle size, in place of A, as B is near one.
    """
    middle = np.exp(np.log(n).mean())

    def law(size: Array, e: float, b: float, alpha: float) -> Array:
        return e + b * (size / middle) ** -alpha

    def linear(alpha: float) -> tuple[float, Array]:
        """Return the sum of squares and (E, B, α), where E and B are the best for this α."""
        falling = (n / middle) ** -alpha
        (b, e), *_ = np.linalg.lstsq(np.stack([falling, np.ones_like(n)], 1), losses, rcond=None)
        start = np.array([max(e, 0.0), max(b, 0.0), alpha])
        return float(np.sum((law(n, *start) - losses) ** 2)), start

    starts = STARTS if start is None else (start,)
    _, first = min((linear(alpha) for alpha in starts), key=lambda candidate: candidate[0])
    best, _ = curve_fit(
        law, n, losses, first, bounds=([0, 0, 0], [np.inf, np.inf, MAX_ALPHA]), max_nfev=2000
    )
    e, b, alpha = map(float, best)
    return e, b * float(middle) ** alpha, alpha


def _deviations(sizes: Sequence[Size]) -> Array:
    """Return the deviation of each run from the mean of its k > 1 runs, times sqrt(k / (k − 1))."""
    pools = [
        (np.array(s.losses) - s.mean) * np.sqrt(len(s.losses) / (len(s.losses) - 1))
        for s in sizes
        if len(s.losses) > 1
    ]
    return np.concatenate(pools) if pools else np.empty(0)


def _seed_noise(sizes: Sequence[Size]) -> float | None:
    """Return the pooled standard deviation of a run about the mean of its size."""
    freedom = sum(len(s.losses) - 1 for s in sizes)
    squares = sum((loss - s.mean) ** 2 for s in sizes for loss in s.losses)
    return float(np.sqrt(squares / freedom)) if freedom else None


def _interval(values: Array) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


# ---------------------------------------------------------------------------- predictions


@dataclass(frozen=True)
class Prediction:
    """The loss of a size as predicted by the law through all smaller ones, nats per token."""

    n: int
    predicted: float
    interval: Interval | None  # of the mean of as many runs as were measured
    measured: float

    @property
    def above(self) -> bool | None:
        """Whether the measured loss is above the interval; None without one."""
        return None if self.interval is None else self.measured > self.interval.high


def predictions(sizes: Sequence[Size], replicates: int = REPLICATES) -> list[Prediction]:
    """Predict each size that has at least four smaller ones from these; smallest first."""
    sizes = sorted(sizes, key=lambda size: size.n)
    results = []
    for i, size in enumerate(sizes[MIN_SIZES:], start=MIN_SIZES):
        fit = fit_sizes(sizes[:i], replicates)
        interval = fit.interval(size.n, len(size.losses))
        results.append(Prediction(size.n, fit.loss(size.n), interval, size.mean))
    return results


# ---------------------------------------------------------------------------- groups of runs


@dataclass(frozen=True)
class SizeResult:
    """The finished runs of one size in a group, on average. None: no run has the number."""

    model: str
    parameters: int
    runs: int
    perplexity: float  # geometric mean over the runs, that is, of their mean loss
    lowest: float  # perplexity of the best run
    highest: float
    epochs: float | None
    train_loss: float | None  # nats per token
    loss: float | None
    spread: float | None  # highest − lowest validation loss of the runs; None: there is one run
    rise: float | None  # of the validation loss, from its lowest to the end

    @property
    def gap(self) -> float | None:
        """Validation loss − training loss, nats per token."""
        if self.loss is None or self.train_loss is None:
            return None
        return self.loss - self.train_loss


@dataclass(frozen=True)
class RunGroup:
    """Runs that can be compared: the same data, token budget and recipe."""

    label: str
    corpus: str
    sizes: tuple[SizeResult, ...]  # smallest first
    fits: dict[str, Fit]  # by a key of COUNTED; empty with fewer than MIN_SIZES sizes
    predictions: tuple[Prediction, ...]  # by all parameters


def by_size(runs: Iterable[RunResult]) -> list[RunResult]:
    """Sort runs by parameters, tokens and seed; unknown sizes come last."""
    return sorted(runs, key=lambda r: (r.parameters or math.inf, r.tokens, r.seed, str(r.path)))


def run_groups(runs: Iterable[RunResult], replicates: int = REPLICATES) -> list[RunGroup]:
    """Group the finished runs by `RunResult.group`, and fit each group of at least four sizes."""
    finished = [run for run in by_size(runs) if run.point and run.loss is not None]
    return [
        _run_group(label, members, replicates) for label, members in _by(finished, "group").items()
    ]


def run_warnings(runs: Iterable[RunResult]) -> list[str]:
    """Return what is wrong with some of the runs, such as "a, b: differ in data.batch_size"."""
    warnings, finished = [], []
    for run in by_size(runs):
        if run.point:
            finished.append(run)
        else:
            status = "no finite loss" if run.status == "finished" else run.status
            warnings.append(f"{run.name}: {status}, not in figures and fits")
    for group in _by(finished, "group").values():
        for same in _by(group, "parameters").values():
            names, settings = ", ".join(run.name for run in same), [run.settings for run in same]
            different = [
                key
                for key in sorted({key for values in settings for key in values})
                if any(values.get(key) != settings[0].get(key) for values in settings)
            ]
            if different:
                warnings.append(f"{names}: differ in {', '.join(different)}")
            elif len({run.seed for run in same}) < len(same):
                warnings.append(f"{names}: some have the same seed")
    return warnings


def _by(runs: Iterable[RunResult], attribute: str) -> dict[Any, list[RunResult]]:
    groups: dict[Any, list[RunResult]] = {}
    for run in runs:
        groups.setdefault(getattr(run, attribute), []).append(run)
    return groups


def _run_group(label: str, runs: list[RunResult], replicates: int) -> RunGroup:
    fits = {}
    for counted in COUNTED:
        sizes = [
            Size(n, tuple(run.loss for run in same if run.loss is not None))
            for n, same in _by(runs, counted).items()
            if n is not None
        ]
        if len(sizes) >= MIN_SIZES:
            fits[counted] = fit_sizes(sizes, replicates)
    law = fits.get("parameters")
    return RunGroup(
        label=label,
        corpus=runs[0].corpus,
        sizes=tuple(map(_size_result, _by(runs, "parameters").values())),
        fits=fits,
        predictions=tuple(predictions(law.sizes, replicates)) if law else (),
    )


def _size_result(runs: list[RunResult]) -> SizeResult:
    def mean(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    points = [run.point for run in runs if run.point]
    perplexities = [perplexity for _, perplexity in points]
    losses = [run.loss for run in runs if run.loss is not None]
    return SizeResult(
        model=runs[0].model,
        parameters=points[0][0],
        runs=len(runs),
        perplexity=geometric_mean(perplexities),
        lowest=min(perplexities),
        highest=max(perplexities),
        epochs=mean(run.epochs for run in runs),
        train_loss=mean(run.train_loss for run in runs),
        loss=mean(losses),
        spread=max(losses) - min(losses) if len(losses) > 1 else None,
        rise=mean(
            run.loss - run.best_loss
            for run in runs
            if run.loss is not None and run.best_loss is not None
        ),
    )
