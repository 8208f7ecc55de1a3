"""Classes of tokens, and the loss by class, on a model of a few thousand parameters."""

from collections import Counter

import pytest
import torch

from minigpt.analysis.classes import (
    BANDS,
    CLASSES,
    NAMES,
    POSITIONS,
    PUNCTUATION,
    SPEECH,
    class_losses,
    scored_texts,
    token_counts,
)
from minigpt.model import GPT, GPTConfig
from minigpt.tokenizer import Tokenizer

STORY = 'One day, a girl named Lily met Tom. She said, "Hello Tom!" Then Lily ran home with Tom.'
LONG = " ".join([STORY] * 4)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([STORY] * 5, 300)


def net_of(tokenizer: Tokenizer, context: int = 256) -> GPT:
    torch.manual_seed(0)
    shape = GPTConfig(tokenizer.vocab_size, context, d_model=16, n_layers=2, n_heads=2, d_ff=16)
    return GPT(shape).eval()


def test_tokens_have_the_classes_of_their_text(tokenizer):
    counts = token_counts([STORY], tokenizer)
    (text,) = scored_texts([STORY], tokenizer, 5, 256, counts)
    pieces = [tokenizer.token(i) for i in text.ids[1:]]
    assert "".join(pieces) == STORY
    own: dict[str, list[str]] = {name: [] for name in CLASSES}
    for piece, classes in zip(pieces, text.classes, strict=True):
        for name in classes:
            own[name].append(piece)
    joined = {name: "".join(own[name]) for name in CLASSES}
    assert joined[NAMES[0]].split() == ["Lily", "Tom"]
    assert joined[NAMES[1]].split() == ["Tom", "Lily", "Tom"]
    assert joined[SPEECH].strip() == '"Hello Tom!"'
    assert set(joined[PUNCTUATION].replace(" ", "")) == set(',."!')
    assert len(own[POSITIONS[0]]) == 16
    assert sum(len(own[band]) for band in BANDS) == len(pieces)


def test_name_that_began_an_earlier_sentence_is_a_later_mention(tokenizer):
    story = "Lily met Tom. Tomorrow, she ran home with Lily. Ben met Tom and Ben. He met Anna."
    (text,) = scored_texts([story], tokenizer, 1, 256, {})
    pieces = [tokenizer.token(i) for i in text.ids[1:]]
    mentions = [
        "".join(p for p, classes in zip(pieces, text.classes, strict=True) if name in classes)
        for name in NAMES
    ]
    assert [mention.replace(" ", "") for mention in mentions] == ["TomAnna", "LilyTomBen"]


def test_classes_of_frequency_follow_the_counts(tokenizer, monkeypatch):
    monkeypatch.setattr("minigpt.analysis.classes.FREQUENT", 1)
    monkeypatch.setattr("minigpt.analysis.classes.KNOWN", 2)
    ids = tokenizer.encode(STORY)
    counts = Counter({ids[0]: 9, ids[1]: 5, ids[2]: 1})
    (text,) = scored_texts([STORY], tokenizer, 1, 3, counts)
    assert [(classes & set(BANDS)) for classes in text.classes] == [{band} for band in BANDS]


def test_losses_of_classes_are_means_of_the_loss_of_tokens(tokenizer):
    net = net_of(tokenizer)
    texts = scored_texts([STORY, LONG], tokenizer, 2, 256, {})
    losses = class_losses(net, texts)
    total, n = 0.0, 0
    for text in texts:
        ids = torch.tensor([text.ids])
        loss = net.loss(ids[:, :-1], ids[:, 1:]).item()
        total, n = total + loss * (len(text.ids) - 1), n + len(text.ids) - 1
    assert losses["all tokens"] == pytest.approx(total / n, rel=1e-5)
    assert losses[BANDS[0]] is None  # no token has a known frequency
    assert losses[BANDS[2]] == pytest.approx(losses["all tokens"])
