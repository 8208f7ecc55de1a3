import pytest
import torch

from minigpt.core import hardware
from minigpt.core.distributed import global_rank
from minigpt.core.hardware import Hardware
from minigpt.core.settings import UserError
from minigpt.training.config import TrainConfig, TrainerConfig
from minigpt.training.loop import train


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_cpu_trains_in_bfloat16_only_where_it_is_native(monkeypatch, native, precision):
    monkeypatch.setattr(hardware, "cpu_has_bfloat16", lambda: native)
    result = Hardware.detect("cpu", "auto", 1, "auto")
    assert (result.precision, result.devices) == (precision, 1)
    assert "bfloat16" in result.why


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_float16_precision_on_a_cpu_is_replaced_with_a_reason(monkeypatch, native, precision):
    monkeypatch.setattr(hardware, "cpu_has_bfloat16", lambda: native)
    result = Hardware.detect("cpu", "auto", 1, "16-mixed")
    assert result.precision == precision
    assert "16-mixed" in result.why
    assert not result.emulated


def test_requested_bfloat16_is_used_with_a_reason_if_emulated(monkeypatch):
    for native in (True, False):
        monkeypatch.setattr(hardware, "cpu_has_bfloat16", lambda native=native: native)
        result = Hardware.detect("cpu", "auto", 1, "bf16-mixed")
        assert result.precision == "bf16-mixed"
        assert ("32-true" in result.why) is not native  # the faster one
        assert result.emulated is not native


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16-mixed"), (False, "16-mixed")])
def test_a_gpu_is_preferred_and_all_of_them_are_used(monkeypatch, native, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    result = Hardware.detect("auto", "auto", 1, "auto")
    assert (result.accelerator, result.devices, result.world_size) == ("cuda", 4, 4)
    assert result.precision == precision


def test_missing_accelerator_or_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="accelerator=.gpu"):
        Hardware.detect("gpu", "auto", 1, "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"(?=.*devices=3)(?=.*\b1\b)"):
        Hardware.detect("gpu", "3", 1, "auto")


def test_the_gpu_of_a_mac_is_one_device(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = Hardware.detect("auto", "auto", 1, "auto")
    assert (result.accelerator, result.devices, result.precision) == ("mps", 1, "32-true")
    with pytest.raises(UserError, match="(?=.*devices=2)(?=.*accelerator=.cpu)"):
        Hardware.detect("auto", "2", 1, "auto")
    config = TrainConfig(trainer=TrainerConfig(strategy="ddp"))
    with pytest.raises(UserError, match="(?=.*strategy=.ddp)(?=.*trainer.accelerator=.cpu)"):
        train(config)


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3", "RANK": "4"}
SRUN = {"SLURM_NTASKS": "6", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "3",
        "SLURM_STEP_ID": "0", "SLURM_PROCID": "4", "SLURM_JOB_NAME": "train"}  # fmt: skip


@pytest.mark.parametrize(
    ("launcher", "variables"), [("torchrun", TORCHRUN), ("srun", SRUN)], ids=["torchrun", "srun"]
)
def test_devices_are_the_processes_of_the_launcher(monkeypatch, launcher, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert global_rank() == 4
    for devices, num_nodes in (("auto", 1), ("3", 2)):
        result = Hardware.detect("cpu", devices, num_nodes, "auto")
        assert (result.devices, result.num_nodes, result.world_size) == (3, 2, 6)
    with pytest.raises(
        UserError, match=rf"(?=.*devices=2\b)(?=.*{launcher})(?=.*\b3\b)(?=.*[^=]\b2\b)"
    ):
        Hardware.detect("cpu", "2", 1, "auto")
    with pytest.raises(UserError, match=rf"(?=.*num_nodes=4\b)(?=.*{launcher})"):
        Hardware.detect("cpu", "auto", 4, "auto")


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("SLURM_STEP_ID", r"(?=.*\b6\b)(?=.*\bsrun\b)"),
        ("SLURM_NTASKS_PER_NODE", r"--ntasks-per-node=3\b"),
    ],
)
def test_slurm_tasks_that_would_deadlock_are_refused(monkeypatch, missing, named):
    for name, value in SRUN.items():
        if name != missing:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=named):
        Hardware.detect("cpu", "auto", 1, "auto")


def test_several_nodes_need_a_launcher():
    with pytest.raises(UserError, match="(?=.*num_nodes=2)(?=.*torchrun)(?=.*srun)"):
        Hardware.detect("cpu", "2", 2, "auto")
