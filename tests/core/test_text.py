import pytest

from minigpt.core.text import human_count, human_time, md_table, percent, value_cell


@pytest.mark.parametrize(("share", "text"), [(0.0664, "6.6 %"), (1.0, "100.0 %"), (None, "–")])
def test_percent_of_a_share(share, text):
    assert percent(share) == text


@pytest.mark.parametrize(("value", "text"), [(0.0664, "+0.07"), (None, "–")])
def test_value_cell_has_a_dash_for_none(value, text):
    assert value_cell(value, "+.2f") == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (850, "850"),
        (999.7, "1k"),
        (39_500, "39.5k"),
        (999_499, "999k"),
        (999_600, "1M"),
        (1_046_656, "1.05M"),
        (104e6, "104M"),
        (6.6e9, "6.6B"),
    ],
)
def test_counts_are_written_with_three_digits_and_a_letter(number, text):
    assert human_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3900, "1 h 05 min")],
)
def test_times_are_written_with_two_units_at_most(seconds, text):
    assert human_time(seconds) == text


def test_a_markdown_table_aligns_numbers_right_and_escapes_bars():
    table = md_table(["size", "loss"], [["a|b", "1.5"]])
    assert table == "| size | loss |\n| --- | ---: |\n| a\\|b | 1.5 |"
