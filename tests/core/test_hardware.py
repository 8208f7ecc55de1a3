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
    found = Hardware.detect("cpu", "auto", 1, "auto")
    assert (found.precision, found.devices) == (precision, 1)
    assert "bfloat16" in found.why


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_float16_on_a_cpu_becomes_what_it_has_and_says_so(monkeypatch, native, precision):
    monkeypatch.setattr(hardware, "cpu_has_bfloat16", lambda: native)
    found = Hardware.detect("cpu", "auto", 1, "16-mixed")
    assert found.precision == precision
    assert "16-mixed" in found.why
    assert not found.emulated


def test_bfloat16_that_is_asked_for_is_used_and_the_log_says_if_it_is_slow(monkeypatch):
    for native in (True, False):
        monkeypatch.setattr(hardware, "cpu_has_bfloat16", lambda native=native: native)
        found = Hardware.detect("cpu", "auto", 1, "bf16-mixed")
        assert found.precision == "bf16-mixed"
        assert ("32-true" in found.why) is not native  # the faster one
        assert found.emulated is not native


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16-mixed"), (False, "16-mixed")])
def test_a_gpu_is_preferred_and_all_of_them_are_used(monkeypatch, native, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    found = Hardware.detect("auto", "auto", 1, "auto")
    assert (found.accelerator, found.devices, found.world_size) == ("cuda", 4, 4)
    assert found.precision == precision


def test_hardware_that_is_not_there_is_refused(monkeypatch):
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
    found = Hardware.detect("auto", "auto", 1, "auto")
    assert (found.accelerator, found.devices, found.precision) == ("mps", 1, "32-true")
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
def test_there_is_a_device_for_each_process_that_a_launcher_started(
    monkeypatch, launcher, variables
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert global_rank() == 4
    for devices, num_nodes in (("auto", 1), ("3", 2)):
        found = Hardware.detect("cpu", devices, num_nodes, "auto")
        assert (found.devices, found.num_nodes, found.world_size) == (3, 2, 6)
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
def test_slurm_tasks_that_would_wait_for_each_other_for_ever_are_refused(
    monkeypatch, missing, named
):
    for name, value in SRUN.items():
        if name != missing:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=named):
        Hardware.detect("cpu", "auto", 1, "auto")


def test_several_nodes_need_a_launcher():
    with pytest.raises(UserError, match="(?=.*num_nodes=2)(?=.*torchrun)(?=.*srun)"):
        Hardware.detect("cpu", "2", 2, "auto")
