"""Decoding by GPT.forward and its cache. tests/kernels/test_decode.py runs some for decode.c."""

import pytest
import torch
from torch import Tensor, nn

from minigpt.core.settings import UserError
from minigpt.generation import decoder as decoder_module
from minigpt.generation.decoder import Decoder
from minigpt.generation.sampling import SamplingConfig, generate
from minigpt.model import GPT, GPTConfig, KVCache
from tests.conftest import naming


@pytest.fixture
def backend() -> str:
    return "torch"


def make_net(context: int = 16, cls: type[GPT] = GPT) -> GPT:
    """A net whose every weight, bias and norm counts."""
    torch.manual_seed(3)
    net = cls(GPTConfig(61, context, d_model=16, n_layers=2, n_heads=2, d_ff=24)).eval()
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
def test_each_row_has_the_logits_of_a_full_pass_over_its_window_alone(context, lengths, backend):
    check_windows(make_net(context), lengths, backend)


def check_windows(net: GPT, lengths: list[int], backend: str) -> None:
    steps, texts = random_ids(len(lengths), 45), [random_ids(length) for length in lengths]
    decoder = Decoder(net, texts, backend)
    found = torch.stack([decoder.read(ids) for ids in steps.unbind(1)], dim=1)  # (B, 45, V)
    for row, text in enumerate(texts):
        expected = torch.stack(reread(net, torch.cat([text, steps[row]]), len(text)))
        torch.testing.assert_close(found[row], expected)


@torch.inference_mode()
def test_the_medium_shape_agrees_to_float32_rounding_beyond_its_context(backend):
    torch.manual_seed(0)
    net, text = (
        GPT(GPTConfig(d_model=256, n_heads=8, d_ff=512)).eval(),
        torch.randint(1, 3000, (270,)),
    )
    decoder = Decoder(net, [text[:240]], backend)
    found = torch.stack([decoder.read(new[None])[0] for new in text[240:]])
    torch.testing.assert_close(found, torch.stack(reread(net, text, 240)), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_bfloat16_net_is_decoded_in_bfloat16_and_gives_float32_logits(backend):
    net, ids = make_net(), random_ids(2, 12)
    exact = net(ids)[:, -1]
    decoder = Decoder(net.bfloat16(), list(ids[:, :-1]), backend)
    logits = decoder.read(ids[:, -1])
    assert logits.dtype == torch.float32
    assert 0 < (logits - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("batch", [1, 5])
@torch.inference_mode()
def test_a_float16_net_on_a_cpu_rounds_nothing_but_its_weights(batch, backend):
    net, ids = make_net().half(), random_ids(batch, 40)
    reader = Decoder(net, list(ids[:, :5]), backend)
    found = torch.stack([reader.read(new) for new in ids[:, 5:].unbind(1)], dim=1)
    assert net.embedding.weight.dtype == torch.float16
    exact = net.float()
    for row in range(batch):
        expected = torch.stack(reread(exact, ids[row], 5))
        torch.testing.assert_close(found[row], expected)


@torch.no_grad()
def test_weights_that_have_changed_are_not_taken_from_before(backend):
    net = make_net()

    def check(net: GPT) -> None:
        for ids in (random_ids(1, 12), random_ids(5, 12)):  # these are not multiplied alike
            logits = Decoder(net, list(ids[:, :-1]), backend).read(ids[:, -1])
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


def test_an_id_outside_the_vocabulary_is_an_index_error(backend):
    for wrong in (61, -1):
        with torch.inference_mode(), pytest.raises(IndexError):
            Decoder(make_net(), list(random_ids(3, 5)), backend).read(torch.tensor([1, wrong, 2]))


@torch.inference_mode()
def test_weights_that_are_no_numbers_give_logits_that_are_none(backend):
    for name in ("embedding.weight", "blocks.0.attention.qkv.bias", "blocks.1.norm2.weight"):
        net, ids = make_net(), random_ids(2, 9)
        net.get_parameter(name)[:] = torch.nan
        assert Decoder(net, list(ids[:, :-1]), backend).read(ids[:, -1]).isnan().all()


@torch.inference_mode()
def test_a_read_that_fails_changes_nothing(backend):
    torch.manual_seed(0)
    net = GPT(GPTConfig(61, 16, d_model=32, n_layers=2, n_heads=2, d_ff=32)).eval()
    texts = [torch.randint(0, 61, (13,)) for _ in range(3)]
    careful, careless = Decoder(net, texts, backend), Decoder(net, texts, backend)
    for ids in torch.randint(0, 61, (6, 3)):  # up to the context, and beyond
        with pytest.raises(IndexError):
            careless.read(torch.tensor([1, 99, 2]))
        with pytest.raises(ValueError, match=naming("(1,)", "3")):
            careless.read(torch.tensor([1]))
        assert torch.equal(careless.read(ids), careful.read(ids))


# ---------------------------------------------------------------------------- subclasses


class Flipped(GPT):
    """Another forward."""

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        return super().forward(ids, cache).flip(-1)


class Passed(GPT):
    """Another forward, which passes on what it is given."""

    def forward(self, *args, **kwargs) -> Tensor:
        return -super().forward(*args, **kwargs)


class Residual(GPT):
    """Another hidden."""

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        return super().hidden(ids, cache) + self.embedding(ids)


class Looped(GPT):
    """Each block twice."""

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        x = self.embedding(ids) * self.scale
        x = x + self.positions[slice(ids.shape[1]) if cache is None else cache.extend(x)]
        for block in (*self.blocks, *self.blocks):
            x = block(x, cache)
        return self.final_norm(x)


class Uncached(GPT):
    """Another forward, which takes no cache, and looks at the whole text."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) - super().forward(ids.flip(1))[:, :1]


class UncachedHidden(GPT):
    """Another hidden, which takes no cache."""

    def hidden(self, ids: Tensor) -> Tensor:
        return super().hidden(ids).flip(-1)


class Forgetful(GPT):
    """A forward that takes a cache, and leaves it as it is."""

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        return super().forward(ids)


SUBCLASSES = [Flipped, Passed, Residual, Looped, Uncached, UncachedHidden]


@pytest.mark.parametrize("cls", SUBCLASSES)
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("lengths", [[4, 4], [0, 15, 3, 16, 40], [7]])
@torch.inference_mode()
def test_a_subclass_is_decoded_by_its_own_forward(cls, backend, lengths):
    net = make_net(cls=cls)
    check_windows(net, lengths, backend)
    ids = random_ids(1, 9)
    assert not torch.allclose(net(ids), GPT.forward(make_net(), ids), atol=0.1)


@pytest.mark.parametrize("cls", SUBCLASSES)
def test_a_subclass_generates_what_its_forward_says(cls):
    net, prompts = make_net(cls=cls), [[5], [7, 9, 11, 2, 8, 3], [4] * 20]
    greedy = SamplingConfig(temperature=0, max_tokens=30)
    steps = [step.ids for step in generate(net, prompts, greedy, -1)]
    with torch.inference_mode():
        for row, prompt in enumerate(prompts):
            text = torch.tensor([*prompt, *(int(ids[row]) for ids in steps)])
            logits = reread(net, text[:-1], len(prompt) - 1)
            assert [int(each.argmax()) for each in logits] == text[len(prompt) :].tolist()


@pytest.mark.parametrize(("cls", "lines"), [(GPT, 0), (Flipped, 0), (Uncached, 1)])
def test_full_passes_are_told_of_in_one_line(cls, lines, caplog):
    decoder_module._warn_once.cache_clear()
    for _ in range(3):
        Decoder(make_net(cls=cls), [torch.tensor([1])], "torch")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == lines
    assert all(cls.__qualname__ in message for message in messages)


@torch.inference_mode()
def test_a_forward_that_keeps_nothing_in_its_cache_is_refused_by_name():
    decoder = Decoder(make_net(cls=Forgetful), [torch.tensor([1])], "torch")
    with pytest.raises(UserError, match=naming("Forgetful.forward", "cache")):
        decoder.read(torch.tensor([2]))


@torch.inference_mode()
def test_another_block_is_decoded_as_it_computes():
    class Twice(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
            return x + 2 * self.block(x, cache)

    net = make_net()
    net.blocks[1] = Twice(net.blocks[1])
    for backend in ("auto", "torch"):
        check_windows(net, [4, 9], backend)
