"""train.py and evaluate.py as they are typed: help in no time. Mistakes: test_bad_input.py."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.cli.hydra_errors import explain_failure
from tests.conftest import ROOT


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )


@pytest.mark.parametrize("program", ["train.py", "evaluate.py"])
def test_help_shows_what_people_need_and_does_not_keep_them_waiting(program: str):
    before = os.times()
    done = run("-X", "importtime", program, "--help")
    after = os.times()
    # Of the processor, so that other work on it does not count.
    assert after.children_user + after.children_system < before.children_user + (
        before.children_system + 4
    )
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hydra" in imported
    assert not {"torch", "lightning", "matplotlib"} & imported  # seconds, each
    wanted = {
        "train.py": ["model: large, medium, small", "budget.tokens=", "logger=wandb", "-m model="],
        "evaluate.py": ["ckpt=runs/", "stride=128", "data=text"],
    }
    assert all(text in done.stdout for text in wanted[program])


@pytest.mark.parametrize(
    "told",
    [
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",  # Windows
        "CUDA out of memory. Tried to allocate 9.00 GiB.",
    ],
)
def test_too_little_memory_is_one_line_on_every_system(told: str):
    said = explain_failure(RuntimeError(told)) or ""
    assert "data.batch_size" in said
    assert said.isprintable()  # and so one line


@pytest.mark.parametrize(
    ("launcher", "package", "missing", "no_cluster"),
    [
        ("submitit_slurm", "submitit", "pip install hydra-submitit-launcher", "srun"),
        ("ray", "ray", "pip install hydra-ray-launcher", "ray start --head"),
    ],
)
def test_a_launcher_with_no_package_or_no_cluster_says_so_in_one_line(
    launcher: str, package: str, missing: str, no_cluster: str, tmp_path: Path
):
    done = subprocess.run(
        [sys.executable, "train.py", "-m", f"hydra/launcher={launcher}", f"runs_dir={tmp_path}"],
        cwd=ROOT, env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    installed = importlib.util.find_spec(package) is not None
    last = done.stderr.splitlines()[-1]  # Ray tells of itself before
    assert last.startswith("error: ")
    assert (no_cluster if installed else missing) in last
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
