"""Errors of launchers, of missing programs and of memory; others: test_bad_input.py."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from torch._inductor.exc import InductorError

from minigpt.cli.hydra_errors import explain_failure
from tests.conftest import ROOT


@pytest.mark.parametrize(
    "message",
    [
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",  # Windows
        "CUDA out of memory. Tried to allocate 9.00 GiB.",
    ],
)
def test_out_of_memory_is_a_one_line_error_on_every_system(message: str):
    explanation = explain_failure(RuntimeError(message)) or ""
    assert "data.batch_size" in explanation
    assert explanation.isprintable()


def test_out_of_memory_of_an_evaluation_names_its_own_batch():
    explanation = explain_failure(RuntimeError("CUDA out of memory."), "evaluate") or ""
    assert "batch_size" in explanation
    assert "data.batch_size" not in explanation


def test_failure_of_the_compiler_names_the_setting():
    error = InductorError(FileNotFoundError("gcc"), None)
    assert "trainer.compile=false" in (explain_failure(error) or "")


def test_refusal_of_sbatch_is_a_one_line_error():
    explanation = explain_failure(RuntimeError("sbatch: error: Invalid partition\nsbatch: more"))
    assert explanation is not None
    assert explanation.isprintable()
    assert "Invalid partition" in explanation
    assert "hydra.launcher" in explanation


@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "package", "missing", "no_cluster"),
    [
        ("submitit_slurm", "submitit", "pip install hydra-submitit-launcher", "srun"),
        ("ray", "ray", "pip install hydra-ray-launcher", "ray start --head"),
    ],
)
def test_launcher_without_package_or_cluster_is_a_one_line_error(
    launcher: str, package: str, missing: str, no_cluster: str, tmp_path: Path
):
    process = subprocess.run(
        [sys.executable, "train.py", "-m", f"hydra/launcher={launcher}", f"runs_dir={tmp_path}"],
        cwd=ROOT, env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    installed = importlib.util.find_spec(package) is not None
    last = process.stderr.splitlines()[-1]  # Ray logs before
    assert last.startswith("error: ")
    assert (no_cluster if installed else missing) in last
    assert "Traceback" not in process.stderr
    assert process.returncode == 2
