import html
import json
import re
from collections.abc import Iterator

import pytest
import torch

from minigpt.generation.sampling import SamplingConfig, Step, stream_text
from minigpt.model import GPT, GPTConfig
from minigpt.playground import html as playground_html
from minigpt.playground.html import (
    ShownToken,
    attention_html,
    bars_html,
    note_html,
    prompt_html,
    stream_tokens,
    token_html,
    token_name,
)
from minigpt.tokenizer import Tokenizer

NASTY = "<script>alert('x')</script> & \"q\""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the dog ran\n and the dog sat"] * 5, 280)


@pytest.fixture
def net(tokenizer) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(tokenizer.vocab_size, 32, d_model=16, n_layers=1, n_heads=2, d_ff=16))


def steps(monkeypatch, tokenizer: Tokenizer, ids: list[int], logits: torch.Tensor) -> None:
    """Make the model write `ids`, with the same logits at each step."""

    def fixed(*_: object, **__: object) -> Iterator[Step]:
        return (Step(torch.tensor([i]), logits[None]) for i in ids)

    monkeypatch.setattr(playground_html, "generate", fixed)


def test_tokens_concatenate_to_the_streamed_text(net, tokenizer):
    for seed in range(5):
        sampling = SamplingConfig(temperature=1.0, max_tokens=40, seed=seed)
        tokens = list(stream_tokens(net, tokenizer, "the dog", sampling))
        pieces = stream_text(net, tokenizer, "the dog", sampling)
        assert "".join(token.text for token in tokens) == "".join(pieces)
        assert len(tokens) > 5


def test_probability_rank_and_alternatives_are_those_of_the_model(monkeypatch, net, tokenizer):
    (dog,), (the,) = tokenizer.encode(" dog"), tokenizer.encode(" the")
    logits = torch.full((tokenizer.vocab_size,), -100.0)
    logits[[dog, the, 0]] = torch.tensor([0.2, 0.5, 0.3]).log()
    steps(monkeypatch, tokenizer, [dog, 0], logits)
    token, end = stream_tokens(net, tokenizer, "x", SamplingConfig())
    assert (token.text, token.rank, end.text, end.rank) == (" dog", 3, "", 2)
    assert token.probability == pytest.approx(0.2)
    names, probabilities = zip(*token.alternatives, strict=True)
    assert names[:3] == ("the", token_name(tokenizer, 0), "dog")
    assert probabilities[:3] == pytest.approx((0.5, 0.3, 0.2))
    assert len(token.alternatives) == 5


def test_character_of_several_tokens_is_one_shown_token(monkeypatch, net, tokenizer):
    pieces = tokenizer.encode("é")
    assert len(pieces) == 2
    steps(monkeypatch, tokenizer, [*pieces, pieces[0], 0], torch.zeros(tokenizer.vocab_size))
    whole, cut, end = stream_tokens(net, tokenizer, "x", SamplingConfig())
    assert whole.text == "é"
    assert whole.probability == pytest.approx(tokenizer.vocab_size**-2)
    assert (cut.text, end.text) == ("\N{REPLACEMENT CHARACTER}", "")


def test_token_name_is_readable(tokenizer):
    (dog,), (newline,) = tokenizer.encode(" dog"), tokenizer.encode("\n")
    assert token_name(tokenizer, dog) == "dog"
    assert token_name(tokenizer, newline) == "↵"
    assert token_name(tokenizer, tokenizer.encode("d")[0]) == "…d"
    assert token_name(tokenizer, tokenizer.encode(" ")[0]) == "␣"
    assert re.fullmatch(r"\(.*\bcharacter\b.*\)", token_name(tokenizer, tokenizer.encode("é")[0]))
    assert re.fullmatch(r"\(.*\bend\b.*\)", token_name(tokenizer, 0))


def test_note_in_a_story_has_its_own_direction():
    assert 'dir="auto"' in note_html("Only its end is read.")


def test_text_of_visitors_is_escaped():
    parts = [
        prompt_html(NASTY),
        note_html(NASTY, "error"),
        bars_html([(NASTY, 0.5)]),
        token_html(ShownToken(NASTY, 0.5, 1, ((NASTY, 0.5),))),
        attention_html([NASTY, NASTY], torch.eye(2)),
    ]
    for text in parts:
        assert "<script" not in text
        assert 'q"' not in text
        assert "script" in html.unescape(text) or "…" in text


def test_token_holds_the_details_of_the_panel():
    markup = token_html(ShownToken(" dog", 0.25, 7, (("cat", 0.5),)))
    assert "--p:0.250" in markup
    assert json.loads(html.unescape(re.findall('data-details="([^"]*)"', markup)[0])) == {
        "p": 0.25, "rank": 7, "alternatives": [["cat", 0.5]],
    }  # fmt: skip
    assert re.search(r">[^<]*\bend\b[^<]*<", token_html(ShownToken("", 0.9, 1, ())))


def test_heatmap_has_a_cell_for_each_pair_of_tokens():
    weights = torch.tensor([[1.0, 0, 0], [0.25, 0.75, 0], [0.5, 0.25, 0.25]])
    markup = attention_html(["a", "b", "c"], weights)
    assert markup.count("<title>") == 6
    assert re.search(r"<title>b\b[^<]*\ba\b[^<]*\b25\.0%</title>", markup)
    rows = json.loads(html.unescape(re.findall('data-rows="([^"]*)"', markup)[0]))
    assert rows == [[1.0], [0.25, 0.75], [0.5, 0.25, 0.25]]


def test_bar_is_as_long_as_the_cosine_and_never_negative():
    markup = bars_html([("mom", 0.6), ("zoo", -0.2)])
    assert re.findall(r"width:(\d+)%", markup) == ["60", "0"]
    assert "-0.20" in markup
