from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minigpt.core.settings import UserError
from minigpt.kernels.choice import fused_attention, is_plain, kernels_for, sequences_at_once
from minigpt.kernels.cpu import CPU, block_attention
from minigpt.model import GPT, GPTConfig, Kernels
from tests.conftest import naming
from tests.kernels.test_cpu import attention


def test_kernels_of_each_device_and_name():
    assert kernels_for("cpu") == kernels_for("cpu", "cpu") == CPU
    assert kernels_for("cpu", "torch") == Kernels()
    assert kernels_for("cpu", "torch").name == "torch"
    for device in ("cuda", "mps"):
        assert kernels_for(device) == kernels_for(device, "torch")
        assert kernels_for(device).attention is fused_attention
        assert kernels_for(device).name == "torch"
    assert (CPU.name, CPU.attention) == ("cpu", block_attention)


def test_only_an_unchanged_gpt_is_plain():
    shape = GPTConfig(vocab_size=20, context_length=8, d_model=8, n_layers=1, n_heads=1, d_ff=8)

    class Other(GPT):
        pass

    assert is_plain(GPT(shape))
    assert not is_plain(Other(shape))
    hooked, replaced = GPT(shape), GPT(shape)
    hooked.blocks[0].register_forward_hook(lambda *_: None)
    replaced.blocks[0].norm1 = torch.nn.LayerNorm(8, eps=1e-3)
    assert not is_plain(hooked)
    assert not is_plain(replaced)


def test_kernels_for_cpus_are_refused_elsewhere():
    with pytest.raises(UserError, match=naming("kernels", "cpu", "cuda", "auto")):
        kernels_for("cuda", "cpu")


@pytest.mark.parametrize("length", [1, 7, 64])
def test_fused_attention_and_its_gradient_are_those_of_attention(length):
    torch.manual_seed(0)
    plain = torch.randn(2, length, 3 * 2 * 16, requires_grad=True)
    fused = plain.detach().clone().requires_grad_()
    expected, result = attention(plain, 2), fused_attention(fused, 2)
    torch.testing.assert_close(result, expected)
    downstream = torch.randn(expected.shape)
    expected.backward(downstream)
    result.backward(downstream)
    torch.testing.assert_close(fused.grad, plain.grad)


def test_sequences_at_once_follow_the_memory_of_a_gpu(monkeypatch):
    def number(gigabytes: float, device: str = "cuda", d_model: int = 256) -> int:
        memory = SimpleNamespace(total_memory=int(gigabytes * 2**30))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
        weight = SimpleNamespace(device=torch.device(device), element_size=lambda: 4)
        config, embedding = GPTConfig(d_model=d_model), SimpleNamespace(weight=weight)
        model: Any = SimpleNamespace(config=config, embedding=embedding)
        return sequences_at_once(model, on_cpu=64)

    assert number(80, "cpu") == number(80, "mps") == 64
    assert number(80) == 1024
    assert number(4) == 64  # 8.8 MB of keys, values and logits each, in a quarter of 4 GiB
    assert number(8) == 192
    assert number(8, d_model=1024) == 128
