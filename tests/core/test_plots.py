import re

from minigpt.core import plots
from minigpt.core.plots import INK, Labels, new_figure, to_svg


def test_svg_has_the_colour_of_the_page_and_no_background():
    figure = new_figure(3, 2)
    figure.axes[0].set_title("Loss")
    svg = to_svg(figure)
    assert svg.startswith("<svg")
    assert ">Loss</text>" in svg
    assert "currentColor" in svg
    assert INK not in svg
    assert "fill: #ffffff" not in svg


def test_svgs_of_one_page_share_no_id():
    ids = []
    for _ in range(2):
        figure = new_figure(3, 2)
        figure.axes[0].plot([1, 2], [3, 4], "o-")
        ids += re.findall(r'\bid="([^"]*)"', to_svg(figure))
    assert len(ids) == len(set(ids)) > 0


def test_plain_label_is_shown_as_it_is(tmp_path):
    figure = plots.new_figure(3, 2)
    (axes,) = figure.axes
    for name in ("_base", "x$_$y"):
        axes.plot([0, 1], [0, 1], label=plots.plain(name))
    legend = axes.legend()
    assert len(legend.get_texts()) == 2
    plots.write_png(figure, tmp_path / "figure.png")


def test_labels_keep_off_each_other_and_stay_on_the_figure():
    figure = new_figure(3, 2)
    (axes,) = figure.axes
    crowd = [(0.5, 0.5), (0.5, 0.52), (0.98, 0.98), (0.02, 0.02)]
    labels = Labels(axes, crowd)
    boxes = [labels.add("word", point).get_window_extent().padded(0, -1) for point in crowd]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(figure.bbox.fully_contains(box.x1, box.y1) for box in boxes)
