import math

import pytest
import torch
import torch.nn.functional as F

from minigpt.analysis.coherence import (
    Continuation,
    Opening,
    coherence,
    original_continuations,
    score,
    story_openings,
    write_continuations,
)
from minigpt.core.settings import UserError
from minigpt.data.sources import bundled_sample
from minigpt.model import GPT, GPTConfig
from minigpt.tokenizer import Tokenizer
from tests.conftest import naming

STORIES = [
    "Once there was a girl named Lily. Lily ran to Tom.",
    "The sun was up. A boy named Max woke.",  # names nobody in its first sentence
    "Here is a cat called Kitty. It ate. It slept.",
    "There was a dog named Lily, and a cat. It barked.",  # the name does not end the sentence
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(STORIES * 5, 300)


def continuation(text: str, name: str = "Lily", ended: bool = True) -> Continuation:
    return Continuation(Opening(f"A girl named {name}.", name, (0, 1), ""), (), text, ended)


def test_openings_are_first_sentences_that_end_in_a_name(tokenizer):
    openings = story_openings(STORIES, tokenizer, 2, 40)
    assert [(o.text, o.name) for o in openings] == [
        ("Once there was a girl named Lily.", "Lily"),
        ("Here is a cat called Kitty.", "Kitty"),
    ]
    assert openings[1].rest == " It ate. It slept."
    assert openings[0].ids == (0, *tokenizer.encode("Once there was a girl named Lily."))
    with pytest.raises(UserError, match=naming("2", "3", "20")):
        story_openings(STORIES, tokenizer, 3, 40)
    with pytest.raises(UserError, match=naming("context", "2")) as error:
        story_openings(STORIES, tokenizer, 1, 4)
    assert error.value.argument is None  # no number would help


def test_validation_split_has_enough_openings(tokenizer):
    openings = story_openings(bundled_sample().stories("valid"), tokenizer, 1000, 256)
    assert sum(o.text.startswith("Once upon a time") for o in openings) > 500


def test_protagonist_retention_is_of_the_last_third():
    stories = [
        continuation("one two three four five Lily's"),
        continuation("Lily two three four five six"),  # the first third
        continuation("one two three four Lilypad six"),
        continuation("she LILY"),
        continuation(""),  # no words: left out
    ]
    assert coherence(stories).protagonist_retention == 2 / 4


def test_names_are_capitalised_words_inside_sentences():
    story = continuation(
        ' Then Tom met Anna. "Hi," said Tom. Anna, Lily and Ben saw I-don\'t. Sue ran.'
    )
    measures = coherence([story])
    assert measures.names == 3  # Tom, Anna, Ben; not the opening's Lily, and not Sue
    assert measures.name_recurrence == pytest.approx(2 / 3)  # Ben does not come again
    assert coherence([continuation("no one here")]).name_recurrence is None
    assert coherence([story, continuation("on and on", ended=False)]).unfinished == 0.5


@pytest.fixture(scope="module")
def net(tokenizer) -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig(tokenizer.vocab_size, 40, d_model=16, n_layers=1, n_heads=2, d_ff=16)
    ).eval()


def test_continuations_are_in_order_and_fill_the_context(net, tokenizer):
    openings = story_openings(STORIES, tokenizer, 2, 40) * 3
    stories = write_continuations(net, tokenizer, openings, 1.0, seed=1)
    assert [s.opening for s in stories] == openings
    assert len({s.text for s in stories}) > 1
    for story in stories:
        capacity = 40 - len(story.opening.ids)
        assert len(story.ids) < capacity if story.ended else len(story.ids) == capacity
        assert 0 not in story.ids
        assert story.text == tokenizer.decode(story.ids)
    again = write_continuations(net, tokenizer, openings, 1.0, seed=1)
    assert again == stories != write_continuations(net, tokenizer, openings, 1.0, seed=2)


def test_original_continuations_are_cut_where_the_context_ends(tokenizer):
    openings = story_openings(STORIES, tokenizer, 2, 40)
    rest = len(tokenizer.encode(openings[0].rest))
    whole = len(openings[0].ids) + rest + 1  # and the end-of-text
    for context, ended in ((whole, True), (whole - 1, False)):
        story, _ = original_continuations(openings, tokenizer, context)
        assert (story.ended, len(story.ids)) == (ended, rest)
    story, _ = original_continuations(openings, tokenizer, whole - 3)
    assert openings[0].rest.startswith(story.text)
    assert len(story.ids) == rest - 2


def test_score_is_of_the_continuation_and_its_end_alone(net, tokenizer):
    openings = story_openings(STORIES, tokenizer, 2, 40)
    stories = original_continuations(openings, tokenizer, 40)
    nats, n = 0.0, 0
    for s in stories:
        whole = [*s.opening.ids, *s.ids, *([0] if s.ended else [])]
        logits = net(torch.tensor([whole[:-1]]))[0]
        begin = len(s.opening.ids)
        targets = torch.tensor(whole[begin:])
        nats += F.cross_entropy(logits[begin - 1 :], targets, reduction="sum").item()
        n += len(targets)
    assert len({len(s.opening.ids) + len(s.ids) for s in stories}) == 2  # so that one row is padded
    assert score(net, stories, 0) == pytest.approx(math.exp(nats / n), rel=1e-5)
