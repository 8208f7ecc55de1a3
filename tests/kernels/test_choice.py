import pytest
import torch

from minigpt.core.settings import UserError
from minigpt.kernels.choice import fused_attention, kernels_for
from minigpt.kernels.cpu import CPU, block_attention
from minigpt.model import Kernels
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
