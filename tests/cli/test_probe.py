import re

import pytest
import torch
from rich.console import Console

from minigpt.analysis.analogies import Analogy, Answers
from minigpt.analysis.embedding_map import MAP
from minigpt.analysis.embeddings import EmbeddingProbe
from minigpt.cli.tables import score_line, score_table, word_table
from minigpt.model import GPT, GPTConfig
from minigpt.runs.folder import Run
from minigpt.tokenizer import Tokenizer
from tests.cli.test_app import run_main
from tests.conftest import trained_folder

WORDS = ("king", "queen", "man", "woman", "apple")


@pytest.fixture(scope="module")
def probe() -> EmbeddingProbe:
    tokenizer = Tokenizer.train([f"the {a} {b}\n" for a in WORDS for b in WORDS] * 3, 330)
    king, man, woman, queen = (
        tokenizer.encode(f" {w}")[0] for w in ("king", "man", "woman", "queen")
    )
    matrix = torch.eye(tokenizer.vocab_size, 400)
    matrix[queen] = matrix[king] - matrix[man] + matrix[woman]
    return EmbeddingProbe(matrix, tokenizer)


def test_probe_tables_show_words_ranks_and_reasons(probe):
    answers = Answers(
        {},
        [
            Analogy("royal", "king − man + woman", "queen", 1, [("queen", 0.9), ("man", 0.1)]),
            Analogy("royal", "man − king + apple", "queen", 7, [("[b]the\n", 0.2)]),
            Analogy("size", "tall − a + b", "c", None, [], "'tall' is 2 tokens to this tokenizer"),
        ],
    )
    console = Console(record=True, width=100)
    console.print(score_table(answers), score_line(answers), sep="\n")
    console.print(word_table("Nearest to [b]king", [("queen", 0.58), ("\n", 0.1)]))
    text = console.export_text()
    assert re.search(r"'tall'.*\b2\b", text)
    assert re.search(r"\b1\b\D+\b2\b\D+\b1\b", score_line(answers))
    assert score_line(answers) in text
    assert "Nearest to [b]king" in text
    assert " [b]the\\n " in text
    assert "0.58" in text
    assert "\\n" in text


def test_probe_prints_tables_and_explains_split_words(tiny, monkeypatch, capsys):
    run = trained_folder(tiny)
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
