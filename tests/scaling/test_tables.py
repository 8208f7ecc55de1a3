import dataclasses
import json
import math
import re

import pytest
from rich.console import Console

from minigpt.runs.provenance import Parent
from minigpt.scaling.fit import by_size, run_groups, run_warnings
from minigpt.scaling.results import read_run
from minigpt.scaling.tables import law_line, markdown, rich_table, write_scaling
from tests.conftest import naming
from tests.run_folder import write_run
from tests.scaling.conftest import WIDTHS, results, sized


def rows(text: str, section: str) -> list[list[str]]:
    """Return the cells of the table below the heading `section`."""
    lines = text.partition(f"# {section}\n")[2].lstrip().partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_runs_table_is_sorted_by_size_and_has_the_reference(sweep):
    write_run(sweep / "odd", sized("small", 12.0, parameters=2_000_000))
    text = markdown(by_size(results(sweep)), [])
    cells = rows(text, "Scaling")
    assert [(row[0], row[7], row[9]) for row in cells] == [
        ("b", "16.00", "17.75"),
        ("0", "20.00", "17.75"),
        ("odd", "12.00", "–"),
        ("1", "11.00", "10.23"),
        ("a", "9.00", "8.08"),
        ("c (interrupted)", "99.00", "8.08"),
    ]
    assert cells[0][2] == "1,046,656"
    assert f"- {run_warnings(results(sweep))[0]}\n" in text


def test_runs_table_has_dashes_for_missing_numbers_of_a_killed_run(tmp_path):
    run = read_run(write_run(tmp_path / "run", summary=None))
    assert "| run (unfinished) | unknown | – | – | 328k | 1 |" in markdown([run], [])


def test_run_whose_parent_saw_unknown_tokens_has_a_dash_and_null_and_no_recipe_row(tmp_path):
    parent = dataclasses.asdict(Parent("first", "a1b2", None, 2.0, ["text"]))
    write_run(tmp_path / "a", sized("small", 20.0))
    write_run(tmp_path / "b", sized("small", 9.0, init_from=parent))
    write_scaling(results(tmp_path), tmp_path / "out")
    text = (tmp_path / "out/scaling.md").read_text(encoding="utf-8")
    assert [(row[0], row[4]) for row in rows(text, "Scaling")] == [("a", "328k"), ("b", "–")]
    assert "## Recipes" not in text
    known, unknown = json.loads((tmp_path / "out/scaling.json").read_text("utf-8"))["runs"]
    assert (known["tokens"], unknown["tokens"], unknown["own_tokens"]) == (327_680, None, 327_680)


def test_runs_tables_have_the_tokens_of_teachers_if_a_run_has_any(tmp_path):
    def columns() -> dict[str, list[str]]:
        table = rich_table(results(tmp_path))
        return {str(column.header): [*map(str, column.cells)] for column in table.columns}

    write_run(tmp_path / "a-run-of-11", sized("small", 20.0))
    assert "teachers" not in columns()
    for name, tokens in (("b", 28_000_000), ("c", None)):
        teacher = dataclasses.asdict(Parent("large", "a1b2", tokens, 2.0, ["text"]))
        write_run(tmp_path / name, sized("small", 9.0, teachers=[teacher]))
    assert columns()["teachers"] == ["0", "28M", "–"]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(rich_table(results(tmp_path)))
    assert "a-run-of-11" in capture.get()  # on one line beside all columns
    text = markdown(by_size(results(tmp_path)), [])
    assert [row[5] for row in rows(text, "Scaling")] == ["0", "28M", "–"]


def test_recipes_table_compares_runs_of_one_size_data_and_token_count(tmp_path):
    def trained(name, model, loss, recipe, **more):
        numbers = sized(model, math.exp(loss), **{"val/loss": loss, "val/bits_per_byte": loss})
        run = write_run(tmp_path / name, numbers | more, seed=len(name))
        (run / "config.yaml").write_text((run / "config.yaml").read_text() + recipe)

    muon = "optimizer: {name: muon}\n"
    unscaled = "optimizer: {name: adamw}\nmodel: {embedding_scale: 1.0}\n"
    trained("a", "small", 2.0, muon)
    trained("bb", "small", 2.2, muon)
    trained("c", "small", 3.0, unscaled, tokens=329_000)  # in larger steps
    trained("d", "small", 1.0, muon, tokens=9_000_000)  # no other recipe saw as many tokens
    trained("e", "medium", 2.0, muon)
    unscaled_row, muon_row = rows(markdown(results(tmp_path), []), "Recipes")
    case = ["small", "text"]
    assert unscaled_row == [
        *(*case, "adamw, unscaled embeddings", "329k", "1"),
        *("20.09", "–", "–", "3.000", "17.75"),
    ]
    assert muon_row == [*case, "muon", "329k", "2", "8.17", "7.39", "9.03", "2.100", "17.75"]
    one = [run for run in results(tmp_path) if run.recipe == "muon"]
    assert "## Recipes" not in markdown(one, [])


def test_laws_and_sizes_tables_have_intervals_and_predictions(study):
    runs = results(study)
    (group,) = groups = run_groups(runs, replicates=50)
    text, law = markdown(runs, groups), group.fits["parameters"]
    assert law.intervals is not None
    all_parameters, non_embedding = rows(text, "Laws")
    low, high = law.intervals["alpha"]
    assert all_parameters[1] == "all parameters"
    assert all_parameters[4] == f"{law.alpha:.3f} [{low:.3f}, {high:.3f}]"
    assert all_parameters[6] == f"{law.seed_noise:.4f}"
    assert non_embedding[1] == "without embedding"
    *_, w3, w4 = rows(text, "Sizes")
    assert w3[1:5] == ["w3", "2", "0.020", "10.0"]
    assert w3[-3:] == ["–", "–", "–"]
    (prediction,) = group.predictions
    assert prediction.interval is not None
    low, high = prediction.interval
    assert w4[1:5] == ["w4", "1", "–", "10.0"]
    assert w4[-3:] == [
        f"{prediction.predicted:.3f} [{low:.3f}, {high:.3f}]",
        f"{prediction.measured - prediction.predicted:+.3f}",
        "yes",
    ]


def test_law_of_one_seed_each_has_no_interval(study):
    runs = [run for run in results(study) if run.seed == 1]
    (group,) = groups = run_groups(runs)
    text = markdown(runs, groups)
    assert rows(text, "Laws")[0][4:7] == [
        f"{group.fits['parameters'].alpha:.3f}",
        f"{group.fits['parameters'].residual:.4f}",
        "–",
    ]
    assert rows(text, "Sizes")[-1][-1] == "–"


def test_group_of_too_few_sizes_has_no_law(sweep):
    (group,) = groups = run_groups(results(sweep))
    assert law_line(group).startswith("text, 328k tokens: ")
    assert re.search(naming("3", "4", "sizes"), law_line(group))
    text = markdown(results(sweep), groups)
    assert "## Laws" not in text
    assert [row[:3] for row in rows(text, "Sizes")] == [
        ["text, 328k tokens", "small", "2"],
        ["text, 328k tokens", "medium", "1"],
        ["text, 328k tokens", "large", "1"],
    ]


def test_law_line_has_the_numbers_of_the_fit(study):
    (group,) = run_groups(results(study), replicates=20)
    law = group.fits["parameters"]
    line = law_line(group)
    assert line.startswith("text, 328k tokens: ")
    assert all(number in line for number in (f"{law.e:.3f}", f"{law.a:.4g}", f"{law.alpha:.3f}"))


def test_scaling_files_hold_the_numbers_and_can_be_written_again(sweep):
    out = sweep / "study" / "one"
    write_scaling(results(sweep), out)
    write_scaling(results(sweep), out)
    pictures = ["scaling-compute.png", "scaling-tokens.png", "scaling.png"]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["scaling.json", "scaling.md", *pictures]
    )
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert all(name in (out / "scaling.md").read_text(encoding="utf-8") for name in pictures)
    content = json.loads((out / "scaling.json").read_text(encoding="utf-8"))
    assert len(content["runs"]) == 5
    (group,) = content["groups"]
    assert (group["label"], group["fits"]) == ("text, 328k tokens", {})
    assert group["sizes"][0]["perplexity"] == pytest.approx(math.sqrt(16.0 * 20.0))
    assert content["reference"][2] == {
        "parameters": 7_072_128,
        "perplexity": 8.08,
        "flops_per_token": 48_199_680,
        "tokens": 104_000_000,
    }
    assert str(sweep) not in (out / "scaling.json").read_text(encoding="utf-8")


def test_scaling_json_holds_fits_and_predictions(study):
    write_scaling(results(study), study / "out", replicates=50)
    (group,) = json.loads((study / "out/scaling.json").read_text(encoding="utf-8"))["groups"]
    fit = group["fits"]["parameters"]
    assert fit["intervals"]["alpha"][0] < fit["alpha"] < fit["intervals"]["alpha"][1]
    (prediction,) = group["predictions"]
    assert (prediction["n"], prediction["above"]) == (WIDTHS[4], True)


def test_scaling_json_has_null_for_a_loss_that_is_not_finite(tmp_path):
    run = read_run(write_run(tmp_path / "run", sized("small", math.nan, **{"val/loss": math.nan})))
    assert (run.perplexity, run.loss, run.point) == (None, None, None)
    write_scaling([run], tmp_path)
    text = (tmp_path / "scaling.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert json.loads(text)["runs"][0]["loss"] is None
