import contextlib
import os
import re

import pytest
import torch

from minigpt.core import hardware
from minigpt.core.distributed import (
    Launcher,
    forget_stale_launcher,
    global_rank,
    in_slurm_job,
    step_name,
)
from minigpt.core.gpu_memory import end_if_out_of_memory, is_out_of_memory
from minigpt.core.hardware import Hardware, gpu_memory_for
from minigpt.core.settings import UserError
from minigpt.training.config import TrainConfig, TrainerConfig
from minigpt.training.loop import train


@pytest.mark.parametrize(
    ("native", "faster", "precision"),
    [(True, True, "bf16-mixed"), (True, False, "32-true"), (False, False, "32-true")],
)
def test_a_cpu_trains_in_bfloat16_only_where_that_is_fast(monkeypatch, native, faster, precision):
    monkeypatch.setattr(hardware, "cpu_has_bfloat16", lambda: native)
    monkeypatch.setattr(hardware, "cpu_bfloat16_is_faster", lambda: faster)
    result = Hardware.detect("cpu", "auto", 1, "auto")
    assert (result.precision, result.devices) == (precision, 1)
    assert "bfloat16" in result.why


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_float16_precision_on_a_cpu_is_replaced_with_a_reason(monkeypatch, native, precision):
    monkeypatch.setattr(hardware, "cpu_has_bfloat16", lambda: native)
    monkeypatch.setattr(hardware, "cpu_bfloat16_is_faster", lambda: native)
    result = Hardware.detect("cpu", "auto", 1, "16-mixed")
    assert result.precision == precision
    assert "16-mixed" in result.why
    assert not result.emulated


def test_speed_of_bfloat16_is_measured_with_one_thread_and_the_threads_are_restored(monkeypatch):
    seconds = {torch.bfloat16: 1.0, torch.float32: 2.0}
    threads = torch.get_num_threads()

    def fastest(side: int, accelerator: str, dtype: torch.dtype, tries: int) -> float:
        assert torch.get_num_threads() == 1
        return seconds[dtype]

    monkeypatch.setattr(hardware, "_fastest", fastest)
    assert hardware.cpu_bfloat16_is_faster.__wrapped__()
    seconds[torch.float32] = 0.5
    assert not hardware.cpu_bfloat16_is_faster.__wrapped__()
    assert torch.get_num_threads() == threads


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
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = Hardware.detect("auto", "auto", 1, "auto")
    assert (result.accelerator, result.devices, result.precision) == ("mps", 1, "32-true")
    with pytest.raises(UserError, match="(?=.*devices=2)(?=.*accelerator=.cpu)"):
        Hardware.detect("auto", "2", 1, "auto")
    config = TrainConfig(trainer=TrainerConfig(strategy="ddp"))
    with pytest.raises(UserError, match="(?=.*strategy=.ddp)(?=.*trainer.accelerator=.cpu)"):
        train(config)


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3", "RANK": "4",
            "LOCAL_RANK": "1", "MASTER_PORT": "29500"}  # fmt: skip
SRUN = {"SLURM_NTASKS": "6", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "3",
        "SLURM_STEP_ID": "0", "SLURM_PROCID": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
        "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train"}  # fmt: skip


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


WRONG = [
    *((TORCHRUN, name, value) for name in TORCHRUN for value in (None, "", "x", "-1", "\u0663")
      if name != "TORCHELASTIC_RUN_ID"),
    (TORCHRUN, "RANK", "6"),
    (TORCHRUN, "LOCAL_WORLD_SIZE", "4"), (TORCHRUN, "LOCAL_WORLD_SIZE", "0"),
    *((SRUN, name, value) for name in ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
      for value in (None, "", "x")),
    (SRUN, "SLURM_PROCID", "6"), (SRUN, "SLURM_NNODES", "4"),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "name", "value"), WRONG)
def test_launcher_variables_that_are_missing_or_wrong_are_an_error(
    monkeypatch, variables, name, value
):
    for other, number in {**variables, name: value}.items():
        if number is not None:
            monkeypatch.setenv(other, number)
    with pytest.raises(UserError, match=re.escape(name)):
        Hardware.detect("cpu", "auto", 1, "auto")
    assert global_rank() == 0  # does not raise


STALE = {
    "empty": {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""},
    "no number": {"RANK": "a", "WORLD_SIZE": "b", "MASTER_PORT": "c"},
    "rank alone": {"RANK": "1"},
    "local rank alone": {"LOCAL_RANK": "1"},
    "no address": {"RANK": "1", "WORLD_SIZE": "2"},
    "one process": {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "29500"},
    "wrong Slurm": {"SLURM_NTASKS": "", "SLURM_PROCID": "x", "SLURM_JOB_ID": "7"},
}


@pytest.mark.parametrize("variables", STALE.values(), ids=STALE)
def test_stale_launcher_variables_are_ignored_with_one_warning(monkeypatch, caplog, variables):
    monkeypatch.setattr(os, "environ", {**os.environ, **variables})
    assert (Launcher.detect(), global_rank(), step_name()) == (None, 0, None)
    forget_stale_launcher()
    forget_stale_launcher()
    assert not (variables.keys() - {"SLURM_JOB_ID"}) & os.environ.keys()
    (message,) = caplog.messages
    assert all(name in message for name in variables if name != "SLURM_JOB_ID")


@pytest.mark.parametrize(
    "shell",
    [{"SLURM_JOB_NAME": name} for name in ("bash", "zsh", "fish", "interactive", "Interactive")]
    + [{"SLURM_JOB_NAME": "mine", "SLURM_PTY_PORT": "40000"}],
)
def test_an_interactive_slurm_shell_is_no_job_step(monkeypatch, caplog, shell):
    monkeypatch.setattr(os, "environ", {**os.environ, **SRUN, **shell})
    assert (Launcher.detect(), global_rank(), step_name()) == (None, 0, None)
    assert not in_slurm_job()
    forget_stale_launcher()
    assert caplog.messages == []
    assert "SLURM_PROCID" not in os.environ  # Lightning would read it


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "29500"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"},
        {"PMI_RANK": "0", "PMI_SIZE": "4"},
    ],
    ids=["torch.distributed", "mpirun", "PMI"],
)
def test_processes_of_an_unknown_launcher_are_refused(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="torchrun"):
        Hardware.detect("cpu", "auto", 1, "auto")
    forget_stale_launcher()
    assert variables.items() <= os.environ.items()  # so that train raises


def recording_without_memory(suppressed: bool) -> None:
    try:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    except torch.OutOfMemoryError as cause:
        raise RuntimeError("CUDA error: operation failed") from None if suppressed else cause


def cuda_without_memory() -> None:
    raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")


def another_error() -> None:
    raise RuntimeError("CUDA error: misaligned address")


@pytest.mark.parametrize(
    ("fail", "full"),
    [
        (lambda: recording_without_memory(True), True),
        (lambda: recording_without_memory(False), True),
        (cuda_without_memory, True),
        (another_error, False),
    ],
    ids=["context", "cause", "text", "another error"],
)
def test_out_of_memory_is_recognised_in_a_chain_of_errors(fail, full):
    with pytest.raises(RuntimeError) as error:
        fail()
    assert is_out_of_memory(error.value) is full
    with pytest.raises(UserError if full else RuntimeError), gpu_memory_for("n", 4):
        fail()
    with contextlib.nullcontext() if full else pytest.raises(RuntimeError), end_if_out_of_memory():
        fail()


@pytest.mark.parametrize(
    ("value", "at_once", "fix"),
    [(4000, 1024, 512), (300, 1024, 150), (300, None, 150), (1, 1024, None)],
)
def test_out_of_memory_suggests_half_of_what_is_computed_at_once(value, at_once, fix):
    with pytest.raises(UserError) as error, gpu_memory_for("n", value, at_once):
        cuda_without_memory()
    assert error.value.fix == ({"n": fix} if fix else {})


def test_several_nodes_need_a_launcher():
    with pytest.raises(UserError, match="(?=.*num_nodes=2)(?=.*torchrun)(?=.*srun)"):
        Hardware.detect("cpu", "2", 2, "auto")


def test_peak_is_measured_with_the_matrices_that_a_full_gpu_has_memory_for(monkeypatch, tmp_path):
    def fastest(side: int, *_: object) -> float:
        if side > 1024:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return side**3 / 1e12

    monkeypatch.setattr(hardware, "_fastest", fastest)
    device = Hardware("cuda", 1, 1, "bf16-mixed", "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert hardware.matmul_peak(device, tmp_path) == pytest.approx(2e12)
