import dataclasses
import io
import json
import logging
import math
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from minigpt.cli.tables import show
from minigpt.core import hardware
from minigpt.core.settings import UserError, build
from minigpt.data import sources
from minigpt.data.config import DataConfig
from minigpt.data.corpus import Corpus
from minigpt.evaluation import EvaluationConfig, StoriesConfig, corpora, evaluate, evaluate_loss
from minigpt.evaluation.corpora import own_data
from minigpt.evaluation.evaluator import _hardware
from minigpt.evaluation.loss import Score
from minigpt.evaluation.stories import write_stories
from minigpt.runs.folder import Run
from minigpt.tokenizer import Tokenizer
from tests import commands
from tests.conftest import naming
from tests.evaluation.conftest import TINY, make_net, out_of_memory

STORIES = [f"The {a} saw a {b}. [{a}]" for a in ("dog", "cat") for b in ("fox", "hen", "pig")] * 5


def test_out_of_memory_names_the_number_of_stories(monkeypatch):
    tokenizer = Tokenizer.train(STORIES, 290)
    monkeypatch.setattr("minigpt.generation.sampling.Decoder", out_of_memory)
    with pytest.raises(UserError, match=naming("stories.n=4", "stories.n=2")):
        write_stories(make_net(), tokenizer, StoriesConfig(), seed=1)


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


# ---------------------------------------------------------------------------- a whole run


def write_text_corpus(path: Path, stories: list[str]) -> str:
    path.write_text("".join(f"{story}\n<|endoftext|>\n" for story in stories), encoding="utf-8")
    return str(path)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder as train.py writes it, of an untrained model."""
    folder = tmp_path / "runs" / "tiny"
    (folder / "checkpoints").mkdir(parents=True)
    net = make_net()
    torch.save(
        {
            "state_dict": {f"net.{name}": weight for name, weight in net.state_dict().items()},
            "hyper_parameters": {"model": asdict(TINY)},
        },
        folder / "checkpoints" / "best.ckpt",
    )
    Tokenizer.train(STORIES, 290).save(folder / "tokenizer.json")
    data = {
        "source": "text",
        "train_files": [write_text_corpus(tmp_path / "train.txt", STORIES)],
        "valid_files": [write_text_corpus(tmp_path / "valid.txt", STORIES[::7])],
        "cache_dir": str(tmp_path / "cache"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data, "model": asdict(TINY)}))
    (folder / "summary.json").write_text('{"precision": "32-true"}')
    return folder


SHORT = EvaluationConfig(
    stories=StoriesConfig(("The",), (0.5, 1.2), n=2, max_tokens=12),
    words=("dog", "[crocodile]"),
    analogies=(("dog", "cat", "hen"), ("dog", "cat", "crocodile")),
)


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


def test_config_without_data_settings_is_an_error_and_not_a_traceback():
    for config in ({}, {"data": None}, {"data": "text"}):
        with pytest.raises(UserError, match=naming("config.yaml", "data")):
            own_data(config)


def test_prompts_do_not_share_random_numbers(run):
    net, tokenizer = Run.load(run).load_model(), Run.load(run).tokenizer
    with torch.no_grad():
        net.embedding.weight.zero_()  # equal logits: the text depends on the random numbers alone
    config = StoriesConfig(("The dog", "The cat"), (0.5, 1.2), n=2, max_tokens=20)
    cold, hot = ([s["text"] for s in group] for group in write_stories(net, tokenizer, config, 1))
    assert len(set(cold)) == 4
    assert cold == hot


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


# ---------------------------------------------------------------------------- the bundled sample

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


def written(run: Path, name: str = "evaluation.json") -> dict:
    return json.loads((run / name).read_text(encoding="utf-8"))


def test_both_validation_texts_of_the_sample_are_scored_with_v2_at_the_top(sample_run):
    evaluation = evaluate(sample_run, SHORT)
    v2, v1 = score_on(sample_run, STORIES[::7]), score_on(sample_run, V1)
    assert (numbers_of(evaluation), evaluation.valid_v1) == (v2, v1)
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


def test_command_refuses_valid_on_another_corpus(run, tmp_path):
    process = commands.run("evaluate.py", ["ckpt=runs/tiny", "valid=both"], tmp_path)
    assert process.code == 2
    (line,) = process.err.strip().splitlines()
    assert line.startswith("error: valid=both")


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


# ---------------------------------------------------------------------------- what is shown


def test_tables_show_the_numbers_and_print_brackets_literally(run):
    evaluation = evaluate(Run.load(run), SHORT)
    console = Console(record=True, width=140, file=io.StringIO())
    show(evaluation, console)
    text = console.export_text()
    assert f"{evaluation.perplexity:.3f}" in text
    assert f"{evaluation.bits_per_byte:.4f}" in text
    assert evaluation.temperatures[0].stories[0]["text"].split()[0] in text
    assert "[crocodile]" in text


def test_command_prints_the_evaluation_and_leaves_no_other_files(run, tmp_path):
    before = {path.name for path in tmp_path.iterdir()} | {"cache"}
    x = write_text_corpus(tmp_path / "x.txt", ["The hen saw a pig."])
    overrides = [
        "ckpt=runs/tiny", "data=text", f"data.valid_files=[{x}]", "stories.max_tokens=5",
        f"data.cache_dir={tmp_path / 'cache'}", "stride=4",
    ]  # fmt: skip
    process = commands.run("evaluate.py", overrides, tmp_path)
    assert process.code == 0, process.err
    assert "perplexity" in process.out
    record = written(run, "evaluation-text-stride4.json")
    assert record["stride"] == 4
    assert record["data"]["valid_files"] == [x]
    assert {path.name for path in tmp_path.iterdir()} == before | {"x.txt"}


def test_output_folder_that_cannot_be_written_is_refused_before_measuring(
    run, tmp_path, monkeypatch
):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr(Run, "load_model", lambda _: pytest.fail("measured"))
    with pytest.raises(UserError, match=naming("evaluation.json", str(file), "out")):
        evaluate(Run.load(run), EvaluationConfig(), out=file)


def test_command_without_a_run_prints_what_to_type(tmp_path):
    process = commands.run("evaluate.py", [], tmp_path)
    assert process.code == 2
    (line,) = process.err.strip().splitlines()
    assert line.startswith("error: ")
    assert "evaluate.py ckpt=runs/" in line


def test_changed_validation_stories_are_warned_about(run, caplog):
    few = EvaluationConfig(stories=StoriesConfig(prompts=()), words=(), analogies=())
    evaluate(run, few)
    assert not any(record.levelno == logging.WARNING for record in caplog.records)
    (run / "summary.json").write_text(json.dumps({"valid_tokens": 7_654_321}))
    evaluate(run, few)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "7,654,321" in record.getMessage()
