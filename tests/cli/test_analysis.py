"""The verbs that study runs: probe, scaling and study."""

import json
import re

import torch

from minigpt.analysis.embedding_map import MAP
from minigpt.model import GPT, GPTConfig
from minigpt.runs.folder import Run
from tests.cli.test_app import run_main
from tests.run_folder import write_run


def test_probe_prints_tables_and_explains_split_words(tiny, trained_once, monkeypatch, capsys):
    run = trained_once([*tiny, "name=parent"])
    words = ("--near", "Mom", "--near", "dadaists", "--analogy", "Mom - was + a")
    capsys.readouterr()
    assert run_main(monkeypatch, "probe", str(run), *words) == 2
    out, err = capsys.readouterr()
    assert re.search(r"\bMom (?!-)", out)
    assert "Mom - was + a" in out
    assert "map" in out  # the reason why there is none
    assert not (run / MAP).exists()
    assert err.startswith("error: ")
    assert "dadaists" in err
    assert err.count("\n") == 1
    unquoted = ("--analogy", "Mom", "-", "was", "+", "a")
    assert run_main(monkeypatch, "probe", str(run), *unquoted) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert run_main(monkeypatch, "probe", str(run)) == 0
    assert re.search(r"\b0\b\D+\b0\b", capsys.readouterr().out)


def test_probe_writes_the_map_into_the_run_or_elsewhere(tmp_path, probe, monkeypatch, capsys):
    matrix = torch.eye(probe.tokenizer.vocab_size, 8)
    config = GPTConfig(len(matrix), 8, d_model=8, n_layers=1, n_heads=2, d_ff=8)
    trained = Run(tmp_path / "run", tmp_path / "run")
    monkeypatch.setattr(Run, "load", lambda path, model=None: trained)
    monkeypatch.setattr(Run, "load_model", lambda run: GPT(config))
    monkeypatch.setattr(Run, "tokenizer", probe.tokenizer)
    assert run_main(monkeypatch, "probe", "run", "--near", "king") == 0
    assert (tmp_path / "run" / MAP).is_file()
    assert run_main(monkeypatch, "probe", "run", "--out", str(tmp_path / "out")) == 0
    assert (tmp_path / "out" / MAP).is_file()
    released = tmp_path / "release"
    export = Run(released, released / "model.safetensors")
    monkeypatch.setattr(Run, "load", lambda path, model=None: export)
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, "probe", "release") == 0
    assert (tmp_path / MAP).is_file()
    assert not released.exists()
    assert MAP in capsys.readouterr().out


def test_scaling_prints_the_table_and_writes_into_the_first_folder(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "first")
    assert run_main(monkeypatch, "scaling", str(tmp_path)) == 0
    output = capsys.readouterr().out
    assert "first" in output
    assert "66.69" in output
    assert "17.75" in output
    assert {"scaling.md", "scaling.png", "scaling.json"} <= {p.name for p in tmp_path.iterdir()}


def test_scaling_out_names_the_output_folder(tmp_path, monkeypatch):
    run = write_run(tmp_path / "first")
    (run / "best.ckpt").touch()  # not read: it stands for its run
    both = str(run / "best.ckpt"), str(run)
    assert run_main(monkeypatch, "scaling", *both, "--out", str(tmp_path / "out")) == 0
    assert (tmp_path / "out" / "scaling.png").is_file()
    assert not (run / "scaling.png").exists()


def test_scaling_is_reproduced_from_kept_records(tmp_path, monkeypatch):
    write_run(tmp_path / "runs" / "first")
    write_run(tmp_path / "runs" / "killed", summary=None)
    copies, out = tmp_path / "kept", tmp_path / "out"
    words = ("scaling", str(tmp_path / "runs"), "--out", str(out), "--keep", str(copies))
    assert run_main(monkeypatch, *words) == 0
    assert [folder.name for folder in copies.iterdir()] == ["first"]
    assert run_main(monkeypatch, "scaling", str(copies), "--out", str(tmp_path / "again")) == 0
    first, again = (
        json.loads((folder / "scaling.json").read_text(encoding="utf-8"))["runs"]
        for folder in (out, tmp_path / "again")
    )
    assert [run for run in first if run["status"] == "finished"] == again


def test_study_names_a_missing_run(tmp_path, monkeypatch, capsys):
    assert run_main(monkeypatch, "study", str(tmp_path / "nowhere")) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert str(tmp_path / "nowhere") in err
