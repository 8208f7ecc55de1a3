import html
import re

import pytest
import torch

from minigpt.analysis.activations import activations
from minigpt.analysis.attention import head_scores
from minigpt.analysis.embeddings import EmbeddingProbe
from minigpt.analysis.lens import logit_attribution, logit_lens
from minigpt.model import GPT, GPTConfig
from minigpt.playground import inside
from minigpt.playground.answers import LoadedModel, Playground
from minigpt.playground.html import token_name
from minigpt.tokenizer import Tokenizer
from tests.conftest import naming

TEXT = "the dog ran"


class Louder(GPT):
    """A model whose logits `logit_lens` cannot split."""

    def hidden(self, ids, cache=None):
        return 2 * super().hidden(ids, cache)


@pytest.fixture(scope="module")
def page() -> Playground:
    tokenizer = Tokenizer.train(["the dog ran and the <cat> sat with mom and dad"] * 5, 300)
    models = []
    for name, kind in (("plain", GPT), ("louder", Louder)):
        torch.manual_seed(0)
        config = GPTConfig(tokenizer.vocab_size + 5, 64, d_model=16, n_layers=2, n_heads=4, d_ff=16)
        net = kind(config).eval().requires_grad_(False)
        models.append(LoadedModel(name, net, tokenizer, EmbeddingProbe(net, tokenizer), ""))
    return Playground(models)


def cells(markup: str) -> list[list[str]]:
    """Return the texts of the cells of a table, without its headings."""
    rows = markup.split("<tbody>")[1].split("</tr>")[:-1]
    return [[html.unescape(text) for text in re.findall("<td[^>]*>([^<]*)", row)] for row in rows]


def test_lens_shows_the_top_token_of_each_layer(page):
    model = page.models["plain"]
    ids = torch.tensor([[0, *model.tokenizer.encode(TEXT)]])
    table = cells(inside.lens(page, "plain", TEXT))
    assert (len(table), {len(row) for row in table}) == (3, {ids.shape[1]})
    best = logit_lens(model.net, ids)[..., : model.tokenizer.vocab_size].argmax(-1)
    assert table == [[token_name(model.tokenizer, i) for i in row] for row in best.tolist()]


@pytest.mark.parametrize("position", [1, 3])
def test_attribution_shows_the_part_of_each_head(page, position):
    model = page.models["plain"]
    ids = torch.tensor([[0, *model.tokenizer.encode(TEXT)]])
    markup = inside.attribution(page, "plain", TEXT, position)
    table = cells(markup)
    parts = logit_attribution(model.net, ids, ids[0].roll(-1))
    for layer, row in enumerate(table):
        expected = [*parts.heads[layer, :, position - 1].tolist()]
        expected += [parts.attention_bias[layer, position - 1].item()]
        expected += [parts.feed_forward[layer, position - 1].item()]
        assert [float(cell) for cell in row] == pytest.approx(expected, abs=0.006)
    assert re.search(rf"{parts.total[position - 1]:+.2f}".replace("+", r"\+"), markup)


def test_activity_shows_the_size_of_each_part(page):
    model = page.models["plain"]
    ids = torch.tensor([[0, *model.tokenizer.encode(TEXT)]])
    markup = inside.activity(page, "plain", TEXT)
    names = re.findall('<th scope="row">([^<]*)', markup)
    assert names == [
        f"blocks.{i}.{part}" for i in range(2) for part in ("input", "attention", "feed_forward")
    ] + ["residual"]
    values = activations(model.net, ids)
    for name, row in zip(names, cells(markup), strict=True):
        sizes = values[name][0].square().mean(-1).sqrt().tolist()
        assert [float(cell) for cell in row] == pytest.approx(sizes, abs=0.006)


def test_long_texts_are_cut_and_markup_is_escaped(page):
    assert len(cells(inside.lens(page, "plain", "dog " * 90))[0]) == inside.MAX_COLUMNS
    assert "<cat>" not in inside.lens(page, "plain", "the <cat> sat")


@pytest.mark.parametrize(
    ("name", "text", "position", "word"),
    [("plain", " ", 1, "sentence"), ("plain", TEXT, 99, "position"), ("louder", TEXT, 1, "Louder")],
)
def test_invalid_input_is_one_line(page, name, text, position, word):
    markup = inside.attribution(page, name, text, position)
    (line,) = re.findall('<div class="error"[^>]*>([^<]*)</div>', markup)
    assert re.search(naming(word), line)


def test_scores_of_all_heads_are_two_tables(page):
    scores = head_scores(page.models["plain"].net)
    markup = inside.scores_html(scores)
    tables = markup.split("<tbody>")[1:]
    for table, values in zip(tables, (scores.previous_token, scores.induction), strict=True):
        shown = [float(text) for text in re.findall(r"<td[^>]*>([\d.]+)", table)]
        assert shown == pytest.approx(values.flatten().tolist(), abs=0.006)
    assert "<table" not in inside.scores_html(None)
