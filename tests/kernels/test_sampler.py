"""Tokens that decode.c samples, with the filters of its sampler."""

import math

import pytest
import torch

from minigpt.generation.sampling import SamplingConfig, sample
from tests.kernels.test_decode import FILTERS, choose, needs_compiler


@needs_compiler
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("n", [1, 7, 33, 3000])
def test_sampled_token_equals_that_of_pytorch_for_the_same_random_number(name, n):
    torch.manual_seed(0)
    logits, settings = 4 * torch.randn(200, n), FILTERS[name]
    logits[:, ::3] -= 100.0  # as good as impossible
    seen = torch.rand(200, n) < 0.2
    generator, points = (torch.Generator().manual_seed(1) for _ in range(2))
    points = torch.rand(200, generator=points)
    config = SamplingConfig(**{"temperature": 1.0, "repetition_penalty": 1.3, **settings})
    expected = sample(logits, config, generator, seen)
    ids = choose(logits, points, penalty=1.3, seen=seen, **settings)
    assert (ids == expected).float().mean() >= 0.99  # others differ by rounding
    assert n == 1 or len(ids.unique()) > 1


@needs_compiler
def test_filters_keep_their_number_of_equally_likely_tokens():
    points = torch.arange(100) / 100
    equal = torch.zeros(100, 70)
    assert set(choose(equal, points, top_k=3).tolist()) == {0, 1, 2}
    assert set(choose(equal, points, top_p=3.5 / 70).tolist()) == {0, 1, 2, 3}
    assert set(choose(equal, points, min_p=1.0).tolist()) == set(range(70))
    assert set(choose(equal, points, temperature=0.0).tolist()) == {0}
    equal[:, 60:] = 1.0
    assert set(choose(equal, points, top_k=12).tolist()) == {0, 1, *range(60, 70)}
    for strict in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-5, "top_k": 1}):
        assert set(choose(equal, points, **strict).tolist()) == {60}


@needs_compiler
def test_extreme_random_numbers_never_sample_impossible_tokens():
    logits = torch.full((5, 70), -math.inf)
    logits[:, 40:43] = torch.tensor([1.0, 1.0, 0.0])
    points = torch.tensor([0.0, 0.3, 0.5, 0.9, 1 - 2**-24])
    assert choose(logits, points).tolist() == [40, 40, 41, 42, 42]
    assert choose(logits[:1], torch.ones(1)).tolist() == [42]  # rounding may give 1
    nan = torch.full((1, 70), math.nan)
    for settings in ({}, {"temperature": 0.0}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}):
        assert 0 <= choose(nan, points[:1], **settings).item() < 70
