"""L = E + A / N^α: loss against size, fitted, with intervals; and what smaller sizes foretell.

    >>> fit = fit_sizes([Size(138_784, (3.1, 3.2)), Size(359_488, (2.8,)), ...])
    >>> fit.loss(7_072_128)

E is what no size would learn of such text, A / N^α what this size has not (Kaplan et al. 2020;
Hoffmann et al. 2022, section 3.3, without their term for the number of tokens, which is one here).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import curve_fit

LEAST_SIZES = 4  # for three unknowns
REPLICATES = 500  # of the bootstrap
LEVEL = 0.95
STEEPEST = 5.0  # limit of α
STARTS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # of α: the best of them begins the search

Array = NDArray[np.float64]


class Interval(NamedTuple):
    """Where 95 % of the bootstrap lies."""

    low: float
    high: float


@dataclass(frozen=True)
class Size:
    """The runs of one size."""

    n: int  # parameters
    losses: tuple[float, ...]  # nats per token, one for each seed

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(np.mean(self.losses))


@dataclass(frozen=True)
class Fit:
    """The law through the mean losses of some sizes, each weighing the same."""

    sizes: tuple[Size, ...]
    e: float  # nats per token
    a: float
    alpha: float
    residual: float  # root mean square of what the law leaves, nats per token
    seed_noise: float | None  # standard deviation between seeds; None: no size has two
    intervals: dict[str, Interval] | None  # of e, a and alpha; None without seed noise
    deviations: Array  # of runs from the mean of their size, as the bootstrap draws them
    replicates: Array  # [replicates, 3]: e, a, alpha; empty without seed noise

    def loss(self, n: float) -> float:
        """Nats per token that the law gives a model of `n` parameters."""
        return self.e + self.a * n**-self.alpha

    def interval(self, n: float, runs: int) -> Interval | None:
        """Where 95 % of the bootstrap puts the mean loss of `runs` runs at `n`.

        None without seed noise.
        """
        if not len(self.replicates):
            return None
        e, a, alpha = self.replicates.T
        noise = np.random.default_rng(0).choice(self.deviations, (len(e), runs)).mean(1)
        return _interval(e + a * n**-alpha + noise)

    @property
    def at_limit(self) -> str | None:
        """Why E, A and α are not to be believed though the curve is; None: no reason."""
        if self.e < 1e-3:
            return "E is at its limit of 0: these sizes do not show where the curve levels off"
        if self.alpha > STEEPEST - 1e-2:
            return f"α is at its limit of {STEEPEST:g}: the loss falls between two sizes alone"
        if self.loss(self.sizes[0].n) - self.loss(self.sizes[-1].n) < 1e-3:
            return "the loss does not fall with size"
        return None


def fit_sizes(sizes: Sequence[Size], replicates: int = REPLICATES, seed: int = 0) -> Fit:
    """Least squares on the mean loss of each size, with E >= 0, A >= 0 and 0 <= α <= 5.

    The intervals are a bootstrap over seeds. Two runs of a size have only three different means
    to draw, and one run has none; so the deviations of all runs from the mean of their size, each
    times sqrt(k / (k − 1)) for k runs, are pooled, and every size draws as many of them as it has
    runs. That takes the noise to be alike at all sizes. It says nothing of how well the law holds.

    Raises:
        ValueError: fewer than four different sizes.
    """
    sizes = tuple(sorted(sizes, key=lambda size: size.n))
    if len({size.n for size in sizes}) < LEAST_SIZES:
        raise ValueError(f"{len(sizes)} sizes: a fit of three unknowns needs {LEAST_SIZES}")
    n, means = np.array([s.n for s in sizes], float), np.array([s.mean for s in sizes])
    e, a, alpha = _fit(n, means)
    pool = _deviations(sizes)
    drawn = np.empty((0, 3))
    if len(pool):
        random = np.random.default_rng(seed)
        noise = [random.choice(pool, (replicates, len(s.losses))).mean(1) for s in sizes]
        # Around the law, not around the means: what the law leaves is no noise of the seeds.
        law = e + a * n**-alpha
        drawn = np.array([_fit(n, law + shift, alpha) for shift in np.array(noise).T])
    return Fit(
        sizes=sizes,
        e=e,
        a=a,
        alpha=alpha,
        residual=float(np.sqrt(np.mean((means - e - a * n**-alpha) ** 2))),
        seed_noise=_seed_noise(sizes),
        intervals={
            name: _interval(column)
            for name, column in zip(("e", "a", "alpha"), drawn.T, strict=True)
        }
        if len(drawn)
        else None,
        deviations=pool,
        replicates=drawn,
    )


def _fit(n: Array, losses: Array, start: float | None = None) -> tuple[float, float, float]:
    """(E, A, α). Searched as the loss at the middle size above E, which is near one, for A."""
    middle = np.exp(np.log(n).mean())

    def law(size: Array, e: float, b: float, alpha: float) -> Array:
        return e + b * (size / middle) ** -alpha

    def begin(alpha: float) -> tuple[float, Array]:
        """Squares left over, and (E, B, α), where E and B are linear."""
        falling = (n / middle) ** -alpha
        (b, e), *_ = np.linalg.lstsq(np.stack([falling, np.ones_like(n)], 1), losses, rcond=None)
        first = np.array([max(e, 0.0), max(b, 0.0), alpha])
        return float(np.sum((law(n, *first) - losses) ** 2)), first

    starts = STARTS if start is None else (start,)
    _, first = min((begin(alpha) for alpha in starts), key=lambda tried: tried[0])
    found, _ = curve_fit(
        law, n, losses, first, bounds=([0, 0, 0], [np.inf, np.inf, STEEPEST]), max_nfev=2000
    )
    e, b, alpha = map(float, found)
    return e, b * float(middle) ** alpha, alpha


def _deviations(sizes: Sequence[Size]) -> Array:
    """What each run of a size with k > 1 runs differs from its mean, times sqrt(k / (k − 1))."""
    pools = [
        (np.array(s.losses) - s.mean) * np.sqrt(len(s.losses) / (len(s.losses) - 1))
        for s in sizes
        if len(s.losses) > 1
    ]
    return np.concatenate(pools) if pools else np.empty(0)


def _seed_noise(sizes: Sequence[Size]) -> float | None:
    """The pooled standard deviation of a run about the mean of its size."""
    freedom = sum(len(s.losses) - 1 for s in sizes)
    squares = sum((loss - s.mean) ** 2 for s in sizes for loss in s.losses)
    return float(np.sqrt(squares / freedom)) if freedom else None


def _interval(values: Array) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


# ---------------------------------------------------------------------------------- foretelling


@dataclass(frozen=True)
class Forecast:
    """A size as the law through all smaller ones foretells it."""

    n: int
    predicted: float  # nats per token
    interval: Interval | None  # of the mean of as many runs as were made
    measured: float

    @property
    def above(self) -> bool:
        """Whether it did worse than the interval allows for."""
        return self.interval is not None and self.measured > self.interval.high


def forecasts(sizes: Sequence[Size], replicates: int = REPLICATES) -> list[Forecast]:
    """Each size that has at least four smaller ones, as these foretell it; smallest first."""
    sizes = sorted(sizes, key=lambda size: size.n)
    made = []
    for i, size in enumerate(sizes[LEAST_SIZES:], start=LEAST_SIZES):
        fit = fit_sizes(sizes[:i], replicates)
        made.append(
            Forecast(size.n, fit.loss(size.n), fit.interval(size.n, len(size.losses)), size.mean)
        )
    return made
