import pytest
import torch

from minigpt.analysis.attention import attention_weights
from minigpt.model import (
    GPT,
    GPTConfig,
    attend,
    split_heads,
)
from tests.conftest import naming


@pytest.fixture
def net() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(50, 12, d_model=16, n_layers=3, n_heads=2, d_ff=32)).eval()


def test_each_row_is_a_distribution_over_the_past(net):
    weights = attention_weights(net, torch.randint(0, 50, (1, 7)))
    assert weights.shape == (3, 2, 7, 7)
    assert weights.sum(dim=-1).allclose(torch.ones(3, 2, 7))
    assert weights.triu(1).count_nonzero() == 0
    assert weights[:, :, 0, 0].equal(torch.ones(3, 2))


def test_they_are_the_weights_that_the_model_uses(net):
    seen = []
    for block in net.blocks:
        block.attention.qkv.register_forward_hook(lambda _m, _x, qkv: seen.append(qkv))
    ids = torch.randint(0, 50, (1, 12))
    with torch.inference_mode():
        net(ids)
    for qkv, weights in zip(seen[:3], attention_weights(net, ids), strict=True):
        q, k, v = split_heads(qkv, 2)
        torch.testing.assert_close(weights @ v[0], attend(q, k, v)[0])


def test_more_tokens_than_the_context_are_refused(net):
    with pytest.raises(ValueError, match=naming("13", "12")):
        attention_weights(net, torch.zeros(1, 13, dtype=torch.long))
