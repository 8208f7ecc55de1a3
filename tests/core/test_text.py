import pytest

from minigpt.core.text import percent, value_cell


@pytest.mark.parametrize(("share", "text"), [(0.0664, "6.6 %"), (1.0, "100.0 %"), (None, "–")])
def test_percent_of_a_share(share, text):
    assert percent(share) == text


@pytest.mark.parametrize(("value", "text"), [(0.0664, "+0.07"), (None, "–")])
def test_value_cell_has_a_dash_for_none(value, text):
    assert value_cell(value, "+.2f") == text
