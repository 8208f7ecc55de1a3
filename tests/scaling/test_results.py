import dataclasses
import math
import re

import pytest

from minigpt.core.settings import UserError
from minigpt.runs.provenance import Parent
from minigpt.scaling.results import find_runs, keep_run, read_run
from tests.conftest import naming
from tests.run_folder import SUMMARY, write_run
from tests.scaling.conftest import results, sized


def test_find_runs_lists_each_once_and_skips_hidden_folders_and_runs(sweep):
    write_run(sweep / ".cache" / "hidden")
    write_run(sweep / "a" / "wandb" / "inside")
    folders = find_runs([sweep / "multirun" / "1", sweep])
    names = [run.relative_to(sweep).as_posix() for run in folders]
    assert names == ["multirun/1", "a", "b", "c", "multirun/0"]


def test_result_has_the_final_numbers_of_the_run(tmp_path):
    run = read_run(write_run(tmp_path / "run", data="tinystories", seed=7))
    assert (run.model, run.data, run.seed, run.status) == ("small", "tinystories", 7, "finished")
    assert (run.parameters, run.non_embedding_parameters, run.tokens) == (
        1_046_656,
        662_656,
        327_680,
    )
    assert (run.loss, run.perplexity, run.bits_per_byte) == (4.2, 66.69, 1.578)
    assert run.reference_perplexity == 17.75


def test_killed_run_is_read_from_its_metrics_and_has_no_point(tmp_path):
    run = read_run(write_run(tmp_path / "run", summary=None))
    assert (run.status, run.perplexity, run.tokens) == ("unfinished", 66.69, 327_680)
    assert (run.parameters, run.reference_perplexity, run.point) == (None, None, None)


def test_run_whose_loss_is_not_finite_has_no_loss_and_no_point(tmp_path):
    run = write_run(tmp_path / "run", SUMMARY | {"val/loss": math.nan, "val/perplexity": math.nan})
    text = (run / "metrics.csv").read_text().replace("40,327680,4.0,4.2", "40,327680,nan,nan")
    (run / "metrics.csv").write_text(text)
    result = read_run(run)
    assert (result.train_loss, result.loss, result.point) == (None, None, None)
    assert result.curve == ((163840.0, 5.5),)


# ---------------------------------------------------------------------------- labels of groups


def test_group_names_the_optimizer_and_unscaled_embeddings(tmp_path):
    for name, more in {"a": "optimizer: {name: muon}\n", "b": "optimizer: {name: adamw}\n"}.items():
        run = write_run(tmp_path / name)
        scale = "model: {embedding_scale: 1.0}\n" if name == "b" else ""
        (run / "config.yaml").write_text((run / "config.yaml").read_text() + more + scale)
    assert [run.group for run in results(tmp_path)] == [
        "text, 328k tokens, muon",
        "text, 328k tokens, adamw, unscaled embeddings",
    ]


def test_group_names_the_files_of_text_max_stories_and_an_unusual_vocabulary(tmp_path):
    for name, files, vocabulary in (
        ("a", "[/x/poems.txt]", 3000),
        ("b", "[/y/code.txt]\n  max_stories: 1000", 3000),
        ("c", "[a.txt, b.txt, c.txt]", 500),
    ):
        run = write_run(tmp_path / name, sized("small", 9.0))
        with (run / "config.yaml").open("a") as config:
            config.write(f"  train_files: {files}\n  vocab_size: {vocabulary}\n")
    assert [run.group for run in results(tmp_path)] == [
        "text of poems.txt, 328k tokens",
        "text of code.txt, 1,000 stories, 328k tokens",
        "text of a.txt, b.txt and 1 more, vocabulary 500, 328k tokens",
    ]


def test_recipe_names_the_parent_and_averaged_weights(tmp_path):
    parent = Parent("large", "a1b2", 1000, 2.0, ["text"])
    summary = {"init_from": dataclasses.asdict(parent)}
    write_run(tmp_path / "a", sized("large", 5.85) | summary)
    write_run(tmp_path / "b", sized("large", 5.75) | summary | {"averaged": True})
    assert [run.recipe for run in results(tmp_path)] == ["from large", "from large, averaged"]


def test_tokens_are_unknown_if_those_of_the_parent_or_of_an_averaged_run_are(tmp_path):
    parent = {"init_from": dataclasses.asdict(Parent("large", "a1b2", None, 2.0, ["text"]))}
    write_run(tmp_path / "a", SUMMARY | parent)
    averaged = write_run(tmp_path / "b", SUMMARY | parent | {"tokens": None, "averaged": True})
    (averaged / "metrics.csv").unlink()
    child, mean = results(tmp_path)
    assert (child.tokens, child.own_tokens, child.curve) == (None, 327_680, ())
    assert (mean.tokens, mean.own_tokens, mean.epochs) == (None, None, None)
    assert child.group == "text, unknown + 328k tokens, from large"
    assert mean.group == "text, unknown tokens, from large, averaged"


# ---------------------------------------------------------------------------- copies of runs


def test_copied_run_has_the_same_result_and_no_path(tmp_path):
    run = write_run(tmp_path / "runs" / "one")
    config = f"runs_dir: {tmp_path}\nseed: 1\n"
    config += f"data: {{source: text, train_files: [{tmp_path}/a.txt], cache_dir: {tmp_path}/c}}\n"
    config += f"overrides: ['data.train_files=[{tmp_path}/a.txt]', 'runs_dir={tmp_path}']\n"
    (run / "config.yaml").write_text(config)
    rows = "".join(f"{i},{i * 100},{9 - i / 1000},,,,1,0.1\n" for i in range(41, 4041))
    (run / "metrics.csv").write_text((run / "metrics.csv").read_text() + rows)
    for _ in range(2):
        copy = keep_run(run, tmp_path / "kept")
    assert copy == tmp_path / "kept" / "one"
    before, after = read_run(run), read_run(copy)
    assert dataclasses.replace(after, path=run) == before
    assert sorted(p.name for p in copy.iterdir()) == ["config.yaml", "metrics.csv", "summary.json"]
    assert not any(str(tmp_path) in p.read_text() for p in copy.iterdir())
    assert 370 < (copy / "metrics.csv").read_text().count("\n") < 420
    assert keep_run(copy, tmp_path / "kept") == copy


def test_copied_run_is_never_replaced_by_another_of_its_name(tmp_path):
    for folder, loss in (("a", 4.2), ("b", 4.1)):
        write_run(tmp_path / folder / "one", SUMMARY | {"val/loss": loss})
    keep_run(tmp_path / "a" / "one", tmp_path / "kept")
    with pytest.raises(
        UserError, match=naming(str(tmp_path / "kept/one"), str(tmp_path / "b/one"))
    ):
        keep_run(tmp_path / "b" / "one", tmp_path / "kept")


# ---------------------------------------------------------------------------- bad input


def test_missing_folder_and_folder_without_runs_are_named(tmp_path):
    with pytest.raises(UserError, match=naming(str(tmp_path / "nowhere"))):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=naming(str(tmp_path))) as error:
        find_runs([tmp_path])
    assert error.value.command == ("train", {"experiment": "quickstart"})


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
def test_damaged_file_of_a_run_is_named(tmp_path, name, content):
    run = write_run(tmp_path / "run")
    (run / name).write_text(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
        read_run(run)
    assert "\n" not in str(error.value)


def test_group_names_what_a_run_was_validated_on(tmp_path):
    lines = ["valid: tuning", "subset: en", "split: test", "valid_files: [/x/v.txt]"]
    for name, line in zip("abcd", lines, strict=True):
        run = write_run(tmp_path / name)
        (run / "config.yaml").write_text((run / "config.yaml").read_text() + f"  {line}\n")
    run = write_run(tmp_path / "e")
    more = "model: {context_length: 128}\n"
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + more)
    groups = [run.group for run in results(tmp_path)]
    assert len(set(groups)) == 5
    for group, word in zip(groups, ("tuning", "en", "test", "v.txt", "128"), strict=True):
        assert word in re.findall(r"[\w.]+", group)
