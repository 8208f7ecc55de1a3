import dataclasses
import itertools
import json
import math
import re

import numpy as np
import pytest

from minigpt.core.settings import UserError
from minigpt.runs.provenance import Parent
from minigpt.scaling.figures import (
    REFERENCE,
    compute_figure,
    curves,
    scaling_figure,
    tokens_figure,
)
from minigpt.scaling.groups import by_size, doubts, study_lines
from minigpt.scaling.results import find_runs, keep_run, read_run
from minigpt.scaling.study import write_scaling
from minigpt.scaling.tables import markdown, reference_perplexity
from tests.conftest import naming
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
    assert reference_perplexity(run) == 17.75


def test_a_killed_run_is_read_from_its_metrics_and_is_no_point_of_the_figure(tmp_path):
    run = read_run(write_run(tmp_path / "run", summary=None))
    assert (run.status, run.perplexity, run.tokens) == ("unfinished", 66.69, 327_680)
    assert (run.parameters, reference_perplexity(run), run.point) == (None, None, None)
    assert "| run (unfinished) | unknown | – | – | 328k | 1 |" in markdown([run], [])


def test_the_table_goes_from_small_to_large_with_the_reference_beside_it(sweep):
    write_run(sweep / "odd", sized("small", 12.0, parameters=2_000_000))
    text = markdown(by_size(results(sweep)), [])
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
    assert re.search(naming("1 of 6"), text)


def test_several_runs_of_a_size_are_one_point_with_their_mean_and_range(sweep):
    (line,) = curves(results(sweep)).values()
    assert [(p.parameters, p.runs, p.perplexity, p.lowest, p.highest) for p in line] == [
        (1_046_656, 2, pytest.approx(math.sqrt(16.0 * 20.0)), 16.0, 20.0),
        (3_404_032, 1, pytest.approx(11.0), 11.0, 11.0),
        (7_072_128, 1, pytest.approx(9.0), 9.0, 9.0),
    ]


def test_runs_on_other_data_or_another_budget_are_another_line(sweep):
    write_run(sweep / "d", sized("small", 15.0), data="tinystories")
    write_run(sweep / "e", sized("small", 14.0, tokens=104_000_000))
    labels = set(curves(results(sweep)))
    assert labels == {"text, 328k tokens", "tinystories, 328k tokens", "text, 104M tokens"}


def test_the_figure_is_log_log_and_holds_the_reference_and_our_points(sweep):
    (axes,) = scaling_figure(results(sweep), {}).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    drawn = [np.asarray(line.get_xydata()).tolist() for line in axes.lines]
    assert [[model.parameters, model.perplexity] for model in REFERENCE] in drawn
    ours = [[1_046_656, math.sqrt(16.0 * 20.0)], [3_404_032, 11.0], [7_072_128, 9.0]]
    assert any(np.allclose(line, ours) for line in drawn if np.shape(line) == np.shape(ours))
    assert {"17.75", "10.23", "8.08", "17.89"} <= {text.get_text() for text in axes.texts}


def test_the_files_hold_the_numbers_of_the_figure_and_can_be_written_again(sweep):
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
    point = content["figure"]["text, 328k tokens"][0]
    assert point["perplexity"] == pytest.approx(math.sqrt(16.0 * 20.0))
    assert content["reference"][2] == {
        "parameters": 7_072_128,
        "perplexity": 8.08,
        "flops_per_token": 48_199_680,
        "tokens": 104_000_000,
    }
    assert str(sweep) not in (out / "scaling.json").read_text(encoding="utf-8")


def test_a_number_that_is_not_finite_is_written_as_null_and_not_drawn(tmp_path):
    run = read_run(write_run(tmp_path / "run", sized("small", float("nan"))))
    assert (run.perplexity, run.point) == (None, None)
    write_scaling([run], tmp_path)
    assert "NaN" not in (tmp_path / "scaling.json").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------- lines and fits

WIDTHS = (138_784, 359_488, 662_112, 1_046_656, 2_061_504)
SHORT = ["w0, 139k", "w1, 359k", "w2, 662k", "w3, 1.05M", "w4, 2.06M"]


@pytest.fixture
def study(tmp_path):
    """Five sizes on the law L = 1.2 + 800 / N^0.5, seeds 0.02 apart, but the largest 0.2 above."""
    for i, n in enumerate(WIDTHS):
        for seed in (1, 2) if n < 2e6 else (1,):
            loss = 1.2 + 800 * n**-0.5 + 0.01 * (-1) ** seed + 0.2 * (n > 2e6)
            more = {
                "model": f"w{i}",
                "parameters": n,
                "non_embedding_parameters": n // 2,
                "val/loss": loss,
                "val/perplexity": math.exp(loss),
                "best_val_loss": loss - 0.03,
                "train_tokens": 32_768,
                "flops_per_token": 6 * n,
            }
            folder = write_run(tmp_path / f"w{i}-seed{seed}", SUMMARY | more, seed=seed)
            late = f"50,400000,{loss - 0.1 * i},{loss},,,21000,0\n"
            with (folder / "metrics.csv").open("a") as file:
                file.write(late)
    return tmp_path


def test_a_bend_that_comes_with_a_growing_gap_is_laid_to_repetition(study):
    (line,) = study_lines(results(study), replicates=50)
    assert [size.runs for size in line.sizes] == [2, 2, 2, 2, 1]
    assert [size.epochs for size in line.sizes] == [10] * 5
    assert [size.gap for size in line.sizes] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4], abs=0.011)
    assert [size.rise for size in line.sizes] == pytest.approx([0.03] * 5)
    assert [size.spread for size in line.sizes[:4]] == pytest.approx([0.02] * 4)
    assert line.sizes[4].spread is None
    (last,) = line.forecasts
    assert last.measured - last.predicted == pytest.approx(0.19, abs=0.01)
    off = f"{last.measured - last.predicted:+.3f}"
    assert re.search(naming("10.0", "w4", off, "bends"), line.verdict)
    assert line.fits.keys() == {"parameters", "non_embedding_parameters"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train_tokens": None}, "recorded"),
        ({"train_tokens": 400_000}, "twice"),
        ({"val/loss": 1.75, "val/perplexity": 5.75}, "no bend"),
    ],
)
def test_no_bend_is_claimed_without_its_grounds(study, change, said):
    for run in find_runs([study]):
        if "val/loss" not in change or run.name == "w4-seed1":
            summary = json.loads((run / "summary.json").read_text())
            (run / "summary.json").write_text(json.dumps(summary | change))
    (line,) = study_lines(results(study), replicates=20)
    assert said in line.verdict


def test_one_seed_each_gives_a_fit_and_says_that_there_is_no_interval(study):
    runs = [run for run in results(study) if run.seed == 1]
    (line,) = lines = study_lines(runs)
    assert "chance" in line.verdict
    text = markdown(runs, lines)
    assert "python train.py -m experiment=scaling_seeds" in text
    assert "(no interval)" in text


def test_too_few_sizes_are_said_in_one_line_and_not_fitted(sweep):
    (line,) = lines = study_lines(results(sweep))
    assert (line.fits, line.forecasts) == ({}, ())
    assert re.search(naming("text, 328k tokens", "4", "3", "experiment=scaling"), line.no_fit)
    assert "\n" not in line.no_fit
    said = markdown(results(sweep), lines).partition("## Too few")[2]
    assert re.search(naming("4 sizes"), said)
    assert said.count("| text, 328k tokens |") == 3


def test_another_optimizer_or_a_plain_sum_is_another_line(tmp_path):
    for name, more in {"a": "optimizer: {name: muon}\n", "b": "optimizer: {name: adamw}\n"}.items():
        run = write_run(tmp_path / name)
        scale = "model: {embedding_scale: 1.0}\n" if name == "b" else ""
        (run / "config.yaml").write_text((run / "config.yaml").read_text() + more + scale)
    assert [run.line for run in results(tmp_path)] == [
        "text, 328k tokens, muon",
        "text, 328k tokens, adamw, plain sum",
    ]


def test_runs_that_are_not_seeds_of_one_recipe_are_said_to_be_taken_together(tmp_path, study):
    assert doubts(results(study)) == []
    for name, seed, batch in (("a", 1, 8), ("b", 1, 8), ("c", 2, 16)):
        run = write_run(tmp_path / "more" / name, seed=seed)
        text = (run / "config.yaml").read_text() + f"  batch_size: {batch}\n"
        (run / "config.yaml").write_text(text)
    runs = results(tmp_path / "more")
    (different,), (alike,) = doubts(runs), doubts(runs[:2])
    assert re.search(naming("a, b, c", "data.batch_size"), different)
    assert "seed" not in different
    assert re.search(naming("a, b", "seed"), alike)
    assert "batch_size" not in alike
    assert doubts(runs[1:])[0] in markdown(runs[1:], [])


def test_recipes_stand_side_by_side_where_size_data_and_tokens_are_the_same(tmp_path):
    def trained(name, model, loss, recipe, **more):
        numbers = sized(model, math.exp(loss), **{"val/loss": loss, "val/bits_per_byte": loss})
        run = write_run(tmp_path / name, numbers | more, seed=len(name))
        (run / "config.yaml").write_text((run / "config.yaml").read_text() + recipe)

    muon = "optimizer: {name: muon}\n"
    plain = "optimizer: {name: adamw}\nmodel: {embedding_scale: 1.0}\n"
    trained("a", "small", 2.0, muon)
    trained("bb", "small", 2.2, muon)
    trained("c", "small", 3.0, plain, tokens=329_000)  # in larger steps
    trained("d", "small", 1.0, muon, tokens=9_000_000)  # as many tokens by no other recipe
    trained("e", "medium", 2.0, muon)
    text = markdown(results(tmp_path), [])
    (row,) = [line for line in text.partition("## Recipes")[2].splitlines() if "small" in line]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        *("small", "text", "330k", "17.75", "20.09 · 3.000"),
        "8.17 [7.39, 9.03], 2 seeds · 2.100",
    ]
    assert "| adamw, plain sum | muon |" in text
    one = [run for run in results(tmp_path) if run.recipe == "muon"]
    assert "## Recipes" not in markdown(one, [])


def test_perplexities_that_are_nearly_alike_are_written_below_each_other(tmp_path):
    for tokens, perplexity in ((1_000_000, 5.80), (2_000_000, 5.85), (3_000_000, 5.79)):
        write_run(tmp_path / str(tokens), sized("large", perplexity, tokens=tokens))
    figure = scaling_figure(results(tmp_path), {})
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


def test_other_files_and_other_vocabularies_are_other_lines_and_other_curves(tmp_path):
    for name, files, vocabulary in (
        ("a", "[/x/poems.txt]", 3000),
        ("b", "[/y/code.txt]", 3000),
        ("c", "[a.txt, b.txt, c.txt]", 500),
    ):
        run = write_run(tmp_path / name, sized("small", 9.0))
        with (run / "config.yaml").open("a") as config:
            config.write(f"  train_files: {files}\n  vocab_size: {vocabulary}\n")
    runs = results(tmp_path)
    assert [run.line for run in runs] == [
        "text of poems.txt, 328k tokens",
        "text of code.txt, 328k tokens",
        "text of a.txt, b.txt and 1 more, vocabulary 500, 328k tokens",
    ]
    (axes,) = tokens_figure(runs).axes
    _, *labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(labels) == 3
    assert sum("code.txt" in label for label in labels) == 1


def test_a_loss_that_is_not_finite_is_no_number_of_the_study(tmp_path):
    run = write_run(tmp_path / "run", SUMMARY | {"val/loss": math.nan, "val/perplexity": math.nan})
    text = (run / "metrics.csv").read_text().replace("40,327680,4.0,4.2", "40,327680,nan,nan")
    (run / "metrics.csv").write_text(text)
    result = read_run(run)
    assert (result.train_loss, result.loss, result.point) == (None, None, None)
    assert result.curve == ((163840.0, 5.5),)
    assert re.search(naming("1 of 1"), markdown([result], []))
    write_scaling([result], tmp_path / "out")
    assert "NaN" not in (tmp_path / "out/scaling.json").read_text()


def test_a_run_that_was_averaged_is_another_line(tmp_path):
    told = Parent("large", "a1b2", 1000, 2.0, ["text"])
    begun = {"init_from": dataclasses.asdict(told)}
    write_run(tmp_path / "a", sized("large", 5.85) | begun)
    write_run(tmp_path / "b", sized("large", 5.75) | begun | {"averaged": True})
    assert [run.recipe for run in results(tmp_path)] == ["from large", "from large, averaged"]


def test_the_laws_and_the_curves_are_drawn(study):
    runs = results(study)
    (line,) = study_lines(runs, replicates=20)
    law = line.fits["parameters"]
    (axes,) = scaling_figure(runs, {line.label: law}).axes
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
        assert labels == ["reference, 104M tokens", *SHORT]


def test_the_file_holds_fits_forecasts_and_the_verdict(study):
    write_scaling(results(study), study / "out", replicates=50)
    (line,) = json.loads((study / "out/scaling.json").read_text(encoding="utf-8"))["lines"]
    fit = line["fits"]["parameters"]
    assert fit["intervals"]["alpha"][0] < fit["alpha"] < fit["intervals"]["alpha"][1]
    assert line["forecasts"][0]["n"] == WIDTHS[4]
    text = (study / "out/scaling.md").read_text(encoding="utf-8")
    assert f"**{line['verdict']}**" in text
    assert "| w4 | 1 | – | 10.0 |" in text


# ---------------------------------------------------------------------------- kept runs


def test_a_kept_run_reads_as_before_holds_no_path_and_can_be_kept_again(tmp_path):
    run = write_run(tmp_path / "runs" / "one")
    config = f"runs_dir: {tmp_path}\nseed: 1\n"
    config += f"data: {{source: text, train_files: [{tmp_path}/a.txt], cache_dir: {tmp_path}/c}}\n"
    (run / "config.yaml").write_text(config)
    rows = "".join(f"{i},{i * 100},{9 - i / 1000},,,,1,0.1\n" for i in range(41, 4041))
    (run / "metrics.csv").write_text((run / "metrics.csv").read_text() + rows)
    for _ in range(2):
        kept = keep_run(run, tmp_path / "kept")
    assert kept == tmp_path / "kept" / "one"
    before, after = read_run(run), read_run(kept)
    assert dataclasses.replace(after, path=run) == before
    assert sorted(p.name for p in kept.iterdir()) == ["config.yaml", "metrics.csv", "summary.json"]
    assert not any(str(tmp_path) in p.read_text() for p in kept.iterdir())
    assert 370 < (kept / "metrics.csv").read_text().count("\n") < 420
    assert keep_run(kept, tmp_path / "kept") == kept


def test_a_run_is_never_kept_over_another_of_its_name(tmp_path):
    for place, loss in (("a", 4.2), ("b", 4.1)):
        write_run(tmp_path / place / "one", SUMMARY | {"val/loss": loss})
    keep_run(tmp_path / "a" / "one", tmp_path / "kept")
    with pytest.raises(
        UserError, match=naming(str(tmp_path / "kept/one"), str(tmp_path / "b/one"))
    ):
        keep_run(tmp_path / "b" / "one", tmp_path / "kept")


def test_a_folder_that_is_missing_or_holds_no_run_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match=naming(str(tmp_path / "nowhere"))):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=naming(str(tmp_path), "python train.py")):
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
