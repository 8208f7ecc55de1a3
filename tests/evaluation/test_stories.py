"""Stories that an evaluation generates."""

import pytest
import torch

from minigpt.core.settings import UserError
from minigpt.evaluation import StoriesConfig
from minigpt.evaluation.stories import write_stories
from minigpt.runs.folder import Run
from minigpt.tokenizer import Tokenizer
from tests.conftest import naming
from tests.evaluation.conftest import STORIES, make_net, out_of_memory


def test_out_of_memory_names_the_number_of_stories(monkeypatch):
    tokenizer = Tokenizer.train(STORIES, 290)
    monkeypatch.setattr("minigpt.generation.sampling.Decoder", out_of_memory)
    with pytest.raises(UserError, match=naming("stories.n=4", "stories.n=2")):
        write_stories(make_net(), tokenizer, StoriesConfig(), seed=1)


def test_prompts_do_not_share_random_numbers(run):
    net, tokenizer = Run.load(run).load_model(), Run.load(run).tokenizer
    with torch.no_grad():
        net.embedding.weight.zero_()  # equal logits: the text depends on the random numbers alone
    config = StoriesConfig(("The dog", "The cat"), (0.5, 1.2), n=2, max_tokens=20)
    cold, hot = ([s["text"] for s in group] for group in write_stories(net, tokenizer, config, 1))
    assert len(set(cold)) == 4
    assert cold == hot
