"""Decoding by GPT.forward and its cache; tests/kernels/test_decode.py repeats some for decode.c."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from minigpt.core.settings import UserError
from minigpt.generation import decoder as decoder_module
from minigpt.generation.decoder import Decoder
from minigpt.generation.sampling import SamplingConfig, generate
from minigpt.model import GPT, GPTConfig, KVCache
from tests.conftest import ROOT, naming


@pytest.fixture
def backend() -> str:
    return "torch"


def make_model(context: int = 16, cls: type[GPT] = GPT) -> GPT:
    """Return a model in which every parameter affects the logits."""
    torch.manual_seed(3)
    model = cls(GPTConfig(61, context, d_model=16, n_layers=2, n_heads=2, d_ff=24)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def random_ids(*shape: int) -> Tensor:
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(sum(shape)))


def full_passes(model: GPT, text: Tensor, n_known: int) -> list[Tensor]:
    """The logits after each token of `text` (T,) behind the first `n_known`, by full passes."""
    window, logits = text[:n_known], []
    for new in text[n_known:]:
        window = torch.cat([window, new[None]])
        if len(window) > model.config.context_length:
            window = window[-max(1, model.config.context_length // 2) :]
        logits.append(model(window[None])[0, -1])
    return logits


@pytest.mark.parametrize("context", [1, 2, 3, 16, 70])  # 70 exceeds two blocks
@pytest.mark.parametrize("lengths", [[4, 4, 4], [0, 0], [0, 15, 3, 16, 9, 17, 40], [7]])
@torch.inference_mode()
def test_logits_of_each_sequence_equal_a_full_pass_over_its_window(context, lengths, backend):
    check_windows(make_model(context), lengths, backend)


def check_windows(model: GPT, lengths: list[int], backend: str) -> None:
    steps, prompts = random_ids(len(lengths), 45), [random_ids(length) for length in lengths]
    decoder = Decoder(model, prompts, backend)
    logits = torch.stack([decoder.read(ids) for ids in steps.unbind(1)], dim=1)  # (B, 45, V)
    for row, text in enumerate(prompts):
        expected = torch.stack(full_passes(model, torch.cat([text, steps[row]]), len(text)))
        torch.testing.assert_close(logits[row], expected)


@torch.inference_mode()
def test_logits_of_the_medium_size_after_a_context_shift(backend):
    torch.manual_seed(0)
    model, text = (
        GPT(GPTConfig(d_model=256, n_heads=8, d_ff=512)).eval(),
        torch.randint(1, 3000, (270,)),
    )
    decoder = Decoder(model, [text[:240]], backend)
    logits = torch.stack([decoder.read(new[None])[0] for new in text[240:]])
    torch.testing.assert_close(
        logits, torch.stack(full_passes(model, text, 240)), atol=1e-5, rtol=1e-5
    )


@torch.inference_mode()
def test_bfloat16_model_is_decoded_in_bfloat16_with_float32_logits(backend):
    model, ids = make_model(), random_ids(2, 12)
    exact = model(ids)[:, -1]
    decoder = Decoder(model.bfloat16(), list(ids[:, :-1]), backend)
    logits = decoder.read(ids[:, -1])
    assert logits.dtype == torch.float32
    assert 0 < (logits - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("batch", [1, 5])
@torch.inference_mode()
def test_float16_model_on_a_cpu_is_decoded_in_float32(batch, backend):
    model, ids = make_model().half(), random_ids(batch, 40)
    reader = Decoder(model, list(ids[:, :5]), backend)
    logits = torch.stack([reader.read(new) for new in ids[:, 5:].unbind(1)], dim=1)
    assert model.embedding.weight.dtype == torch.float16
    exact = model.float()
    for row in range(batch):
        expected = torch.stack(full_passes(exact, ids[row], 5))
        torch.testing.assert_close(logits[row], expected)


@torch.no_grad()
def test_changed_weights_are_packed_again(backend):
    model = make_model()

    def check(model: GPT) -> None:
        for ids in (random_ids(1, 12), random_ids(5, 12)):  # these use different code paths
            logits = Decoder(model, list(ids[:, :-1]), backend).read(ids[:, -1])
            expected = model(ids)[:, -1].float()
            torch.testing.assert_close(logits, expected, rtol=0, atol=3e-2 * expected.abs().max())

    check(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.3, fused=True).step()  # without new versions
    check(model)
    model.requires_grad_(False)
    check(model)
    model.get_parameter("blocks.1.feed_forward.up.weight").mul_(-3)
    check(model)
    model.load_state_dict(make_model().state_dict())
    check(model)
    check(model.bfloat16())
    for parameter in model.parameters():
        parameter *= 2
    check(model.float())
    model.embedding = torch.nn.Embedding(61, 16).requires_grad_(False)
    check(model)


def test_an_id_outside_the_vocabulary_is_an_index_error(backend):
    for wrong in (61, -1):
        with torch.inference_mode(), pytest.raises(IndexError):
            Decoder(make_model(), list(random_ids(3, 5)), backend).read(torch.tensor([1, wrong, 2]))


@torch.inference_mode()
def test_nan_weights_give_nan_logits(backend):
    for name in ("embedding.weight", "blocks.0.attention.qkv.bias", "blocks.1.norm2.weight"):
        model, ids = make_model(), random_ids(2, 9)
        model.get_parameter(name)[:] = torch.nan
        assert Decoder(model, list(ids[:, :-1]), backend).read(ids[:, -1]).isnan().all()


@torch.inference_mode()
def test_failed_read_leaves_the_sequences_unchanged(backend):
    torch.manual_seed(0)
    model = GPT(GPTConfig(61, 16, d_model=32, n_layers=2, n_heads=2, d_ff=32)).eval()
    prompts = [torch.randint(0, 61, (13,)) for _ in range(3)]
    careful, careless = Decoder(model, prompts, backend), Decoder(model, prompts, backend)
    for ids in torch.randint(0, 61, (6, 3)):  # up to the context, and beyond
        with pytest.raises(IndexError):
            careless.read(torch.tensor([1, 99, 2]))
        with pytest.raises(ValueError, match=naming("(1,)", "3")):
            careless.read(torch.tensor([1]))
        assert torch.equal(careless.read(ids), careful.read(ids))


# ---------------------------------------------------------------------------- subclasses


class Flipped(GPT):
    """A subclass that overrides forward."""

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        return super().forward(ids, cache).flip(-1)


class Passed(GPT):
    """A forward that passes its arguments on."""

    def forward(self, *args, **kwargs) -> Tensor:
        return -super().forward(*args, **kwargs)


class Residual(GPT):
    """A subclass that overrides hidden."""

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        return super().hidden(ids, cache) + self.embedding(ids)


class Looped(GPT):
    """A subclass that runs each block twice."""

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        x = self.embedding(ids) * self.scale
        x = x + self.positions[slice(ids.shape[1]) if cache is None else cache.extend(x)]
        for block in (*self.blocks, *self.blocks):
            x = block(x, cache)
        return self.final_norm(x)


class Uncached(GPT):
    """A forward without a cache, which depends on the whole sequence."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) - super().forward(ids.flip(1))[:, :1]


class UncachedHidden(GPT):
    """A hidden without a cache."""

    def hidden(self, ids: Tensor) -> Tensor:
        return super().hidden(ids).flip(-1)


class Forgetful(GPT):
    """A forward that takes a cache but does not append to it."""

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        return super().forward(ids)


SUBCLASSES = [Flipped, Passed, Residual, Looped, Uncached, UncachedHidden]


@pytest.mark.parametrize("cls", SUBCLASSES)
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("lengths", [[4, 4], [0, 15, 3, 16, 40], [7]])
@torch.inference_mode()
def test_a_subclass_is_decoded_by_its_own_forward(cls, backend, lengths):
    model = make_model(cls=cls)
    check_windows(model, lengths, backend)
    ids = random_ids(1, 9)
    assert not torch.allclose(model(ids), GPT.forward(make_model(), ids), atol=0.1)


@pytest.mark.parametrize("cls", SUBCLASSES)
def test_subclass_generates_by_its_own_forward(cls):
    model, prompts = make_model(cls=cls), [[5], [7, 9, 11, 2, 8, 3], [4] * 20]
    greedy = SamplingConfig(temperature=0, max_tokens=30)
    steps = [step.ids for step in generate(model, prompts, greedy, -1)]
    with torch.inference_mode():
        for row, prompt in enumerate(prompts):
            text = torch.tensor([*prompt, *(int(ids[row]) for ids in steps)])
            logits = full_passes(model, text[:-1], len(prompt) - 1)
            assert [int(each.argmax()) for each in logits] == text[len(prompt) :].tolist()


@pytest.mark.parametrize(("cls", "lines"), [(GPT, 0), (Flipped, 0), (Uncached, 1)])
def test_full_passes_are_logged_once(cls, lines, caplog):
    decoder_module._warn_once.cache_clear()
    for _ in range(3):
        Decoder(make_model(cls=cls), [torch.tensor([1])], "torch")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == lines
    assert all(cls.__qualname__ in message for message in messages)


@torch.inference_mode()
def test_forward_that_ignores_its_cache_is_refused_by_name():
    decoder = Decoder(make_model(cls=Forgetful), [torch.tensor([1])], "torch")
    with pytest.raises(UserError, match=naming("Forgetful.forward", "cache")):
        decoder.read(torch.tensor([2]))


@torch.inference_mode()
def test_replaced_block_is_decoded_by_its_own_forward():
    class Twice(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
            return x + 2 * self.block(x, cache)

    model = make_model()
    model.blocks[1] = Twice(model.blocks[1])
    for backend in ("auto", "torch"):
        check_windows(model, [4, 9], backend)


WITHOUT_C = """
import sys
sys.modules["minigpt.kernels.decode"] = None  # importing it fails, as if the file was deleted
from minigpt.cli import doctor
from minigpt.core.settings import UserError
from minigpt.generation.decoder import Decoder, c_backend
from minigpt.generation.sampling import SamplingConfig, generate
from tests.generation.test_decoder import make_model, random_ids

prompt = random_ids(1, 4)
steps = list(generate(make_model(), prompt, SamplingConfig(max_tokens=3), end_of_text=-1))
try:
    Decoder(make_model(), list(prompt), "c")
except UserError as error:
    print(len(steps), error.argument, error.fix["backend"], c_backend(), doctor._generation())
"""


@pytest.mark.long
@pytest.mark.timeout(600)
def test_pytorch_decodes_without_the_optional_c_backend():
    command = [sys.executable, "-c", WITHOUT_C]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.startswith("3 backend torch None PyTorch")
    assert "decode.py" in output
    assert output.count("\n") == 1
