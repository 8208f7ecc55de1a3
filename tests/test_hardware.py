import pytest
import torch

from minigpt import hardware
from minigpt.config import UserError
from minigpt.hardware import Hardware


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_cpu_trains_in_bfloat16_only_where_it_is_native(monkeypatch, native, precision):
    monkeypatch.setattr(hardware, "_cpu_has_bfloat16", lambda: native)
    found = Hardware.find("cpu", "auto", 1, "auto")
    assert (found.precision, found.devices) == (precision, 1)
    assert "bfloat16" in found.why


def test_float16_on_a_cpu_is_bfloat16_and_says_so():
    found = Hardware.find("cpu", "auto", 1, "16-mixed")
    assert found.precision == "bf16-mixed"
    assert "16-mixed was asked for" in found.why


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16-mixed"), (False, "16-mixed")])
def test_a_gpu_is_preferred_and_all_of_them_are_used(monkeypatch, native, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    found = Hardware.find("auto", "auto", 2, "auto")
    assert (found.accelerator, found.devices, found.world_size) == ("cuda", 4, 8)
    assert found.precision == precision


def test_hardware_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="trainer.accelerator=gpu: this machine has none"):
        Hardware.find("gpu", "auto", 1, "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="this machine has 1 GPUs"):
        Hardware.find("gpu", "3", 1, "auto")
