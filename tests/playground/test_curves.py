"""Loss curves of runs as SVG."""

import math
import re

from minigpt.playground.curves import LEFT, WIDTH, Curve, curve_svg, metrics, run_curve
from tests.run_folder import HEADER, write_run


def test_curve_reads_metrics_again_only_if_they_change(tmp_path):
    folder = write_run(tmp_path / "run")
    assert metrics(folder) is metrics(folder)
    curve = run_curve(folder)
    assert curve.valid == ([163840, 327680], [5.5, 4.2])
    with (folder / "metrics.csv").open("a") as file:
        file.write("50,409600,3.5,,,,21000,0\n")
    assert run_curve(folder).train[1][-1] == 3.5
    assert metrics(tmp_path / "none") == []
    (folder / "metrics.csv").write_text(HEADER)
    assert curve_svg(run_curve(folder)) == ""


def test_curve_leaves_out_values_that_have_no_logarithm():
    curve = Curve(([0, 10, 20, 30], [9.0, math.nan, 4.0, 3.0]), ([30], [math.inf]))
    svg = curve_svg(curve, end=100)
    (points,) = re.findall('points="([^"]*)"', svg)
    assert len(points.split()) == 2
    assert "<circle" not in svg
    assert curve_svg(Curve(([5], [1.0]), ([], []))) == ""


def test_curve_of_a_long_run_has_at_most_one_point_per_pixel():
    tokens = list(range(1000, 1_001_000, 100))
    svg = curve_svg(Curve((tokens, [10 - 4 * math.log10(t / 1000) / 3 for t in tokens]), ([], [])))
    (points,) = re.findall('points="([^"]*)"', svg)
    columns = [int(point.split(",")[0]) for point in points.split()]
    assert columns == sorted(set(columns))
    assert (columns[0], columns[-1]) == (LEFT, WIDTH - 8)
