import contextlib
import html
import random
import re
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from minigpt.analysis.embeddings import EmbeddingProbe
from minigpt.core.settings import UserError
from minigpt.model import GPT, GPTConfig
from minigpt.playground import answers
from minigpt.playground.answers import LoadedModel, Playground
from minigpt.playground.html import ShownToken
from minigpt.runs.folder import Run
from minigpt.tokenizer import Tokenizer
from tests.conftest import naming

USUAL = {"temperature": 0.8, "top_k": 0, "top_p": 1, "min_p": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the dog ran and the cat sat with mom and dad"] * 5, 300)


def model(name: str, tokenizer: Tokenizer, n_heads: int = 2) -> LoadedModel:
    torch.manual_seed(0)
    config = GPTConfig(tokenizer.vocab_size, 64, d_model=16, n_layers=2, n_heads=n_heads, d_ff=16)
    net = GPT(config).eval()
    return LoadedModel(name, net, tokenizer, EmbeddingProbe(net, tokenizer), "the map")


@pytest.fixture
def page(tokenizer) -> Playground:
    return Playground([model("a", tokenizer), model("b", tokenizer, n_heads=4)])


def plain(markup: str) -> str:
    return re.sub("<[^>]*>", "", markup)


def note_text(markup: str, kind: str = "note") -> str:
    """Return the text of the only note or error."""
    (line,) = re.findall(f'<div class="{kind}"[^>]*>([^<]*)</div>', markup)
    return html.unescape(line)


def test_page_loads_models_on_the_gpu(monkeypatch):
    devices, original = [], Run.load_model

    def load_model(self, device="cpu"):
        devices.append(device)
        return original(self)

    monkeypatch.setattr(Run, "load_model", load_model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    Playground.load([Run.load("releases/small")])
    assert devices == ["cuda"]


def test_story_grows_in_each_column_and_its_note_counts_tokens(page, monkeypatch):
    monkeypatch.setattr(answers, "UPDATE_SECONDS", 0)
    monkeypatch.setattr(random, "getrandbits", lambda n: 1)  # a seed whose story is not short
    updates = list(page.write("the dog", **USUAL))
    assert len(updates) > 5
    for column in zip(*updates, strict=True):
        assert all(later.startswith(earlier) for earlier, later in pairwise(column))
        assert plain(column[0]).startswith("the dog")
        assert column[0].count('class="token') == 1  # the first token is shown at once
        n = column[-1].count('class="token')
        assert re.search(naming(str(n), "tokens"), note_text(column[-1]))


def test_logits_that_are_not_finite_are_an_error_in_their_own_column(page):
    with torch.no_grad():
        page.models["a"].net.embedding.weight.fill_(float("nan"))
    broken, whole = list(page.write("the dog", **USUAL))[-1]
    assert "finite" in note_text(broken, "error")
    assert "tokens" in note_text(whole)


@pytest.mark.parametrize(
    ("message", "full"), [("out of memory\nand more", True), ("misaligned address", False)]
)
def test_full_gpu_is_an_error_in_its_own_column(page, monkeypatch, message, full):
    original = answers.html.stream_tokens

    def stream_tokens(net: GPT, *rest: object) -> Iterator[ShownToken]:
        if net is page.models["a"].net:
            raise RuntimeError(f"CUDA error: {message}")
        yield from original(net, *rest)

    monkeypatch.setattr(answers.html, "stream_tokens", stream_tokens)
    with contextlib.nullcontext() if full else pytest.raises(RuntimeError, match=message):
        *_, (first, second) = page.write("the dog", **USUAL)
        assert "memory" in note_text(first, "error")
        assert "tokens" in note_text(second)


def test_story_speed_excludes_other_models_and_the_page(page, monkeypatch):
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)

    def tokens(net: GPT, *_: object) -> Iterator[ShownToken]:
        for _ in range(5):
            clock.now += 1 if net is page.models["a"].net else 0.1
            yield ShownToken("dog", 1.0, 1, ())

    monkeypatch.setattr(answers, "time", clock)
    monkeypatch.setattr(answers.html, "stream_tokens", tokens)
    columns: tuple[str, ...] = ()
    for update in page.write("the dog", **USUAL):
        columns = update
        clock.now += 100  # time spent in the page
    numbers = [re.findall("[0-9]+", note_text(column)) for column in columns]
    assert numbers == [["5", "1"], ["5", "10"]]


def test_prompt_beyond_the_context_has_a_note(page):
    (*_, (story, _)) = page.write("the dog ran and " * 40, **USUAL)
    cut = note_text(story.partition('<span class="prompt">')[0])
    assert re.search(naming("64"), cut)
    assert len(re.findall("[0-9]+", cut)) == 2  # tokens of the prompt, and of the context


def test_sliders_reach_the_sampler(page):
    def stories(**changed: float) -> tuple[str, ...]:
        (*_, last) = page.write("the dog", **{**USUAL, **changed})
        return tuple(plain(column.partition('<div class="note"')[0]) for column in last)

    greedy = stories(temperature=0)
    assert stories(temperature=2, top_k=1) == stories(top_p=0.001) == greedy
    assert stories(min_p=1) == greedy
    assert stories(temperature=2) != greedy


@pytest.mark.parametrize(
    ("prompt", "changed", "names"),
    [
        (" \n", {}, ["type"]),
        ("x" * 1001, {}, ["1001", "1000"]),
        ("dog", {"max_tokens": 401}, ["401", "400"]),
        ("dog", {"temperature": -1}, ["temperature", "-1"]),
        ("\ud800", {}, ["surrogate"]),
    ],
)
def test_invalid_input_is_one_line_in_each_column(page, prompt, changed, names):
    (columns,) = page.write(prompt, **{**USUAL, **changed})
    assert len(columns) == 2
    for column in columns:
        assert re.search(naming(*names), note_text(column, "error"))
        assert "\n" not in column


def test_model_is_usable_after_a_stopped_story(page):
    story = page.write("the dog", **USUAL)
    next(story)
    story.close()
    assert not page.models["a"].net.training
    assert len(list(page.write("the dog", **USUAL))) >= 1


def test_neighbours_and_analogies_have_bars_or_an_error(page):
    assert page.neighbours("a", "dog").count("<tr>") == 8
    assert page.analogy("b", "dog - cat + mom").count("<tr>") == 8
    assert "zzz" in note_text(page.neighbours("a", "zzz"), "error")
    assert "dog" in note_text(page.analogy("a", "dog"), "error")
    assert "type" in note_text(page.neighbours("a", " "), "error")
    assert page.map("a") == "the map"


def test_attention_is_limited_and_an_error_names_layers_and_heads(page):
    attention = page.attention("b", "the dog ran", 2, 4)
    assert attention.count("data-row=") == 4
    assert "(start)" in attention
    for wrong, name in (((1, 3), "heads"), ((0, 1), "layers")):
        attention = page.attention("a", "the dog", *wrong)
        assert re.search(naming("a", "2", name), note_text(attention, "error"))
    long = page.attention("a", "dog " * 200, 1, 1)
    assert long.count("data-row=") == 48
    assert re.search(naming("48"), long.partition("</div>")[0])


def test_models_have_unique_names_and_are_loaded_once(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(Run, "load_model", lambda run, device: model("", tokenizer).net)
    monkeypatch.setattr(Run, "tokenizer", tokenizer)
    paths = [tmp_path / name for name in ("x/best.ckpt", "x/last.ckpt", "y/x/best.ckpt")]
    one, last, other = (Run(path.parent, path) for path in paths)
    names = list(Playground.load([one, one, last, other]).models)
    size = names[0].removeprefix("x ")
    assert names == [f"x {size}", f"x last {size}", f"x {size} again"]
    assert "parameters" in size
    no_map = note_text(Playground.load([one]).map(names[0]), "error")
    assert re.search(naming("2", "data.vocab_size"), no_map)
    with pytest.raises(UserError, match=naming("5", "4")):
        Playground.load([one] * 5)
