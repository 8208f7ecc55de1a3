import re

import torch

from minigpt.analysis import analogies
from minigpt.analysis.analogies import Analogy, Answers
from minigpt.analysis.embeddings import EmbeddingProbe
from minigpt.tokenizer import Tokenizer
from tests.conftest import naming


def test_rank_is_the_position_of_the_expected_answer(monkeypatch):
    words = ("prince", "princess", "girl", "boy", "king")
    tokenizer = Tokenizer.train([f"a {a} {b} a" for a in words for b in words] * 5, 330)
    matrix = torch.eye(tokenizer.vocab_size, 400)
    ids = {word: tokenizer.encode(f" {word}")[0] for word in words}
    target = matrix[ids["princess"]] - matrix[ids["girl"]] + matrix[ids["boy"]]
    matrix[ids["king"]] = target
    matrix[ids["prince"]] = target + matrix[ids["prince"]]
    monkeypatch.setattr(analogies, "WORDS", ("prince", "dad"))
    answers = analogies.ask(EmbeddingProbe(matrix, tokenizer))
    first = answers.analogies[0]
    assert (first.question, first.expected, first.rank) == ("princess − girl + boy", "prince", 2)
    assert [word for word, _ in first.top[:2]] == ["king", "prince"]
    second = answers.analogies[1]
    assert second.rank is None
    assert re.search(naming("'dad'", "4"), second.problem or "")
    assert answers.summary["asked"] == 1
    assert answers.summary["first"] == 0
    assert answers.summary["among five"] == 1
    text = analogies.markdown({"one": answers})
    assert "| gender | princess − girl + boy | prince | 2 (king 1.00) |" in text
    assert "| one | 1 | 0 % | 100 % | 2 |" in text


def test_token_with_a_line_break_stays_in_its_cell():
    top = [("\n", 0.5), ("|", 0.25), ("", 0.1)]
    answers = Answers({"dad": top}, [Analogy("gender", "a − b + c", "d", 3, top)])
    text = analogies.markdown({"one": answers})
    assert "| dad | \\n 0.50, \\| 0.25, (a space) 0.10 |\n" in text
    assert "| gender | a − b + c | d | 3 (\\n 0.50) |\n" in text


def test_analogies_are_twenty_of_five_kinds():
    assert list(analogies.ANALOGIES) == ["gender", "royal", "plural", "tense", "opposite"]
    every = [words for group in analogies.ANALOGIES.values() for words in group]
    assert len(set(every)) == 20
    assert all(len(set(words)) == 4 for words in every)
