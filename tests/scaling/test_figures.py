import itertools
import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minigpt.core.plots import COLOURS
from minigpt.scaling.figures import BEST_LABEL, compute_figure, scaling_figure, tokens_figure
from minigpt.scaling.fit import run_groups
from minigpt.scaling.results import REFERENCE
from tests.run_folder import write_run
from tests.scaling.conftest import WIDTHS, results, sized


def points(axes: Axes) -> list[list[list[float]]]:
    """The points of each curve."""
    return [np.asarray(line.get_xydata()).tolist() for line in axes.lines]


def labels(figure: Figure) -> str:
    """All direct labels, on one line."""
    (axes,) = figure.axes
    return " ".join(" ".join(text.get_text().split()) for text in axes.texts)


def assert_no_labels_overlap(figure: Figure) -> None:
    figure.draw_without_rendering()
    boxes = [text.get_window_extent().padded(0, -1) for text in figure.axes[0].texts]
    assert len(boxes) > 3
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_scaling_figure_is_log_log_and_has_the_reference_and_our_points(sweep):
    figure = scaling_figure(run_groups(results(sweep)))
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [[model.parameters, model.perplexity] for model in REFERENCE] in points(axes)
    ours = [[1_046_656, math.sqrt(16.0 * 20.0)], [3_404_032, 11.0], [7_072_128, 9.0]]
    assert any(np.allclose(c, ours) for c in points(axes) if np.shape(c) == np.shape(ours))
    assert {"17.75", "10.23", "8.08", "17.89"} <= set(labels(figure).split())
    assert BEST_LABEL not in labels(figure)


def test_scaling_figure_has_the_best_mean_of_each_size_where_other_groups_are_better(sweep):
    for name, model, perplexity in (("x", "small", 7.5), ("y", "small", 7.0), ("z", "large", 9.5)):
        write_run(sweep / name, sized(model, perplexity, tokens=1_000_000 * len(name + model)))
    write_run(sweep / "v", sized("small", 6.5, tokens=9_000_000))
    figure = scaling_figure(run_groups(results(sweep)))
    (axes,) = figure.axes
    assert np.allclose(points(axes)[-1], [[1_046_656, 6.5]])  # and the large one is worse
    assert f"6.50 {BEST_LABEL}" in labels(figure)
    assert len({line.get_label() for line in axes.lines}) <= 4
    assert_no_labels_overlap(figure)


def test_labels_of_nearly_equal_perplexities_do_not_overlap(tmp_path):
    for tokens, perplexity in ((1_000_000, 5.80), (2_000_000, 5.85), (3_000_000, 5.79)):
        write_run(tmp_path / str(tokens), sized("large", perplexity, tokens=tokens))
    figure = scaling_figure(run_groups(results(tmp_path)))
    assert {"5.80", "5.79"} <= set(labels(figure).split())
    assert_no_labels_overlap(figure)


def test_tokens_figure_labels_runs_of_other_files(tmp_path):
    for name, files in (("a", "[/x/poems.txt]"), ("b", "[/y/code.txt]"), ("c", "[a.txt]")):
        run = write_run(tmp_path / name, sized("small", 9.0))
        with (run / "config.yaml").open("a") as config:
            config.write(f"  train_files: {files}\n")
    text = labels(tokens_figure(results(tmp_path)))
    assert text.count("small (1.05M)") == 3
    assert text.count("code.txt") == 1


def test_figures_draw_the_law_and_the_curves_of_the_runs(study):
    runs = results(study)
    (group,) = groups = run_groups(runs, replicates=20)
    law = group.fits["parameters"]
    figure = scaling_figure(groups)
    (axes,) = figure.axes
    (curve,) = (np.asarray(curve) for curve in points(axes) if len(curve) == 100)
    assert np.allclose(np.log(curve[:, 1]), [law.loss(n) for n in curve[:, 0]])
    assert f"{law.e:.2f}" in axes.get_title(loc="left")
    assert_no_labels_overlap(figure)
    for figure, x in (
        (tokens_figure(runs), 400_000),
        (compute_figure(runs), 400_000 * 6 * WIDTHS[4]),
    ):
        (axes,) = figure.axes
        assert axes.get_xscale() == "log"
        assert x in [curve[-1][0] for curve in points(axes)]
        assert [f"w{i}" in labels(figure) for i in range(5)] == [False, False, True, True, True]
        assert len({line.get_color() for line in axes.lines}) == 1 + len(COLOURS)
        assert_no_labels_overlap(figure)


def test_figures_without_a_finished_run_show_the_reference_alone():
    for figure in (scaling_figure([]), tokens_figure([]), compute_figure([])):
        assert "8.08" in labels(figure)
