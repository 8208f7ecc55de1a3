"""Tables for the terminal: numbers, and words with brackets and line ends."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from minigpt.analysis.analogies import Analogy, Answers
from minigpt.cli.tables import score_line, score_table, show, word_table
from minigpt.evaluation import evaluate
from minigpt.runs.folder import Run
from tests.evaluation.conftest import SHORT, untrained_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return untrained_run(tmp_path)


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


def test_tables_show_the_numbers_and_print_brackets_literally(run):
    evaluation = evaluate(Run.load(run), SHORT)
    console = Console(record=True, width=140, file=io.StringIO())
    show(evaluation, console)
    text = console.export_text()
    assert f"{evaluation.perplexity:.3f}" in text
    assert f"{evaluation.bits_per_byte:.4f}" in text
    assert evaluation.temperatures[0].stories[0]["text"].split()[0] in text
    assert "[crocodile]" in text
