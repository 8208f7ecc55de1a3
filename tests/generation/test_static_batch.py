"""Decoding with a static cache, as on a GPU, gives the logits of full passes; here on a CPU."""

import pytest
import torch

from minigpt.generation import decoder
from minigpt.generation.sampling import SamplingConfig, generate
from minigpt.generation.static_batch import StaticBatch
from tests.generation.test_decoder import check_windows, make_model


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
