import pytest
import torch
import torch.nn.functional as F

from minigpt.analysis.activations import activations
from minigpt.analysis.lens import logit_attribution, logit_lens
from minigpt.core.settings import UserError
from minigpt.model import GPT, GPTConfig
from tests.conftest import naming

IDS, TARGETS, OTHERS = (torch.tensor(ids) for ids in ([[3, 1, 4, 1]], [1, 4, 1, 5], [9, 9, 9, 9]))


@pytest.fixture
def net() -> GPT:
    torch.manual_seed(0)
    net = GPT(GPTConfig(50, 12, d_model=12, n_layers=2, n_heads=3, d_ff=32)).eval()
    for parameter in net.parameters():  # so that biases and norms take part
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return net.requires_grad_(False).double()


def test_logit_lens_reads_the_stream_with_final_norm_and_embedding(net):
    lens = logit_lens(net, IDS)
    assert lens.shape == (3, 4, 50)
    torch.testing.assert_close(lens.exp().sum(dim=-1), torch.ones(3, 4, dtype=torch.float64))
    stream = net.embedding(IDS) * 12**0.5 + net.positions[:4]
    for i in range(3):
        normal = F.layer_norm(stream, (12,), net.final_norm.weight, net.final_norm.bias)
        torch.testing.assert_close(lens[i], (normal @ net.embedding.weight.T).log_softmax(-1)[0])
        stream = net.blocks[i](stream) if i < 2 else stream
    torch.testing.assert_close(lens[2], net(IDS).log_softmax(-1)[0])


def test_attribution_adds_up_to_the_logit_differences(net):
    logits = net(IDS)[0]
    of_target = logits.gather(1, TARGETS[:, None])[:, 0]
    total = logit_attribution(net, IDS, TARGETS).total
    torch.testing.assert_close(total, of_target - logits.mean(dim=-1))
    total = logit_attribution(net, IDS, TARGETS, OTHERS).total
    torch.testing.assert_close(total, of_target - logits[:, 9])


def test_attribution_of_a_head_is_its_output_times_the_direction(net):
    result = logit_attribution(net, IDS, TARGETS, OTHERS)
    assert result.heads.shape == (2, 3, 4)
    values = activations(net, IDS)
    std = (values["residual"][0].var(dim=-1, unbiased=False) + 1e-5).sqrt()
    for layer, head, position in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
        z = values[f"blocks.{layer}.attention.heads"][0, position, head]
        matrix = net.blocks[layer].attention.out.weight[:, 4 * head : 4 * head + 4]
        output = matrix @ z
        normal = (output - output.mean()) / std[position] * net.final_norm.weight
        e = net.embedding.weight
        expected = normal @ (e[TARGETS[position]] - e[9])
        torch.testing.assert_close(result.heads[layer, head, position], expected)


def test_model_that_is_not_a_plain_gpt_is_named(net):
    class Louder(GPT):
        def hidden(self, ids, cache=None):
            return 2 * super().hidden(ids, cache)

    louder = Louder(net.config).double()
    for function in (logit_lens, lambda *args: logit_attribution(*args, TARGETS)):
        with pytest.raises(UserError, match=naming("Louder")):
            function(louder, IDS)
