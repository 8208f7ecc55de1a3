from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from minigpt.analysis.activations import activation_names, activations
from minigpt.core.settings import UserError
from minigpt.kernels.choice import is_plain
from minigpt.model import GPT, GPTConfig
from tests.conftest import naming


@pytest.fixture
def net() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(50, 12, d_model=16, n_layers=3, n_heads=2, d_ff=32, dropout=0.5))


IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def test_activations_have_the_documented_names_order_and_shapes(net):
    values = activations(net, IDS)
    assert list(values) == activation_names(net)
    shapes = {
        "input": (2, 5, 16), "attention.weights": (2, 2, 5, 5), "attention.heads": (2, 5, 2, 8),
        "attention": (2, 5, 16), "middle": (2, 5, 16), "feed_forward.hidden": (2, 5, 32),
        "feed_forward": (2, 5, 16),
    }  # fmt: skip
    for i in range(3):
        for point, shape in shapes.items():
            assert values[f"blocks.{i}.{point}"].shape == shape
    assert values["residual"].shape == values["final_norm"].shape == (2, 5, 16)
    assert values["logits"].shape == (2, 5, 50)


def test_activations_add_up_to_the_forward_pass(net):
    values, net = activations(net, IDS), net.eval()
    start = net.embedding(IDS) * net.scale + net.positions[:5]
    torch.testing.assert_close(values["blocks.0.input"], start)
    for i in range(3):
        after = f"blocks.{i + 1}.input" if i < 2 else "residual"
        a, b = f"blocks.{i}.attention", f"blocks.{i}.feed_forward"
        middle = values[f"blocks.{i}.middle"]
        torch.testing.assert_close(values[f"blocks.{i}.input"] + values[a], middle)
        torch.testing.assert_close(middle + values[b], values[after])
        heads = values[f"{a}.heads"].flatten(2)
        torch.testing.assert_close(net.blocks[i].attention.out(heads), values[a])
        torch.testing.assert_close(
            net.blocks[i].feed_forward.down(values[f"{b}.hidden"]), values[b]
        )
    torch.testing.assert_close(values["logits"], net(IDS))


def test_edit_changes_later_activations_and_not_the_model(net):
    before = activations(net, IDS)
    name = "blocks.1.feed_forward"
    after = activations(net, IDS, {name: lambda x: 0 * x})
    for point in activation_names(net):
        earlier = activation_names(net).index(point) < activation_names(net).index(name)
        assert torch.equal(before[point], after[point]) == earlier, point
    assert torch.equal(after["blocks.1.middle"], after["blocks.2.input"])
    assert net.training
    assert is_plain(net)
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("point", ["input", "middle"])
def test_edit_of_the_residual_stream_replaces_it_for_all_that_follows(net, point):
    before, name = activations(net, IDS), f"blocks.1.{point}"
    after = activations(net, IDS, {name: lambda x: x.flip(1)})
    x, block = before[name].flip(1), net.blocks[1]
    torch.testing.assert_close(after[name], x)
    if point == "input":
        x = x + block.attention(block.norm1(x))
    x = x + block.feed_forward(block.norm2(x))
    torch.testing.assert_close(after["blocks.2.input"], x)
    torch.testing.assert_close(before[name], activations(net, IDS)[name])


def test_activations_of_one_model_in_several_threads(net):
    texts = [IDS[:1, :length] for length in (1, 2, 3, 4)]
    expected = [activations(net, ids)["logits"] for ids in texts]
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(activations, [net] * 8, texts * 2)
        for result, logits in zip(results, expected * 2, strict=True):
            assert torch.equal(result["logits"], logits)


@pytest.mark.parametrize("name", ["blocks.3.input", "logits", "blocks.0.attention.weights"])
def test_edit_of_an_unknown_or_fixed_activation_names_it(net, name):
    with pytest.raises(UserError, match=naming("edits", name)):
        activations(net, IDS, {name: lambda x: x})


def test_model_without_the_modules_of_gpt_is_named():
    class Strange(GPT):
        def __init__(self, config: GPTConfig) -> None:
            super().__init__(config)
            del self.blocks[0].norm2

    config = GPTConfig(50, 12, d_model=16, n_layers=1, n_heads=2, d_ff=32)
    with pytest.raises(UserError, match=naming("Strange", "blocks.0.norm2")):
        activations(Strange(config), IDS)
