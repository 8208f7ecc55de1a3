import re

import numpy as np
import pytest

from minigpt.scaling.fit import Size, fit_sizes, forecasts

N = (138_784, 359_488, 662_112, 1_046_656, 2_061_504, 3_404_032, 5_074_240, 7_072_128)
E, A, ALPHA = 1.2, 800.0, 0.5


def law(n: float) -> float:
    return E + A * n**-ALPHA


def noisy(spread: float, seed: int, sizes=N) -> list[Size]:
    """Two seeds of each size under 2M, one of the others, as the study has them."""
    random = np.random.default_rng(seed)
    return [
        Size(n, tuple(random.normal(law(n), spread, 2 if n < 2e6 else 1).tolist())) for n in sizes
    ]


def test_the_law_is_found_again_in_its_own_points_whatever_their_order():
    fit = fit_sizes([Size(n, (law(n),)) for n in reversed(N)])
    assert (fit.e, fit.a, fit.alpha) == pytest.approx((E, A, ALPHA), rel=1e-3)
    assert fit.residual < 1e-6
    assert fit.loss(1e9) == pytest.approx(law(1e9), rel=1e-3)
    assert fit.at_limit is None


def test_without_a_second_seed_there_is_no_interval():
    fit = fit_sizes([Size(n, (law(n),)) for n in N[:4]])
    assert (fit.intervals, fit.seed_noise, fit.interval(N[5], 1)) == (None, None, None)


def test_the_noise_of_the_seeds_is_pooled_by_hand():
    sizes = [Size(n, (law(n),)) for n in N[:3]] + [Size(N[3], (2.0, 2.2)), Size(N[4], (1.7, 1.8))]
    fit = fit_sizes(sizes, replicates=2)
    assert fit.seed_noise == pytest.approx(((2 * 0.1**2 + 2 * 0.05**2) / 2) ** 0.5)
    root = 2**0.5
    assert sorted(fit.deviations) == pytest.approx(
        [-0.1 * root, -0.05 * root, 0.05 * root, 0.1 * root]
    )


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    held = {"e": 0, "a": 0, "alpha": 0}
    for seed in range(12):
        fit = fit_sizes(noisy(0.01, seed), replicates=60)
        assert fit.intervals is not None
        for (name, (low, high)), truth in zip(fit.intervals.items(), (E, A, ALPHA), strict=True):
            assert low < high
            held[name] += low <= truth <= high
    assert min(held.values()) >= 8  # of 12; with four degrees of freedom they run a little short


def test_more_noise_makes_wider_intervals_and_the_same_seed_the_same_ones():
    few, much = (fit_sizes(noisy(spread, 1), replicates=60) for spread in (0.005, 0.02))
    assert few.intervals is not None
    assert much.intervals is not None
    widths = [high - low for low, high in few.intervals.values()]
    assert all(
        high - low > 2 * width
        for width, (low, high) in zip(widths, much.intervals.values(), strict=True)
    )
    assert fit_sizes(noisy(0.005, 1), replicates=60).intervals == few.intervals


def test_fewer_than_four_sizes_are_refused():
    with pytest.raises(ValueError, match="3 sizes"):
        fit_sizes([Size(n, (law(n), law(n))) for n in N[:3]])


def test_a_straight_line_on_log_axes_is_said_to_leave_e_unknown():
    fit = fit_sizes([Size(n, (8 * n**-0.1,)) for n in N])
    assert fit.alpha == pytest.approx(0.1, abs=0.02)
    assert fit.at_limit is not None
    assert re.search(r"\bE\b.*\b0\b", fit.at_limit)


def test_losses_that_do_not_fall_are_said_not_to():
    fit = fit_sizes([Size(n, (2.0,)) for n in N])
    assert fit.at_limit is not None
    assert "loss" in fit.at_limit
    assert not re.search("[Eα]", fit.at_limit)


def test_each_size_is_foretold_by_the_smaller_ones_and_a_bend_is_above():
    straight = noisy(0.003, 4)
    bent = [Size(s.n, tuple(loss + 0.1 * (s.n > 4e6) for loss in s.losses)) for s in straight]
    made = forecasts(bent, replicates=60)
    assert [f.n for f in made] == list(N[4:])
    assert made[2].above
    assert max(abs(f.measured - f.predicted) for f in made[:2]) < 0.02
    assert made[2].measured - made[2].predicted == pytest.approx(0.1, abs=0.02)
