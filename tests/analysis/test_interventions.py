import pytest
import torch

from minigpt.analysis.activations import activations
from minigpt.analysis.interventions import ablate_heads, patch_heads, patch_residual
from minigpt.core.settings import UserError
from minigpt.model import GPT, GPTConfig
from tests.conftest import naming

CLEAN, CORRUPTED = torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([[9, 2, 6, 5, 3]])


@pytest.fixture
def net() -> GPT:
    torch.manual_seed(0)
    net = GPT(GPTConfig(50, 12, d_model=16, n_layers=2, n_heads=4, d_ff=32)).eval()
    for parameter in net.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return net.requires_grad_(False)


def metric(logits: torch.Tensor) -> float:
    return (logits[0, -1, 7] - logits[0, -1, 8]).item()


def test_ablated_heads_are_columns_of_the_output_matrix_set_to_zero(net):
    logits = ablate_heads(net, CLEAN, [(0, 1), (1, 3), (1, 0)])
    whole = net(CLEAN)
    for block, head in ((0, 1), (1, 3), (1, 0)):
        net.blocks[block].attention.out.weight[:, 4 * head : 4 * head + 4] = 0
    torch.testing.assert_close(logits, net(CLEAN))
    assert not torch.allclose(logits, whole)


def test_patch_of_the_first_layer_replaces_one_token(net):
    effects = patch_residual(net, CLEAN, CORRUPTED, metric)
    assert effects.shape == (2, 5)
    for position in range(5):
        ids = CORRUPTED.clone()
        ids[0, position] = CLEAN[0, position]
        assert effects[0, position].item() == pytest.approx(metric(net(ids)), abs=1e-5)
    # In the last layer the last position is all that the last logits depend on, with attention.
    middle = activations(net, CORRUPTED)["blocks.1.input"][:, :4]
    stream = torch.cat([middle, activations(net, CLEAN)["blocks.1.input"][:, 4:]], dim=1)
    logits = net.final_norm(net.blocks[1](stream)) @ net.embedding.weight.T
    assert effects[1, 4].item() == pytest.approx(metric(logits), abs=1e-5)


def test_patch_of_a_head_replaces_its_output(net):
    effects = patch_heads(net, CLEAN, CORRUPTED, metric)
    assert effects.shape == (2, 4)
    clean, corrupted = activations(net, CLEAN), activations(net, CORRUPTED)
    for head in range(4):
        z = corrupted["blocks.1.attention.heads"].clone()
        z[:, :, head] = clean["blocks.1.attention.heads"][:, :, head]
        block = net.blocks[1]
        stream = corrupted["blocks.1.input"] + block.attention.out(z.flatten(2))
        stream = stream + block.feed_forward(block.norm2(stream))
        logits = net.final_norm(stream) @ net.embedding.weight.T
        assert effects[1, head].item() == pytest.approx(metric(logits), abs=1e-5)


def test_patch_between_texts_of_different_length_is_an_error(net):
    with pytest.raises(UserError, match=naming("corrupted", "(1, 4)")):
        patch_residual(net, CLEAN, CORRUPTED[:, :4], metric)
