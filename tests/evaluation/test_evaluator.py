import json
import logging
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from minigpt.core import hardware
from minigpt.core.settings import UserError, build
from minigpt.data.config import DataConfig
from minigpt.evaluation import EvaluationConfig, StoriesConfig, evaluate, evaluate_loss
from minigpt.evaluation.evaluator import _hardware
from minigpt.evaluation.results import evaluation_name
from minigpt.runs.folder import Run
from tests.conftest import naming
from tests.evaluation.conftest import SHORT, STORIES, write_text_corpus, written


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"analogies": [["a", "b"]]}, ["analogies", "a", "b"]),
        ({"stories": {"n": 0}}, ["stories", "n", "0"]),
        ({"stories": {"temperatures": [-1]}}, ["stories.temperatures", "-1.0"]),
        ({"stride": "wide"}, ["stride", "wide"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"strid": 1}, ["strid", "stride"]),
        ({"valid": "v3"}, ["valid", "v3", "v1", "v2", "both"]),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, names):
    with pytest.raises(UserError, match=naming(*names)):
        build(EvaluationConfig, settings, "")


def test_evaluation_of_a_run_folder_writes_evaluation_json(run):
    evaluation = evaluate(Run.load(run), SHORT)
    loaded = Run.load(run)
    stream = [i for s in STORIES[::7] for i in (*loaded.tokenizer.encode(s), 0)]
    loss = evaluate_loss(loaded.load_model(), np.array(stream, dtype=np.uint16))
    assert (evaluation.n_stories, evaluation.n_tokens) == (5, len(stream) - 1)
    assert evaluation.perplexity == pytest.approx(loss.perplexity)
    n_bytes = sum(len(s.encode()) for s in STORIES[::7])
    bits = loss.nats_per_token / math.log(2) * len(stream) / n_bytes
    assert evaluation.bits_per_byte == pytest.approx(bits)
    assert [row.temperature for row in evaluation.temperatures] == [0.5, 1.2]
    assert all(len(row.stories) == 2 for row in evaluation.temperatures)
    assert evaluation.novelty_stories == sum(story not in STORIES[::7] for story in STORIES)
    assert len(evaluation.neighbours["dog"]) == 5
    assert "[crocodile]" in evaluation.neighbours["[crocodile]"]
    assert "crocodile" in evaluation.analogies["dog − cat + crocodile"]

    assert written(run) == json.loads(json.dumps(asdict(evaluation)))
    again = evaluate(Run.load(run), SHORT)
    assert again == evaluation  # the same seed, the same stories


def test_evaluations_of_two_texts_are_written_to_two_files(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = []
    for name, stories in (("a", STORIES[:3]), ("b", STORIES[3:5])):
        (tmp_path / name).mkdir()
        path = write_text_corpus(tmp_path / name / "valid.txt", stories)
        data = DataConfig("text", valid_files=(path,), cache_dir=str(tmp_path / "cache"))
        configs.append(replace(SHORT, data=data))
    results = [evaluate(run, config) for config in configs]
    names = [evaluation_name(*pair) for pair in zip(configs, results, strict=True)]
    assert [written(run, name)["n_stories"] for name in names] == [3, 2]
    assert {path.name for path in run.glob("evaluation*.json")} == {*names}
    same = DataConfig("text", valid_files=("a/valid.txt",), cache_dir="elsewhere")
    assert evaluation_name(replace(SHORT, data=same), results[0]) == names[0]


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_bfloat16_run_is_evaluated_in_bfloat16_where_that_is_native(
    run, native, precision, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(hardware, "cpu_has_bfloat16", lambda: native)
    (run / "summary.json").write_text('{"precision": "bf16-mixed"}')
    assert evaluate(Run.load(run), SHORT).precision == precision
    assert ("32-true" in caplog.text) is not native


def test_run_is_evaluated_in_a_process_of_torchrun(run, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0",
                        "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert _hardware(Run.load(run)).devices == 1


def test_output_folder_that_cannot_be_written_is_refused_before_measuring(
    run, tmp_path, monkeypatch
):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr(Run, "load_model", lambda _: pytest.fail("measured"))
    with pytest.raises(UserError, match=naming("evaluation.json", str(file), "out")):
        evaluate(Run.load(run), EvaluationConfig(), out=file)


def test_changed_validation_stories_are_warned_about(run, caplog):
    few = EvaluationConfig(stories=StoriesConfig(prompts=()), words=(), analogies=())
    evaluate(run, few)
    assert not any(record.levelno == logging.WARNING for record in caplog.records)
    (run / "summary.json").write_text(json.dumps({"valid_tokens": 7_654_321}))
    evaluate(run, few)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "7,654,321" in record.getMessage()
