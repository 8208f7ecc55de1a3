import re

from minigpt.core.plots import INK, new_figure, to_svg


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
