import ast
import json
import math
import re
import shlex

import pytest
from huggingface_hub import ModelCard

from minigpt.core.settings import UserError
from minigpt.evaluation import evaluate
from minigpt.exporting import ExportConfig, export
from minigpt.exporting.card import _command, _python_string
from minigpt.runs.folder import Run
from minigpt.runs.records import read_summary
from minigpt.training.config import TrainConfig
from tests.conftest import composed, naming
from tests.exporting.conftest import QUICK, card_of, change_config, exported, row_of

CRAFTED = "32 | x\n\n# Heading\n---\n```\u2028\x1b[31m"


def test_command_of_the_card_composes_to_the_settings_of_the_run(run, tmp_path):
    card = card_of(exported(run, tmp_path / "out"))
    (command,) = re.findall(r"```sh\n(.*?)\n```", card, re.DOTALL)
    words = shlex.split(command)
    assert words[:2] == ["minigpt", "train"]
    config = Run.load(run).config
    assert "data.train_files=[train.txt]" in words
    own = TrainConfig.from_dict(config)
    again = composed(words[2:])
    for group in ("model", "optimizer", "budget", "trainer", "seed"):
        assert getattr(again, group) == getattr(own, group)
    assert again.data.batch_size == own.data.batch_size
    once_more = exported(exported(run, tmp_path / "ours", format="safetensors"), tmp_path / "hf")
    assert command in card_of(once_more)


@pytest.mark.parametrize("overrides", [None, ["data.separator=\n```\n# Heading"]])
def test_card_without_a_printable_command_names_the_config(overrides, run, tmp_path):
    change_config(run, overrides=overrides)
    card = card_of(exported(run, tmp_path / "out"))
    assert "minigpt train" not in card
    assert "config.yaml" in card
    assert "# Heading" not in card


def test_metadata_holds_the_measured_numbers(run, tmp_path):
    own = evaluate(Run.load(run), QUICK)
    data = ModelCard.load(exported(run, tmp_path / "me-tiny") / "README.md").data
    assert data.model_name == "me-tiny"
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values == {
        "perplexity": round(own.perplexity, 3),
        "bits_per_byte": round(own.bits_per_byte, 4),
    }
    assert {(r.dataset_type, r.dataset_split) for r in data.eval_results} == {
        ("text", "validation")
    }
    assert (data.datasets, data.license) == (None, None)
    ours = ModelCard.load(exported(run, tmp_path / "b", format="safetensors") / "README.md").data
    assert (ours.library_name, ours.eval_results) == (None, None)  # other weights


def test_metadata_of_tinystories_names_the_data_and_the_license(run, tmp_path):
    config = Run.load(run).config
    change_config(run, data=config["data"] | {"source": "tinystories_sample"})
    data = ModelCard.load(exported(run, tmp_path / "out") / "README.md").data
    assert (data.license, data.datasets) == ("mit", ["roneneldan/TinyStories"])
    assert data.language == ["en"]
    assert data.tags == ["mini-gpt", "tinystories"]


def test_license_depends_on_the_texts_of_the_teachers(run, tmp_path):
    config = Run.load(run).config
    change_config(run, data=config["data"] | {"source": "tinystories_sample"})
    summary = read_summary(run)
    teacher = {"name": "b", "weights": "x", "tokens": 1, "seconds": 1.0}
    for source, license in (("tinystories_sample", "mit"), ("text", None)):
        summary["teachers"] = [{**teacher, "sources": [source]}]
        (run / "summary.json").write_text(json.dumps(summary))
        out = exported(run, tmp_path / source)
        assert ModelCard.load(out / "README.md").data.license == license


def test_python_string_of_a_path_is_a_literal_of_one_line():
    for text in ("runs/a", "runs/é\U0001f600", "a\nb\U0001f600", 'quoted "a"'):
        literal = _python_string(text)
        assert ast.literal_eval(literal) == text
        assert literal.isprintable()


def test_card_names_the_texts_of_averaged_runs(run, tmp_path):
    config = Run.load(run).config
    change_config(run, data=config["data"] | {"source": "tinystories_sample"})
    summary = read_summary(run)
    own = {"name": "b", "weights": "x", "overrides": ["data=text"], "sources": ["text"]}
    summary["averaged"] = [own]
    (run / "summary.json").write_text(json.dumps(summary))
    out = exported(run, tmp_path / "out", format="safetensors", dtype="float32")
    assert ModelCard.load(out / "README.md").data.license is None
    assert "own texts" in card_of(out)
    assert Run.load(out).provenance(Run.load(out).load_model()).sources[-1] == "text"
    command = "minigpt export runs/tiny out --format safetensors --dtype float32 --average runs/b"
    assert f"\nminigpt train data=text name=b\n{command}\n" in card_of(out)


def test_card_shows_the_first_prompt_of_the_run(run, tmp_path):
    change_config(run, callbacks={"prompts": ["Es war einmal"]})
    assert "Es war einmal" in card_of(exported(run, tmp_path / "out"))


def test_evaluation_without_the_stories_is_an_error_of_evaluate(run, tmp_path):
    out = exported(run, tmp_path / "ours", format="safetensors")
    with pytest.raises(UserError) as error:
        export(Run.load(out), tmp_path / "hf", ExportConfig(evaluate=True))
    assert error.value.argument == "evaluate"


def test_card_shows_v1_beside_v2(run, tmp_path):
    evaluate(Run.load(run), QUICK)
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["valid_v1"] = {"perplexity": 9.87654, "bits_per_byte": 0.98765}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    out = exported(run, tmp_path / "out")
    card = card_of(out)
    assert row_of(card, "validation perplexity, V1") == "9.877"
    assert row_of(card, "bits per byte, V1") == "0.9877"
    results = ModelCard.load(out / "README.md").data.eval_results
    assert [(r.dataset_config, r.metric_type, r.metric_value) for r in results] == [
        ("V2", "perplexity", round(evaluation["perplexity"], 3)),
        ("V2", "bits_per_byte", round(evaluation["bits_per_byte"], 4)),
        ("V1", "perplexity", 9.877),
        ("V1", "bits_per_byte", 0.9877),
    ]
    assert len({result.dataset_name for result in results}) == 2
    table = card.split("\n---\n")[1]
    assert table.index(f"**{evaluation['perplexity']:.3f}**") < table.index("9.877")


def test_card_names_the_edition_of_the_sample_by_its_number_of_stories(run, tmp_path):
    config, summary = Run.load(run).config, read_summary(run)
    change_config(run, data=config["data"] | {"source": "tinystories_sample"})
    for n_stories, number in ((39_927, "39,927"), (None, "14,849")):
        summary["train_stories"] = n_stories
        (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        assert number in card_of(exported(run, tmp_path / number))


@pytest.mark.parametrize("format", ["hf", "safetensors"])
def test_crafted_values_stay_on_one_line_of_the_card(format, run, tmp_path):
    evaluate(Run.load(run), QUICK)
    plain = card_of(exported(run, tmp_path / "plain", format=format, dtype="float32"))
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation |= {"precision": CRAFTED, "device": CRAFTED, "data": {"source": CRAFTED}}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    names = ("tokens", "seconds", "device", "devices", "num_nodes", "precision", "commit")
    summary = read_summary(run) | dict.fromkeys(names, CRAFTED)
    (run / "summary.json").write_text(json.dumps(summary))
    config = Run.load(run).config
    data = config["data"] | {"source": f"text{CRAFTED}"}
    change_config(run, name=CRAFTED, seed=CRAFTED, data=data)
    out = tmp_path / "crafted"
    export(Run.load(run), out, ExportConfig(format, "float32"), name=f"x {CRAFTED}")
    card = card_of(out)
    assert card.count("\n") == plain.count("\n")
    assert all(line.isprintable() for line in card.split("\n"))
    assert row_of(card, "training precision").startswith("32 \\| x # Heading --- ```")
    assert row_of(card, "training tokens").startswith("32")
    assert ModelCard.load(out / "README.md").data.model_name


@pytest.mark.parametrize("v1", [CRAFTED, 1, {"perplexity": CRAFTED, "bits_per_byte": [1]}])
def test_v1_numbers_of_a_wrong_type_stay_on_their_line_of_the_card(v1, run, tmp_path):
    evaluate(Run.load(run), QUICK)
    evaluation = json.loads((run / "evaluation.json").read_text()) | {"valid_v1": v1}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    card = card_of(exported(run, tmp_path / "out"))
    assert "\n# Heading" not in card
    assert row_of(card, "validation perplexity, V1") is not None


@pytest.mark.parametrize("number", [math.nan, math.inf, -1, "many", [], {"a": 1}, True, 1e308])
def test_values_of_a_wrong_type_give_a_card(number, run, tmp_path):
    names = ("tokens", "seconds", "device", "devices", "num_nodes", "precision", "commit")
    summary = read_summary(run) | dict.fromkeys(names, number)
    (run / "summary.json").write_text(json.dumps(summary))
    card = card_of(exported(run, tmp_path / "out"))
    assert row_of(card, "training tokens")


@pytest.mark.parametrize("data", [None, [], {}, {"source": 1}])
def test_config_without_a_source_is_refused(data, run, tmp_path):
    change_config(run, data=data)
    with pytest.raises(UserError, match=naming("config.yaml", "data.source")):
        exported(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_of_averaged_weights_names_the_run_that_is_averaged():
    assert _command(["seed=2"], "a b", named=True) == "minigpt train seed=2 'name=a b'"
    assert _command(["seed=2"], "a b", named=False) == "minigpt train seed=2"
    assert _command(["name=c"], "a b", named=True) == "minigpt train name=c"
    assert _command([], None, named=False) == "minigpt train"
