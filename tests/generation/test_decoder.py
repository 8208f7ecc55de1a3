import gc
import weakref

import pytest
import torch
from torch import Tensor

from minigpt.generation.decoder import Decoder
from minigpt.model import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("decoder")


def make_net(context: int = 16) -> GPT:
    """A net whose every weight, bias and norm counts."""
    torch.manual_seed(3)
    net = GPT(GPTConfig(61, context, d_model=16, n_layers=2, n_heads=2, d_ff=24)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return net


def random_ids(*shape: int) -> Tensor:
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(sum(shape)))


def reread(net: GPT, text: Tensor, n_known: int) -> list[Tensor]:
    """The logits after each token of `text` (T,) behind the first `n_known`, by full passes."""
    window, found = text[:n_known], []
    for new in text[n_known:]:
        window = torch.cat([window, new[None]])
        if len(window) > net.config.context_length:
            window = window[-max(1, net.config.context_length // 2) :]
        found.append(net(window[None])[0, -1])
    return found


@pytest.mark.parametrize("context", [1, 2, 3, 16, 70])  # the last outgrows the cache's room
@pytest.mark.parametrize("lengths", [[4, 4, 4], [0, 0], [0, 15, 3, 16, 9, 17, 40], [7]])
@torch.inference_mode()
def test_each_row_has_the_logits_of_a_full_pass_over_its_window_alone(context, lengths):
    net, steps = make_net(context), random_ids(len(lengths), 45)
    texts = [random_ids(length) for length in lengths]
    decoder = Decoder(net, texts)
    found = torch.stack([decoder.read(ids) for ids in steps.unbind(1)], dim=1)  # (B, 45, V)
    for row, text in enumerate(texts):
        expected = torch.stack(reread(net, torch.cat([text, steps[row]]), len(text)))
        torch.testing.assert_close(found[row], expected)


@torch.inference_mode()
def test_the_medium_shape_agrees_to_float32_rounding_beyond_its_context():
    torch.manual_seed(0)
    net, text = GPT(GPTConfig()).eval(), torch.randint(1, 3000, (270,))
    decoder = Decoder(net, [text[:240]])
    found = torch.stack([decoder.read(new[None])[0] for new in text[240:]])
    torch.testing.assert_close(found, torch.stack(reread(net, text, 240)), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_bfloat16_net_is_decoded_in_bfloat16_and_gives_float32_logits():
    net, ids = make_net(), random_ids(2, 12)
    exact = net(ids)[:, -1]
    decoder = Decoder(net.bfloat16(), list(ids[:, :-1]))
    logits = decoder.read(ids[:, -1])
    assert decoder.batch.weights.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert 0 < (logits - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("batch", [1, 5])
@torch.inference_mode()
def test_a_float16_net_on_a_cpu_rounds_nothing_but_its_weights(batch):
    net, ids = make_net().half(), random_ids(batch, 40)
    reader = Decoder(net, list(ids[:, :5]))
    found = torch.stack([reader.read(new) for new in ids[:, 5:].unbind(1)], dim=1)
    assert reader.batch.weights.dtype == torch.float32
    exact = net.float()
    for row in range(batch):
        expected = torch.stack(reread(exact, ids[row], 5))
        torch.testing.assert_close(found[row], expected)


@torch.no_grad()
def test_weights_that_have_changed_are_not_taken_from_before():
    net = make_net()

    def check(net: GPT) -> None:
        for ids in (random_ids(1, 12), random_ids(5, 12)):  # these are not multiplied alike
            logits = Decoder(net, list(ids[:, :-1])).read(ids[:, -1])
            expected = net(ids)[:, -1].float()
            torch.testing.assert_close(logits, expected, rtol=0, atol=3e-2 * expected.abs().max())

    check(net)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(net.parameters(), lr=0.3, fused=True).step()  # leaves versions as they were
    check(net)
    net.requires_grad_(False)
    check(net)
    net.get_parameter("blocks.1.feed_forward.up.weight").mul_(-3)
    check(net)
    net.load_state_dict(make_net().state_dict())
    check(net)
    check(net.bfloat16())
    for parameter in net.parameters():
        parameter *= 2
    check(net.float())
    net.embedding = torch.nn.Embedding(61, 16).requires_grad_(False)
    check(net)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_a_frozen_net_are_made_once_and_go_with_it(dtype, decoder):
    net = make_net().to(dtype).requires_grad_(False)
    texts = list(random_ids(4, 5))
    with torch.inference_mode():
        first, again, one = Decoder(net, texts), Decoder(net, texts), Decoder(net, texts[:1])
    assert again.batch.weights is first.batch.weights
    rows_count = decoder == "PyTorch" and dtype != torch.bfloat16
    assert (one.batch.weights is not first.batch.weights) == rows_count
    there = weakref.ref(net)
    del net, first, again, one
    gc.collect()
    assert there() is None


def test_an_id_outside_the_vocabulary_is_an_index_error():
    for wrong in (61, -1):
        with torch.inference_mode(), pytest.raises(IndexError):
            Decoder(make_net(), list(random_ids(3, 5))).read(torch.tensor([1, wrong, 2]))


@torch.inference_mode()
def test_weights_that_are_no_numbers_give_logits_that_are_none():
    for name in ("embedding.weight", "blocks.0.attention.qkv.bias", "blocks.1.norm2.weight"):
        net, ids = make_net(), random_ids(2, 9)
        net.get_parameter(name)[:] = torch.nan
        assert Decoder(net, list(ids[:, :-1])).read(ids[:, -1]).isnan().all()


@torch.inference_mode()
def test_a_read_that_fails_changes_nothing(decoder):
    torch.manual_seed(0)
    net = GPT(GPTConfig(61, 16, d_model=32, n_layers=2, n_heads=2, d_ff=32)).eval()
    texts = [torch.randint(0, 61, (13,)) for _ in range(3)]
    careful, careless = Decoder(net, texts), Decoder(net, texts)
    for ids in torch.randint(0, 61, (6, 3)):  # up to the context, and beyond
        with pytest.raises(IndexError):
            careless.read(torch.tensor([1, 99, 2]))
        assert torch.equal(careless.read(ids), careful.read(ids))
