import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from minigpt.core import cores
from minigpt.core.cores import cpu_quota, limit_threads, usable_cores
from minigpt.core.hardware import Hardware, set_threads
from minigpt.core.settings import UserError
from minigpt.training.config import TrainerConfig
from tests.conftest import trained_folder

V1, V2 = ("cpu.cfs_quota_us", "cpu.cfs_period_us"), ("cpu.max",)
CGROUPS = {  # content of /proc/self/cgroup, files below /sys/fs/cgroup, quota in cores
    "no limit": ("0::/\n", {"cpu.max": "max 100000"}, None),
    "no cgroups": ("", {}, None),
    "container, v2": ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
    "unit, v2": ("0::/a.slice/b.scope\n", {"a.slice/b.scope/cpu.max": "50000 100000"}, 0.5),
    "parent is smaller, v2": (
        "0::/a/b\n", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "300000 100000"}, 1.0),
    "path of the host, v2": ("0::/../../docker/7\n", {"cpu.max": "200000 100000"}, 2.0),
    "container, v1": (
        "5:cpu,cpuacct:/docker/7\n0::/docker/7\n",
        {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 2.5),
    "group, v1": (
        "1:cpu:/batch/job\n",
        {"cpu/batch/job/cpu.cfs_quota_us": "50000", "cpu/batch/job/cpu.cfs_period_us": "50000"},
        1.0),
    "no limit, v1": (
        "1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    "damaged": ("x\n:\n0::/a\n", {"a/cpu.max": "", "cpu.max": "1 0"}, None),
}  # fmt: skip


@pytest.fixture
def cgroup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Return a function that writes the files of a cgroup, with an affinity of 8 cores."""
    monkeypatch.setattr(cores, "_MOUNT", str(tmp_path / "mount"))
    monkeypatch.setattr(cores, "_PROCESS", str(tmp_path / "cgroup"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

    def write(text: str, files: dict[str, str]) -> None:
        (tmp_path / "cgroup").write_text(text)
        for name, content in files.items():
            path = tmp_path / "mount" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")

    return write


@pytest.mark.parametrize(("text", "files", "quota"), CGROUPS.values(), ids=CGROUPS)
def test_cpu_quota_is_the_smallest_of_the_cgroups(cgroup, text, files, quota):
    cgroup(text, files)
    assert cpu_quota() == quota
    assert usable_cores() == (8 if quota is None else max(1, int(quota)))


@pytest.mark.parametrize(
    ("variable", "quota", "threads"),
    [(None, "350000 100000", "3"), ("", "50000 100000", "1"), ("6", "100000 100000", "6"),
     (None, "max 100000", None), (None, "900000 100000", None)],
)  # fmt: skip
def test_omp_num_threads_is_set_only_to_a_quota_below_the_affinity(
    cgroup, monkeypatch, variable, quota, threads
):
    cgroup("0::/\n", {"cpu.max": quota})
    monkeypatch.setattr(os, "environ", {} if variable is None else {"OMP_NUM_THREADS": variable})
    limit_threads()
    assert os.environ.get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize(
    ("setting", "variable", "n_devices", "threads"),
    [(None, None, 1, 3), (None, "", 1, 3), (None, None, 2, 1), (None, "1", 1, None),
     (5, "1", 1, 5), (5, None, 2, 5)],
)  # fmt: skip
def test_trainer_threads_then_omp_num_threads_then_the_quota_set_the_threads(
    cgroup, monkeypatch, setting, variable, n_devices, threads
):
    cgroup("0::/\n", {"cpu.max": "300000 100000"})
    variables = {} if variable is None else {"OMP_NUM_THREADS": variable}
    monkeypatch.setattr(os, "environ", variables)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    numbers: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    set_threads(setting, Hardware("cpu", n_devices, 1, "32-true", ""))
    assert numbers == ([] if threads is None else [threads])
    assert os.environ["OMP_NUM_THREADS"] == str(threads or variable)


def test_trainer_threads_hold_during_training_only(tiny):
    before, during = torch.get_num_threads(), list[int]()

    class Record(Callback):
        def on_train_start(self, *_: Any, **__: Any) -> None:
            during.append(torch.get_num_threads())

    trained_folder([*tiny, f"trainer.threads={before + 1}"], callbacks=[Record()])
    assert (during, torch.get_num_threads()) == ([before + 1], before)
    with pytest.raises(UserError, match="threads"):
        TrainerConfig(threads=0)
