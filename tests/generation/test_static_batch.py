"""Decoding with a static cache, as on a GPU, gives the logits of full passes; here on a CPU."""

import math

import pytest
import torch

from minigpt.generation import decoder, sampling
from minigpt.generation.sampling import SamplingConfig, generate, generate_stories
from minigpt.generation.static_batch import StaticBatch
from minigpt.tokenizer import Tokenizer
from tests.generation.test_decoder import check_windows, make_model
from tests.generation.test_sampling import make_model as model_of_size
from tests.syncs import SyncCounter


@pytest.fixture
def static(monkeypatch) -> None:
    monkeypatch.setattr(decoder, "_batch", lambda model, n, backend: StaticBatch(model, n))


@pytest.mark.parametrize("context", [1, 2, 16])
@pytest.mark.parametrize("lengths", [[4, 4, 4], [0, 0], [0, 15, 3, 16, 9, 17, 40]])
@torch.inference_mode()
def test_logits_of_a_static_cache_equal_full_passes(context, lengths, static):
    check_windows(make_model(context), lengths, "torch")


def test_static_cache_and_growing_cache_give_the_same_tokens_for_a_seed(monkeypatch):
    model, sampling = make_model(), SamplingConfig(0.9, max_tokens=40, seed=5, backend="torch")
    prompts = [[0, 3, 7], [0, 8]]

    def tokens() -> torch.Tensor:
        return torch.stack([step.ids for step in generate(model, prompts, sampling, -1)])

    expected = tokens()
    monkeypatch.setattr(decoder, "_batch", lambda model, n, backend: StaticBatch(model, n))
    assert torch.equal(tokens(), expected)


@pytest.fixture
def like_a_gpu(static, monkeypatch) -> None:
    """Decode with the static cache, look at the tokens every 16 steps, and in larger batches."""
    monkeypatch.setattr(sampling, "look_interval", lambda device: 16)
    monkeypatch.setattr(sampling, "sequences_at_once", lambda model, on_cpu: 4 * on_cpu)


def test_a_seed_gives_the_stories_of_the_cpu_whatever_the_batch(monkeypatch, request):
    tokenizer = Tokenizer.train(["Once upon a time there was a dragon."], 270)
    # In float32, rounding depends on the batch and the CPU, and can change a token.
    model = model_of_size(tokenizer.vocab_size).double()
    with torch.no_grad():  # some stories end early, others reach max_tokens
        model.embedding.weight[tokenizer.end_of_text] = model.final_norm.bias
    settings = SamplingConfig(1.3, max_tokens=37, seed=2, backend="torch", repetition_penalty=1.2)
    monkeypatch.setattr(sampling, "GROUP", 3)
    expected = generate_stories(model, tokenizer, "Once", 14, settings)
    assert len(set(map(len, expected))) > 4
    request.getfixturevalue("like_a_gpu")
    assert generate_stories(model, tokenizer, "Once", 14, settings) == expected


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_host_looks_at_the_tokens_every_16_steps_even_with_context_shifts(like_a_gpu, penalty):
    model = make_model()  # with a context of 16
    settings = SamplingConfig(max_tokens=40, seed=1, repetition_penalty=penalty)
    prompts = torch.tensor([[0, 3, 7], [0, 8, 2]])
    with SyncCounter() as counter:
        steps = list(generate(model, prompts, settings, end_of_text=-1))
    assert len(steps) == 40
    finite, looks = 1, 3  # at the first step; at steps 1, 17 and 33
    assert counter.names == ["is_nonzero"] * (finite + looks)


def test_steps_after_the_end_are_padding_until_the_next_look(request):
    model, settings = model_of_size(vocab_size=3), SamplingConfig(1.0, max_tokens=500, seed=5)

    def tokens() -> torch.Tensor:
        return torch.stack([s.ids for s in generate(model, [[1], [2], [1]], settings, 0)], dim=1)

    expected = tokens()
    request.getfixturevalue("like_a_gpu")
    actual, n = tokens(), expected.shape[1]
    assert actual.shape[1] == 1 + 16 * math.ceil((n - 1) / 16) > n
    assert torch.equal(actual[:, :n], expected)
    assert (actual[:, n:] == 0).all()
