import json
import math
import re

import numpy as np
import pytest

from minigpt.scaling.fit import Size, fit_sizes, predictions, run_groups, run_warnings
from minigpt.scaling.results import find_runs
from tests.conftest import naming
from tests.run_folder import write_run
from tests.scaling.conftest import results, sized

N = (138_784, 359_488, 662_112, 1_046_656, 2_061_504, 3_404_032, 5_074_240, 7_072_128)
E, A, ALPHA = 1.2, 800.0, 0.5


def law(n: float) -> float:
    return E + A * n**-ALPHA


def noisy(spread: float, seed: int, sizes=N) -> list[Size]:
    """Two seeds of each size under 2M, one of the others."""
    random = np.random.default_rng(seed)
    return [
        Size(n, tuple(random.normal(law(n), spread, 2 if n < 2e6 else 1).tolist())) for n in sizes
    ]


def test_fit_recovers_a_law_from_its_points_in_any_order():
    fit = fit_sizes([Size(n, (law(n),)) for n in reversed(N)])
    assert (fit.e, fit.a, fit.alpha) == pytest.approx((E, A, ALPHA), rel=1e-3)
    assert fit.residual < 1e-6
    assert fit.loss(1e9) == pytest.approx(law(1e9), rel=1e-3)
    assert fit.at_limit is None


def test_fit_without_seed_noise_has_no_interval():
    fit = fit_sizes([Size(n, (law(n),)) for n in N[:4]])
    assert (fit.intervals, fit.seed_noise, fit.interval(N[5], 1)) == (None, None, None)


def test_seed_noise_is_pooled_over_the_sizes():
    sizes = [Size(n, (law(n),)) for n in N[:3]] + [Size(N[3], (2.0, 2.2)), Size(N[4], (1.7, 1.8))]
    fit = fit_sizes(sizes, replicates=2)
    assert fit.seed_noise == pytest.approx(((2 * 0.1**2 + 2 * 0.05**2) / 2) ** 0.5)
    root = 2**0.5
    assert sorted(fit.deviations) == pytest.approx(
        [-0.1 * root, -0.05 * root, 0.05 * root, 0.1 * root]
    )


def test_intervals_cover_the_true_values():
    covered = {"e": 0, "a": 0, "alpha": 0}
    for seed in range(12):
        fit = fit_sizes(noisy(0.01, seed), replicates=60)
        assert fit.intervals is not None
        for (name, (low, high)), truth in zip(fit.intervals.items(), (E, A, ALPHA), strict=True):
            assert low < high
            covered[name] += low <= truth <= high
    assert min(covered.values()) >= 8  # of 12; with four degrees of freedom they run a little short


def test_intervals_grow_with_noise_and_depend_on_the_seed_alone():
    quiet, loud = (fit_sizes(noisy(spread, 1), replicates=60) for spread in (0.005, 0.02))
    assert quiet.intervals is not None
    assert loud.intervals is not None
    widths = [high - low for low, high in quiet.intervals.values()]
    assert all(
        high - low > 2 * width
        for width, (low, high) in zip(widths, loud.intervals.values(), strict=True)
    )
    assert fit_sizes(noisy(0.005, 1), replicates=60).intervals == quiet.intervals


def test_fit_of_fewer_than_four_sizes_is_refused():
    with pytest.raises(ValueError, match=r"\b3\b.*\b4\b"):
        fit_sizes([Size(n, (law(n), law(n))) for n in N[:3]])


def test_fit_of_a_power_law_reports_the_limit_of_e():
    fit = fit_sizes([Size(n, (8 * n**-0.1,)) for n in N])
    assert fit.alpha == pytest.approx(0.1, abs=0.02)
    assert fit.at_limit is not None
    assert re.search(r"\bE\b.*\b0\b", fit.at_limit)


def test_fit_of_a_constant_loss_reports_that_it_does_not_fall():
    fit = fit_sizes([Size(n, (2.0,)) for n in N])
    assert fit.at_limit is not None
    assert "loss" in fit.at_limit
    assert not re.search("[Eα]", fit.at_limit)


def test_predictions_detect_a_bend():
    straight = noisy(0.003, 4)
    bent = [Size(s.n, tuple(loss + 0.1 * (s.n > 4e6) for loss in s.losses)) for s in straight]
    predicted = predictions(bent, replicates=60)
    assert [p.n for p in predicted] == list(N[4:])
    assert predicted[2].above
    assert max(abs(p.measured - p.predicted) for p in predicted[:2]) < 0.02
    assert predicted[2].measured - predicted[2].predicted == pytest.approx(0.1, abs=0.02)


# ---------------------------------------------------------------------------- groups of runs


def test_runs_of_one_size_are_one_result_with_mean_and_range(sweep):
    (group,) = run_groups(results(sweep))
    assert [(s.parameters, s.runs, s.perplexity, s.lowest, s.highest) for s in group.sizes] == [
        (1_046_656, 2, pytest.approx(math.sqrt(16.0 * 20.0)), 16.0, 20.0),
        (3_404_032, 1, pytest.approx(11.0), 11.0, 11.0),
        (7_072_128, 1, pytest.approx(9.0), 9.0, 9.0),
    ]
    assert (group.fits, group.predictions) == ({}, ())


def test_other_data_and_other_budgets_are_groups_of_their_own(sweep):
    write_run(sweep / "d", sized("small", 15.0), data="tinystories")
    write_run(sweep / "e", sized("small", 14.0, tokens=104_000_000))
    labels = {group.label for group in run_groups(results(sweep))}
    assert labels == {"text, 328k tokens", "tinystories, 328k tokens", "text, 104M tokens"}


def test_group_measures_epochs_gap_rise_spread_and_a_bend(study):
    (group,) = run_groups(results(study), replicates=50)
    assert [size.runs for size in group.sizes] == [2, 2, 2, 2, 1]
    assert [size.epochs for size in group.sizes] == [10] * 5
    assert [size.gap for size in group.sizes] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4], abs=0.011)
    assert [size.rise for size in group.sizes] == pytest.approx([0.03] * 5)
    assert [size.spread for size in group.sizes[:4]] == pytest.approx([0.02] * 4)
    assert group.sizes[4].spread is None
    (last,) = group.predictions
    assert last.measured - last.predicted == pytest.approx(0.19, abs=0.01)
    assert last.above is True
    assert group.fits.keys() == {"parameters", "non_embedding_parameters"}


@pytest.mark.parametrize(
    ("change", "epochs", "above"),
    [
        ({"train_tokens": None}, None, True),
        ({"train_tokens": 400_000}, 0.8192, True),
        ({"val/loss": 1.75, "val/perplexity": 5.75}, 10, False),
    ],
)
def test_group_without_a_bend_or_without_repeated_data(study, change, epochs, above):
    for run in find_runs([study]):
        if "val/loss" not in change or run.name == "w4-seed1":
            summary = json.loads((run / "summary.json").read_text())
            (run / "summary.json").write_text(json.dumps(summary | change))
    (group,) = run_groups(results(study), replicates=20)
    assert group.sizes[-1].epochs == (epochs and pytest.approx(epochs))
    assert group.predictions[-1].above is above


def test_prediction_of_one_seed_each_has_no_interval(study):
    (group,) = run_groups([run for run in results(study) if run.seed == 1])
    (last,) = group.predictions
    assert (last.interval, last.above) == (None, None)


def test_warnings_name_runs_of_one_size_that_differ_or_share_a_seed(tmp_path, study):
    assert run_warnings(results(study)) == []
    for name, seed, batch in (("a", 1, 8), ("b", 1, 8), ("c", 2, 16)):
        run = write_run(tmp_path / "more" / name, seed=seed)
        text = (run / "config.yaml").read_text() + f"  batch_size: {batch}\n"
        (run / "config.yaml").write_text(text)
    runs = results(tmp_path / "more")
    (different,), (alike,) = run_warnings(runs), run_warnings(runs[:2])
    assert re.search(naming("a, b, c", "data.batch_size"), different)
    assert "seed" not in different
    assert re.search(naming("a, b", "seed"), alike)
    assert "batch_size" not in alike


def test_warnings_name_runs_that_are_left_out(sweep):
    write_run(sweep / "nan", sized("small", math.nan))
    left_out = run_warnings(results(sweep))
    assert [line.split(",")[0] for line in left_out] == ["nan: no finite loss", "c: interrupted"]
