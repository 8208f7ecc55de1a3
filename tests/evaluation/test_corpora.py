"""The stories that an evaluation scores: those of the run, other ones, and the bundled sample."""

import dataclasses
import io
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from minigpt.cli.tables import show
from minigpt.core.settings import UserError
from minigpt.data import sources
from minigpt.data.config import DataConfig
from minigpt.data.corpus import Corpus
from minigpt.evaluation import EvaluationConfig, corpora, evaluate, evaluate_loss
from minigpt.evaluation.corpora import own_data
from minigpt.evaluation.loss import Score
from minigpt.runs.folder import Run
from tests.conftest import naming
from tests.evaluation.conftest import SHORT, STORIES, write_text_corpus, written


def test_config_without_data_settings_is_an_error_and_not_a_traceback():
    for config in ({}, {"data": None}, {"data": "text"}):
        with pytest.raises(UserError, match=naming("config.yaml", "data")):
            own_data(config)


def test_other_corpus_is_encoded_by_the_tokenizer_of_the_run(run, tmp_path):
    other = DataConfig(
        source="text",
        valid_files=(write_text_corpus(tmp_path / "x.txt", ["A hen saw a hen."]),),
        cache_dir=str(tmp_path / "cache"),
    )
    (tmp_path / "train.txt").unlink()  # the run's own stories are not needed
    evaluation = evaluate(
        Run.load(run), EvaluationConfig(data=other, stories=SHORT.stories, words=())
    )
    assert evaluation.n_tokens == len(Run.load(run).tokenizer.encode("A hen saw a hen."))
    assert evaluation.novelty_stories == 0
    assert all(row.repetition.novel is None for row in evaluation.temperatures)


V1 = ["A cat saw a dog.", "The pig and the hen ran."]


@pytest.fixture
def sample_run(run, tmp_path, monkeypatch) -> Path:
    """The run as one that was trained on a bundled sample, of other stories than the real one."""
    train, v2 = (tmp_path / f"{split}.txt" for split in ("train", "valid"))
    texts = {"v2": v2, "v1": Path(write_text_corpus(tmp_path / "v1.txt", V1))}

    def sample(release: str = "v2") -> Corpus:
        return Corpus((train,), (texts[release],))

    monkeypatch.setattr(corpora, "bundled_sample", sample)
    monkeypatch.setattr(sources, "bundled_sample", sample)
    monkeypatch.setattr("minigpt.evaluation.stories.bundled_sample", sample)  # for novelty
    change_data(run, {"source": "tinystories_sample", "cache_dir": str(tmp_path / "cache")})
    return run


def change_data(run: Path, data: dict) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "data": data}))


def score_on(run: Path, stories: list[str]) -> Score:
    loaded = Run.load(run)
    stream = [i for s in stories for i in (*loaded.tokenizer.encode(s), 0)]
    loss = evaluate_loss(loaded.load_model(), np.array(stream, dtype=np.uint16))
    bits = loss.bits_per_byte(sum(len(s.encode()) for s in stories) / len(stream))
    numbers = len(stories), loss.n_tokens, loss.nats_per_token, loss.perplexity, bits
    return Score(*numbers)


def numbers_of(evaluation: Score) -> Score:
    return Score(*(getattr(evaluation, field.name) for field in fields(Score)))


def test_both_validation_texts_of_the_sample_are_scored_with_v2_at_the_top(sample_run):
    evaluation = evaluate(sample_run, SHORT)
    v2, v1 = score_on(sample_run, STORIES[::7]), score_on(sample_run, V1)
    assert (numbers_of(evaluation), evaluation.valid_v1) == (v2, v1)
    assert evaluation.novelty_stories == sum(story not in STORIES[::7] for story in STORIES)
    record = written(sample_run)
    assert record["valid"] == "both"
    assert record["valid_v1"] == asdict(v1)
    assert {name: record[name] for name in asdict(v2)} == asdict(v2)
    console = Console(record=True, width=140, file=io.StringIO())
    show(evaluation, console)
    text = console.export_text()
    assert text.index("V2") < text.index("V1")
    row = next(line for line in text.splitlines() if "perplexity" in line)
    assert row.index(f"{v2.perplexity:.3f}") < row.rindex(f"{v1.perplexity:.3f}")
    assert f"{v1.bits_per_byte:.4f}" in text


@pytest.mark.parametrize(
    ("valid", "stories", "name"),
    [("v1", V1, "evaluation-v1.json"), ("v2", STORIES[::7], "evaluation.json")],
)
def test_valid_scores_one_text_of_the_sample(valid, stories, name, sample_run):
    evaluation = evaluate(sample_run, dataclasses.replace(SHORT, valid=valid))
    assert numbers_of(evaluation) == score_on(sample_run, stories)
    assert evaluation.valid_v1 is None
    record = written(sample_run, name)
    assert (record["valid"], record["perplexity"]) == (valid, evaluation.perplexity)
    assert [path.name for path in sample_run.glob("evaluation*.json")] == [name]


def test_valid_on_another_corpus_is_refused_in_one_line(run, monkeypatch):
    monkeypatch.setattr(
        "minigpt.evaluation.evaluator.evaluate_loss", lambda *_: pytest.fail("measured")
    )
    with pytest.raises(UserError, match=naming("valid", "v1", "text")) as error:
        evaluate(run, EvaluationConfig(valid="v1"))
    assert "\n" not in str(error.value)


def test_a_run_of_tuning_is_evaluated_on_tuning_stories_unless_valid_is_typed(sample_run, tmp_path):
    data = {"source": "tinystories_sample", "valid": "tuning"}
    change_data(sample_run, data | {"cache_dir": str(tmp_path / "cache")})
    hidden = [
        (tmp_path / name).rename(tmp_path / f"{name}.hidden") for name in ("valid.txt", "v1.txt")
    ]
    stories = [f"{story} {i}" for i, story in enumerate(STORIES)]
    write_text_corpus(tmp_path / "train.txt", stories)
    evaluation = evaluate(sample_run, SHORT)  # opens neither
    assert numbers_of(evaluation) == score_on(sample_run, stories[6::7])
    assert (evaluation.valid, evaluation.valid_v1) == (None, None)
    assert written(sample_run, "evaluation-tuning.json")["data"]["valid"] == "tuning"
    assert not (sample_run / "evaluation.json").exists()
    for path in hidden:
        path.rename(path.with_suffix(""))
    evaluation = evaluate(sample_run, dataclasses.replace(SHORT, valid="both"))
    assert numbers_of(evaluation) == score_on(sample_run, STORIES[::7])
    assert written(sample_run)["valid_v1"] == asdict(score_on(sample_run, V1))


def test_a_run_on_the_tuning_stories_of_the_first_edition_needs_another_corpus(
    sample_run, tmp_path
):
    change_data(sample_run, {"source": "tinystories_tuning", "holdout": 0.05})
    with pytest.raises(UserError, match=naming("data")):
        evaluate(sample_run, SHORT)
    sample = DataConfig(cache_dir=str(tmp_path / "cache"))
    evaluation = evaluate(sample_run, dataclasses.replace(SHORT, data=sample))
    assert evaluation.n_stories == len(STORIES[::7])
