from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from minigpt.analysis.attention import attention_weights, head_scores, repeated_ids
from minigpt.core.settings import UserError
from minigpt.kernels.cpu import CPU
from minigpt.model import GPT, GPTConfig
from tests.conftest import naming


@pytest.fixture
def net() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(50, 12, d_model=16, n_layers=3, n_heads=2, d_ff=32)).eval()


def test_attention_rows_are_distributions_over_the_past(net):
    weights = attention_weights(net, torch.randint(0, 50, (1, 7)))
    assert weights.shape == (3, 2, 7, 7)
    assert weights.sum(dim=-1).allclose(torch.ones(3, 2, 7))
    assert weights.triu(1).count_nonzero() == 0
    assert weights[:, :, 0, 0].equal(torch.ones(3, 2))


def test_attention_weights_are_those_that_the_model_uses(net):
    qkvs, outputs = [], []
    for block in net.blocks:
        block.attention.qkv.register_forward_hook(lambda _m, _x, qkv: qkvs.append(qkv))
        block.attention.out.register_forward_hook(lambda _m, x, _y: outputs.append(x[0]))
    ids = torch.randint(0, 50, (1, 12))
    with torch.inference_mode():
        net(ids)
    for qkv, output, weights in zip(
        qkvs[:3], outputs[:3], attention_weights(net, ids), strict=True
    ):
        values = qkv.unflatten(-1, (3, 2, -1))[0, :, 2].transpose(0, 1)  # (nh, T, dk)
        torch.testing.assert_close((weights @ values).transpose(0, 1).flatten(1), output[0])


def test_attention_weights_do_not_depend_on_kernels_and_threads(net):
    texts = [torch.randint(0, 50, (1, length)) for length in (3, 7, 12, 5)]
    expected = [attention_weights(net, ids) for ids in texts]
    net.use(CPU)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for result, weights in zip(
                pool.map(attention_weights, [net] * 4, texts), expected, strict=True
            ):
                assert torch.equal(result, weights)


def test_forward_without_a_cache_is_an_error_that_names_it():
    class Uncached(GPT):
        def forward(self, ids):  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(ids)

    net = Uncached(GPTConfig(50, 12, d_model=16, n_layers=1, n_heads=2, d_ff=32)).eval()
    with pytest.raises(UserError, match=naming("Uncached", "forward", "cache")):
        attention_weights(net, torch.zeros(1, 3, dtype=torch.long))


def test_attention_over_more_tokens_than_the_context_is_an_error(net):
    with pytest.raises(ValueError, match=naming("13", "12")):
        attention_weights(net, torch.zeros(1, 13, dtype=torch.long))


def test_head_scores_are_means_of_the_weights_on_a_repeated_sequence(net):
    ids, scores = repeated_ids(net), head_scores(net)
    n = 5  # the context of 12 holds id 0 and twice five ids
    assert ids.shape == (1, 2 * n + 1)
    assert ids[0, 0] == 0
    assert ids[0, 1 : n + 1].tolist() == ids[0, n + 1 :].tolist()
    assert len(set(ids[0, 1 : n + 1].tolist()) - {0}) == n
    weights = attention_weights(net, ids)
    for layer, head in ((0, 0), (2, 1)):
        w = weights[layer, head]
        previous = sum(w[i, i - 1].item() for i in range(1, 2 * n + 1)) / (2 * n)
        induction = sum(w[i, i - n + 1].item() for i in range(n + 1, 2 * n + 1)) / n
        assert scores.previous_token[layer, head].item() == pytest.approx(previous)
        assert scores.induction[layer, head].item() == pytest.approx(induction)


def test_previous_token_score_of_a_head_that_was_built_for_it():
    net = GPT(GPTConfig(50, 12, d_model=16, n_layers=1, n_heads=1, d_ff=16)).eval()
    net.embedding.weight.data *= 1e-3  # so that only positions count
    frequency = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    rotations = [
        torch.tensor([[w.cos(), -w.sin()], [w.sin(), w.cos()]]) for w in frequency
    ]  # turns the encoding of a position into that of the previous position
    with torch.no_grad():
        query, key, _ = net.blocks[0].attention.qkv.weight.split(16)
        query.copy_(20 * torch.block_diag(*rotations))
        key.copy_(torch.eye(16))
    scores = head_scores(net)
    assert scores.previous_token.item() > 0.7
    assert scores.induction.item() < 0.1


def test_head_scores_of_a_context_that_is_too_short_are_an_error():
    net = GPT(GPTConfig(50, 4, d_model=16, n_layers=1, n_heads=1, d_ff=16))
    with pytest.raises(UserError, match=naming("net")):
        head_scores(net)
