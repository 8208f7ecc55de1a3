"""Exports of a run: their weights, settings and numbers, and the verb."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import get_type_hints

import huggingface_hub
import pytest
import torch
import yaml

from minigpt.cli import app
from minigpt.core.settings import UserError, build
from minigpt.data.sources import bundled_sample
from minigpt.evaluation import EvaluationConfig, evaluate
from minigpt.evaluation.corpora import own_data
from minigpt.exporting import ExportConfig, export, exporter
from minigpt.runs.checkpoint import weights_fingerprint
from minigpt.runs.folder import Run
from minigpt.runs.provenance import Parent
from minigpt.runs.records import read_summary
from minigpt.scaling.results import find_runs, read_run
from minigpt.tokenizer import Tokenizer
from tests.cli.test_app import run_main
from tests.conftest import ROOT, naming
from tests.exporting.conftest import QUICK, card_of, contents, exported, row_of


def check_no_path_in(out: Path) -> None:
    """Check that no file in the folder contains a path of this machine."""
    own = yaml.safe_load((out / "../runs/tiny/config.yaml").read_text())
    for path in (
        out.parent,
        Path(own["data"]["cache_dir"]).parent,
        Path(app.__file__).parent.parent,
    ):
        for name, content in contents(out).items():
            assert os.fsencode(path) not in content, name


# ---------------------------------------------------------------------------- safetensors


def test_safetensors_export_is_a_run_without_paths(run, tmp_path, monkeypatch, capsys):
    out = exported(run, tmp_path / "release", format="safetensors")
    loaded, model = Run.load(out), Run.load(run).load_model()
    weights = loaded.load_model().state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weights[name], weight.bfloat16().float())
    assert loaded.tokenizer.fingerprint == Run.load(run).tokenizer.fingerprint
    assert Run.load(out / "model.safetensors") == loaded
    assert read_run(*find_runs([out])).tokens == 1280
    assert run_main(monkeypatch, "generate", str(out), "--max-tokens", "3") == 0
    assert "Once upon a time" in capsys.readouterr().out
    check_no_path_in(out)
    again = exported(out, tmp_path / "again", format="safetensors")  # from the export itself
    assert contents(again)["model.safetensors"] == contents(out)["model.safetensors"]


def test_tokens_are_those_of_the_checkpoint(run, tmp_path):
    content = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    content["global_step"] = 10
    torch.save(content, run / "checkpoints" / "best.ckpt")
    out = exported(run, tmp_path / "out", format="safetensors")
    assert read_run(out).tokens == 640
    assert row_of(card_of(out), "training tokens") == "640"


def test_export_of_own_texts_is_evaluated_on_other_texts(run, trained, tmp_path, monkeypatch):
    out = exported(run, tmp_path / "out", format="safetensors", dtype="float32")
    with pytest.raises(UserError, match=naming(str(out), "data", "data.valid_files")):
        evaluate(Run.load(out), QUICK)
    before = evaluate(Run.load(run), QUICK)
    data = {"source": "text", "valid_files": [str(trained.parents[1] / "valid.txt")]}
    data["cache_dir"] = str(tmp_path / "cache")
    config = build(EvaluationConfig, {"data": data, "stories": {"prompts": []}, "words": []}, "")
    files = contents(out)
    monkeypatch.chdir(tmp_path)
    after = evaluate(Run.load(out), config)
    assert contents(out) == files  # it may be part of a repository
    assert len(list(tmp_path.glob("evaluation-text-*.json"))) == 1
    evaluate(Run.load(out), config, out=tmp_path / "new")
    assert len(list((tmp_path / "new").glob("evaluation-text-*.json"))) == 1
    assert (after.perplexity, after.weights) == (before.perplexity, before.weights)


def test_source_and_name_of_the_tokenizer_stay_in_the_config(run, tmp_path):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {"source": "tinystories_sample", "train_files": [], "valid_files": []}
    config["data"] |= {key: str(tmp_path / "a folder" / key) for key in ("dataset", "tokenizer")}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    out = exported(run, tmp_path / "out", format="safetensors")
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["data"]["source"] == "tinystories_sample"
    assert "cache_dir" not in config["data"]
    assert config["data"]["tokenizer"] == "tokenizer"
    assert {"model", "optimizer", "trainer", "budget", "seed", "size"} <= config.keys()


def test_export_of_a_local_dataset_is_not_evaluated_on_one_of_the_same_name(run, tmp_path):
    config = yaml.safe_load((run / "config.yaml").read_text())
    for dataset, is_known in ((str(tmp_path / "wikitext"), False), ("owner/wikitext", True)):
        config["data"] |= {"source": "hf", "dataset": dataset, "train_files": []}
        config["data"] |= {"valid_files": []}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        out = exported(run, tmp_path / "out", format="safetensors")
        assert ("dataset" in Run.load(out).config["data"]) is is_known
        assert (own_data(Run.load(out).config) is not None) is is_known
        (command,) = re.findall("^minigpt evaluate .*", card_of(out), re.MULTILINE)
        assert ("data=text" in command) is not is_known


# ---------------------------------------------------------------------------- numbers


def test_evaluation_is_copied_only_for_the_same_weights(run, tmp_path):
    own = evaluate(Run.load(run), QUICK)
    exact = exported(run, tmp_path / "exact", format="safetensors", dtype="float32")
    assert row_of(card_of(exact), "validation perplexity") == f"**{own.perplexity:.3f}**"
    assert json.loads((exact / "evaluation.json").read_text())["weights"] == own.weights
    assert read_run(exact).perplexity == own.perplexity

    rounded = exported(run, tmp_path / "rounded", format="safetensors")
    assert not re.search(r"\d", row_of(card_of(rounded), "validation perplexity"))
    assert not (rounded / "evaluation.json").exists()
    assert read_run(rounded).perplexity is None


def test_evaluate_measures_the_rounded_weights(run, tmp_path):
    out = tmp_path / "out"
    export(Run.load(run), out, ExportConfig("safetensors", evaluate=True))
    measured = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert measured["weights"] == weights_fingerprint(Run.load(out).load_model())
    assert measured["weights"] != weights_fingerprint(Run.load(run).load_model())
    assert f"**{measured['perplexity']:.3f}**" == row_of(card_of(out), "validation perplexity")
    assert not (run / "evaluation.json").exists()
    check_no_path_in(out)
    hf = exported(out, tmp_path / "hf")  # float32 holds the rounded weights exactly
    assert f"**{measured['perplexity']:.3f}**" == row_of(card_of(hf), "validation perplexity")


def test_evaluation_that_lacks_a_number_is_named(run, tmp_path):
    evaluate(Run.load(run), QUICK)
    measured = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    for broken, name in (
        (measured | {"perplexity": "low"}, "perplexity"),
        ({"weights": measured["weights"]}, "nats_per_token"),
        (measured | {"data": "text"}, "data"),
    ):
        (run / "evaluation.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=naming("evaluation.json", name)):
            exported(run, tmp_path / "out")
    (run / "evaluation.json").write_text("[" * 200_000)  # not measured, then
    exported(run, tmp_path / "out")


def test_weights_are_hashed_once_and_the_tokenizer_is_read_once(run, tmp_path, monkeypatch):
    calls = []

    def counted(model: object) -> str:
        calls.append("weights")
        return weights_fingerprint(model)

    def load_tokenizer(path: Path) -> Tokenizer:
        calls.append("tokenizer")
        return original(path)

    original = Tokenizer.load
    monkeypatch.setattr(exporter, "weights_fingerprint", counted)
    monkeypatch.setattr(Tokenizer, "load", load_tokenizer)
    exported(run, tmp_path / "out", format="safetensors")
    assert sorted(calls) == ["tokenizer", "weights"]


def test_summary_of_an_older_run_is_cut_to_its_parent(run, tmp_path):
    parent = dataclasses.asdict(Parent("a", "0" * 32, 5, 1.0, ["text"]))
    older = {"path": "/home/me/a", "commits": ["c"], "commands": [["python", "train.py"]]}
    summary = read_summary(run) | {"init_from": parent | older}
    (run / "summary.json").write_text(json.dumps(summary))
    out = exported(run, tmp_path / "out", format="safetensors")
    content = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert "init_from" not in content["hyper_parameters"]
    assert read_summary(out)["init_from"] == parent


def test_lm_eval_document_holds_the_tokens_of_evaluation(run, tmp_path, monkeypatch, capsys):
    guide = (ROOT / "docs/sharing.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import json.*?)```", guide, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("runs/<name>", str(run)), {})
    first = int(capsys.readouterr().out.removeprefix("ID: "))
    tokenizer = Run.load(run).tokenizer
    (line,) = (tmp_path / "stories.jsonl").read_text(encoding="utf-8").splitlines()
    text = tokenizer.decode([first]) + json.loads(line)["text"]
    assert text.split("<|endoftext|>")[:-1] == list(bundled_sample().stories("valid"))


# ---------------------------------------------------------------------------- the verb


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--push", "me/tiny"), ("push", "me/tiny", "HF_TOKEN")),
        (("--push", "tiny"), ("push", "tiny", "user/name")),
        (("--push", "me/ti ny"), ("push", "me/ti ny", "user/name")),
        (("--dry-run",), ("--dry-run", "--push")),
        (("--private",), ("--private", "--push")),
        (("--license", "all mine"), ("license", "all mine", "mit")),
        (("--dtype", "bfloat16"), ("dtype", "bfloat16", "safetensors")),
        (("--format", "pt"), ("--format", "pt", "safetensors")),
    ],
)
def test_wrong_option_is_refused_before_anything_is_written(
    words, names, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    out = tmp_path / "out"
    assert run_main(monkeypatch, "export", "no-run", str(out), *words) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in names)
    assert not out.exists()


def test_verb_offers_the_formats_and_types_of_the_library():
    offered = get_type_hints(ExportConfig)
    assert offered["format"] == app.Format
    assert offered["dtype"] == app.Dtype | None
