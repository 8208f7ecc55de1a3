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
    """Let the model write `ids`, with the same logits at each step."""

    def fixed(*_: object, **__: object) -> Iterator[Step]:
        return (Step(torch.tensor([i]), logits[None]) for i in ids)

    monkeypatch.setattr(playground_html, "generate", fixed)


def test_the_tokens_join_to_the_streamed_text(net, tokenizer):
    for seed in range(5):
        sampling = SamplingConfig(temperature=1.0, max_tokens=40, seed=seed)
        tokens = list(stream_tokens(net, tokenizer, "the dog", sampling))
        pieces = stream_text(net, tokenizer, "the dog", sampling)
        assert "".join(token.text for token in tokens) == "".join(pieces)
        assert len(tokens) > 5


def test_probability_rank_and_alternatives_are_the_models_own(monkeypatch, net, tokenizer):
    (dog,), (the,) = tokenizer.encode(" dog"), tokenizer.encode(" the")
    logits = torch.full((tokenizer.vocab_size,), -100.0)
    logits[[dog, the, 0]] = torch.tensor([0.2, 0.5, 0.3]).log()
    steps(monkeypatch, tokenizer, [dog, 0], logits)
    told, ended = stream_tokens(net, tokenizer, "x", SamplingConfig())
    assert (told.text, told.rank, ended.text, ended.rank) == (" dog", 3, "", 2)
    assert told.probability == pytest.approx(0.2)
    names, probabilities = zip(*told.alternatives, strict=True)
    assert names[:3] == ("the", token_name(tokenizer, 0), "dog")
    assert probabilities[:3] == pytest.approx((0.5, 0.3, 0.2))
    assert len(told.alternatives) == 5


def test_a_character_of_several_tokens_comes_whole(monkeypatch, net, tokenizer):
    pieces = tokenizer.encode("é")
    assert len(pieces) == 2
    steps(monkeypatch, tokenizer, [*pieces, pieces[0], 0], torch.zeros(tokenizer.vocab_size))
    whole, cut, ended = stream_tokens(net, tokenizer, "x", SamplingConfig())
    assert whole.text == "é"
    assert whole.probability == pytest.approx(tokenizer.vocab_size**-2)
    assert (cut.text, ended.text) == ("\N{REPLACEMENT CHARACTER}", "")


def test_a_token_is_named_so_that_it_can_be_read(tokenizer):
    (dog,), (newline,) = tokenizer.encode(" dog"), tokenizer.encode("\n")
    assert token_name(tokenizer, dog) == "dog"
    assert token_name(tokenizer, newline) == "↵"
    assert token_name(tokenizer, tokenizer.encode("d")[0]) == "…d"
    assert token_name(tokenizer, tokenizer.encode(" ")[0]) == "␣"
    assert re.fullmatch(r"\(.*\bcharacter\b.*\)", token_name(tokenizer, tokenizer.encode("é")[0]))
    assert re.fullmatch(r"\(.*\bend\b.*\)", token_name(tokenizer, 0))


def test_whatever_a_visitor_types_is_escaped():
    shown = [
        prompt_html(NASTY),
        note_html(NASTY, "error"),
        bars_html([(NASTY, 0.5)]),
        token_html(ShownToken(NASTY, 0.5, 1, ((NASTY, 0.5),))),
        attention_html([NASTY, NASTY], torch.eye(2)),
    ]
    for text in shown:
        assert "<script" not in text
        assert 'q"' not in text
        assert "script" in html.unescape(text) or "…" in text


def test_a_token_carries_what_the_panel_shows():
    shown = token_html(ShownToken(" dog", 0.25, 7, (("cat", 0.5),)))
    assert "--p:0.250" in shown
    assert json.loads(html.unescape(re.findall('data-details="([^"]*)"', shown)[0])) == {
        "p": 0.25, "rank": 7, "alternatives": [["cat", 0.5]],
    }  # fmt: skip
    assert re.search(r">[^<]*\bend\b[^<]*<", token_html(ShownToken("", 0.9, 1, ())))


def test_the_heatmap_has_a_cell_for_each_look_back():
    weights = torch.tensor([[1.0, 0, 0], [0.25, 0.75, 0], [0.5, 0.25, 0.25]])
    shown = attention_html(["a", "b", "c"], weights)
    assert shown.count("<title>") == 6
    assert re.search(r"<title>b\b[^<]*\ba\b[^<]*\b25\.0%</title>", shown)
    rows = json.loads(html.unescape(re.findall('data-rows="([^"]*)"', shown)[0]))
    assert rows == [[1.0], [0.25, 0.75], [0.5, 0.25, 0.25]]


def test_a_bar_is_as_long_as_the_cosine_and_never_negative():
    shown = bars_html([("mom", 0.6), ("zoo", -0.2)])
    assert re.findall(r"width:(\d+)%", shown) == ["60", "0"]
    assert "-0.20" in shown
