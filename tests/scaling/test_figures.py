import itertools
import math

import numpy as np

from minigpt.scaling.figures import compute_figure, scaling_figure, tokens_figure
from minigpt.scaling.fit import run_groups
from minigpt.scaling.results import REFERENCE
from tests.run_folder import write_run
from tests.scaling.conftest import WIDTHS, results, sized

LABELS = ["w0, 139k", "w1, 359k", "w2, 662k", "w3, 1.05M", "w4, 2.06M"]


def test_scaling_figure_is_log_log_and_has_the_reference_and_our_points(sweep):
    (axes,) = scaling_figure(run_groups(results(sweep))).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    drawn = [np.asarray(line.get_xydata()).tolist() for line in axes.lines]
    assert [[model.parameters, model.perplexity] for model in REFERENCE] in drawn
    ours = [[1_046_656, math.sqrt(16.0 * 20.0)], [3_404_032, 11.0], [7_072_128, 9.0]]
    assert any(np.allclose(line, ours) for line in drawn if np.shape(line) == np.shape(ours))
    assert {"17.75", "10.23", "8.08", "17.89"} <= {text.get_text() for text in axes.texts}


def test_labels_of_nearly_equal_perplexities_do_not_overlap(tmp_path):
    for tokens, perplexity in ((1_000_000, 5.80), (2_000_000, 5.85), (3_000_000, 5.79)):
        write_run(tmp_path / str(tokens), sized("large", perplexity, tokens=tokens))
    figure = scaling_figure(run_groups(results(tmp_path)))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [
        text.get_window_extent()
        for text in axes.texts
        if text.get_text() in ("5.80", "5.85", "5.79")
    ]
    assert len(boxes) == 3
    for upper, lower in itertools.pairwise(sorted(boxes, key=lambda box: -box.y0)):
        assert lower.y1 <= upper.y0


def test_tokens_figure_labels_runs_of_other_files(tmp_path):
    for name, files in (("a", "[/x/poems.txt]"), ("b", "[/y/code.txt]"), ("c", "[a.txt]")):
        run = write_run(tmp_path / name, sized("small", 9.0))
        with (run / "config.yaml").open("a") as config:
            config.write(f"  train_files: {files}\n")
    (axes,) = tokens_figure(results(tmp_path)).axes
    _, *labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(labels) == 3
    assert sum("code.txt" in label for label in labels) == 1


def test_figures_draw_the_law_and_the_curves_of_the_runs(study):
    runs = results(study)
    (group,) = groups = run_groups(runs, replicates=20)
    law = group.fits["parameters"]
    (axes,) = scaling_figure(groups).axes
    drawn = [
        np.asarray(curve.get_xydata()) for curve in axes.lines if len(curve.get_xydata()) == 100
    ]
    assert len(drawn) == 1
    assert np.allclose(np.log(drawn[0][:, 1]), [law.loss(n) for n in drawn[0][:, 0]])
    for figure, x in (
        (tokens_figure(runs), 400_000),
        (compute_figure(runs), 400_000 * 6 * WIDTHS[4]),
    ):
        (axes,) = figure.axes
        assert axes.get_xscale() == "log"
        ends = [np.asarray(curve.get_xydata())[-1, 0] for curve in axes.lines]
        assert x in ends
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels == ["reference, 104M tokens", *LABELS]
