import json

import pytest

from minigpt.core.settings import UserError
from minigpt.runs.records import read_metrics, read_samples, read_summary, series
from tests.run_folder import HEADER, ROWS, write_run


def test_metrics_skip_empty_cells_and_an_incomplete_last_line(tmp_path):
    run = write_run(tmp_path / "run")
    with (run / "metrics.csv").open("a") as file:
        file.write("50,409600,3.9,4.")
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 50, "tok')
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert series(rows, "val/loss") == ([163840, 327680], [5.5, 4.2])
    assert [sample["step"] for sample in read_samples(run)] == [20, 40]


def test_new_run_has_no_metrics_samples_or_summary(tmp_path):
    assert (read_metrics(tmp_path), read_samples(tmp_path), read_summary(tmp_path)) == ([], [], {})


@pytest.mark.parametrize("damage", ["60,nonsense\n", "1,2,3,4,5,6,7,8,9\n", ",1,,,,,,\n", "60,1\n"])
def test_a_damaged_row_is_named_by_file_and_line(tmp_path, damage):
    (tmp_path / "metrics.csv").write_text(HEADER + ROWS + damage + ROWS)
    with pytest.raises(UserError, match=r"metrics\.csv\b.*\b6\b"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("damage", ["{", "[]", '{"step": 1}'])
def test_a_damaged_sample_is_named_by_file_and_line(tmp_path, damage):
    (tmp_path / "samples.jsonl").write_text(damage + "\n")
    with pytest.raises(UserError, match=r"samples\.jsonl\b.*\b1\b"):
        read_samples(tmp_path)


def test_a_story_with_a_unicode_line_separator_stays_one_sample(tmp_path):
    story = {"step": 1, "tokens": 9, "prompt": "", "temperature": 1, "text": "one\u2028two\nthree"}
    text = json.dumps(story, ensure_ascii=False) + "\n"
    (tmp_path / "samples.jsonl").write_text(text, encoding="utf-8")
    assert read_samples(tmp_path) == [story]


@pytest.mark.parametrize("name", ["metrics.csv", "samples.jsonl", "summary.json"])
def test_a_file_that_is_not_utf8_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(b"\xff\n")
    readers = {"metrics.csv": read_metrics, "samples.jsonl": read_samples}
    with pytest.raises(UserError, match=name):
        readers.get(name, read_summary)(tmp_path)
