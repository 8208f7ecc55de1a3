import json

import numpy as np
import pytest

from minigpt.config import UserError
from minigpt.scaling import (
    REFERENCE,
    curves,
    find_runs,
    markdown,
    read_run,
    scaling_figure,
    write_scaling,
)
from tests.run_folder import SUMMARY, write_run

SIZES = {"small": 1_046_656, "medium": 3_404_032, "large": 7_072_128}


def sized(model, perplexity, **more):
    return (
        SUMMARY | {"model": model, "parameters": SIZES[model], "val/perplexity": perplexity} | more
    )


@pytest.fixture
def sweep(tmp_path):
    """Four finished runs at three sizes and one interrupted run, in no helpful order."""
    write_run(tmp_path / "a", sized("large", 9.0))
    write_run(tmp_path / "multirun" / "0", sized("small", 20.0), seed=2)
    write_run(tmp_path / "multirun" / "1", sized("medium", 11.0))
    write_run(tmp_path / "b", sized("small", 16.0), seed=1)
    write_run(tmp_path / "c", sized("large", 99.0, status="interrupted"), seed=2)
    return tmp_path


def results(folder):
    return [read_run(run) for run in find_runs([folder])]


def test_runs_are_found_below_each_folder_once_and_not_in_hidden_ones(sweep):
    write_run(sweep / ".cache" / "hidden")
    write_run(sweep / "a" / "wandb" / "inside")
    found = find_runs([sweep / "multirun" / "1", sweep])
    names = [run.relative_to(sweep).as_posix() for run in found]
    assert names == ["multirun/1", "a", "b", "c", "multirun/0"]


def test_a_result_holds_the_final_numbers_of_the_run(tmp_path):
    run = read_run(write_run(tmp_path / "run", data="tinystories", seed=7))
    assert (run.model, run.data, run.seed, run.status) == ("small", "tinystories", 7, "finished")
    assert (run.parameters, run.non_embedding_parameters, run.tokens) == (
        1_046_656,
        662_656,
        327_680,
    )
    assert (run.loss, run.perplexity, run.bits_per_byte) == (4.2, 66.69, 1.578)
    assert run.reference_perplexity == 17.75


def test_a_killed_run_is_read_from_its_metrics_and_is_no_point_of_the_figure(tmp_path):
    run = read_run(write_run(tmp_path / "run", summary=None))
    assert (run.status, run.perplexity, run.tokens) == ("unfinished", 66.69, 327_680)
    assert (run.parameters, run.reference_perplexity, run.point) == (None, None, None)
    assert "| run (unfinished) | unknown | – | – | 328k | 1 |" in markdown([run])


def test_the_table_goes_from_small_to_large_with_the_reference_beside_it(sweep):
    write_run(sweep / "odd", sized("small", 12.0, parameters=2_000_000))
    write_scaling(results(sweep), sweep)
    text = (sweep / "scaling.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[4:10]]
    assert [(row[0], row[7], row[9]) for row in rows] == [
        ("b", "16.00", "17.75"),
        ("0", "20.00", "17.75"),
        ("odd", "12.00", "–"),
        ("1", "11.00", "10.23"),
        ("a", "9.00", "8.08"),
        ("c (interrupted)", "99.00", "8.08"),
    ]
    assert rows[0][2] == "1,046,656"
    assert "did not finish: 1 of 6 runs" in text


def test_several_runs_of_a_size_are_one_point_with_their_mean_and_range(sweep):
    (line,) = curves(results(sweep)).values()
    assert [(p.parameters, p.runs, p.perplexity, p.lowest, p.highest) for p in line] == [
        (1_046_656, 2, 18.0, 16.0, 20.0),
        (3_404_032, 1, 11.0, 11.0, 11.0),
        (7_072_128, 1, 9.0, 9.0, 9.0),
    ]


def test_runs_on_other_data_or_another_budget_are_another_line(sweep):
    write_run(sweep / "d", sized("small", 15.0), data="tinystories")
    write_run(sweep / "e", sized("small", 14.0, tokens=104_000_000))
    labels = set(curves(results(sweep)))
    assert labels == {"text, 328k tokens", "tinystories, 328k tokens", "text, 104M tokens"}


def test_the_figure_is_log_log_and_holds_the_reference_and_our_points(sweep):
    (axes,) = scaling_figure(results(sweep)).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    drawn = [np.asarray(line.get_xydata()).tolist() for line in axes.lines]
    assert [[size, perplexity] for size, perplexity in REFERENCE.items()] in drawn
    assert [[1_046_656, 18.0], [3_404_032, 11.0], [7_072_128, 9.0]] in drawn
    assert {"17.75", "10.23", "8.08", "18.00"} <= {text.get_text() for text in axes.texts}


def test_the_files_hold_the_numbers_of_the_figure_and_can_be_written_again(sweep):
    out = sweep / "study" / "one"
    write_scaling(results(sweep), out)
    write_scaling(results(sweep), out)
    assert sorted(p.name for p in out.iterdir()) == ["scaling.json", "scaling.md", "scaling.png"]
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((out / "scaling.json").read_text(encoding="utf-8"))
    assert len(content["runs"]) == 5
    assert content["figure"]["text, 328k tokens"][0]["perplexity"] == 18.0
    assert content["reference"][2] == {"parameters": 7_072_128, "perplexity": 8.08}


def test_a_number_that_is_not_finite_is_written_as_null_and_not_drawn(tmp_path):
    run = read_run(write_run(tmp_path / "run", sized("small", float("nan"))))
    assert (run.perplexity, run.point) == (None, None)
    write_scaling([run], tmp_path)
    assert "NaN" not in (tmp_path / "scaling.json").read_text(encoding="utf-8")


def test_a_folder_that_is_missing_or_holds_no_run_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"no run in .*: make some with python train.py"):
        find_runs([tmp_path])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", '{"parameters": 1'),
        ("summary.json", "[]"),
        ("summary.json", '{"parameters": "many"}'),
        ("metrics.csv", "step,tokens\n1,x\n"),
        ("config.yaml", "data: [\n"),
        ("config.yaml", "name: x\n"),
    ],
)
def test_a_broken_file_of_a_run_is_named(tmp_path, name, content):
    run = write_run(tmp_path / "run")
    (run / name).write_text(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
        read_run(run)
    assert "\n" not in str(error.value)
