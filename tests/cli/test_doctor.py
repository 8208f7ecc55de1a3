"""`minigpt doctor`: the facts of a bug report, and advice where something could be better."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

import minigpt
from minigpt.cli import doctor
from minigpt.core import cores, hardware
from minigpt.kernels import decode
from tests.cli.test_app import run_main

TOPICS = {
    "minigpt", "python", "packages", "system", "cpu", "cores", "memory", "gpu", "precision",
    "generation", "caches", "disk",
}  # fmt: skip


@pytest.fixture
def fresh_compiler(monkeypatch):
    """Let decode.c be looked up again in this test and in the next one."""
    decode._compiled_library.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    decode._compiled_library.cache_clear()


def doctor_json(monkeypatch, capsys) -> tuple[dict[str, str], list[str]]:
    """Return the facts and the advice of `minigpt doctor --json`."""
    assert run_main(monkeypatch, "doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    return report["facts"], report["advice"]


def test_doctor_prints_one_line_for_each_topic(monkeypatch, capsys):
    assert run_main(monkeypatch, "doctor") == 0
    lines = capsys.readouterr().out.splitlines()
    facts = dict(line.split(":", 1) for line in lines[: len(TOPICS)])
    assert set(facts) == TOPICS
    assert minigpt.__version__ in facts["minigpt"]
    assert f"torch {torch.__version__}" in facts["packages"]
    assert str(torch.get_num_threads()) in facts["cores"]
    assert all(line.startswith("could be better: ") for line in lines[len(TOPICS) :])


def test_doctor_without_a_compiler_advises_one(fresh_compiler, capsys, tmp_path):
    fresh_compiler.setenv("PATH", str(tmp_path))
    fresh_compiler.delenv("CC", raising=False)
    facts, advice = doctor_json(fresh_compiler, capsys)
    assert facts["generation"].startswith("PyTorch")
    assert any("gcc" in line for line in advice)


@pytest.mark.parametrize("compiler", ["no-such-compiler", '"'])
def test_doctor_survives_a_compiler_that_does_not_work(compiler, fresh_compiler, capsys):
    fresh_compiler.setenv("CC", compiler)
    facts, advice = doctor_json(fresh_compiler, capsys)
    assert facts["generation"].startswith("PyTorch")
    assert any("gcc" in line for line in advice)


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_doctor_names_the_precision_and_its_reason(native, precision, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "cpu_has_bfloat16", lambda: native)
    monkeypatch.setattr(hardware, "cpu_bfloat16_is_faster", lambda: native)
    facts, advice = doctor_json(monkeypatch, capsys)
    assert facts["precision"].startswith(f"{precision} on cpu")
    assert "bfloat16" in facts["precision"]
    assert any("AVX512-BF16" in line for line in advice) is not native


def test_doctor_warns_of_threads_disk_and_cache(monkeypatch, capsys, tmp_path):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cores, "cpu_quota", lambda: 1.5)
    monkeypatch.setattr(doctor, "cpu_quota", lambda: 1.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1.5e9))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    facts, advice = doctor_json(monkeypatch, capsys)
    assert "1.5" in facts["cores"]
    assert facts["disk"].startswith("1.5 GB")
    for name in ("OMP_NUM_THREADS=1", "2 GB", "data.cache_dir", "XDG_CACHE_HOME"):
        assert any(name in line for line in advice)
    assert str(home) not in f"{facts} {advice}"  # the name of the user is in it


def test_doctor_reports_the_launcher_that_forbids_a_choice(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    facts, _ = doctor_json(monkeypatch, capsys)
    assert "srun" in facts["precision"]


@pytest.mark.parametrize(
    ("home", "shown"),
    [("/home/ann", "~/x ~ /home/anna/y"), ("/", "/home/ann/x /home/ann /home/anna/y")],
)
def test_doctor_shortens_only_paths_in_the_home_folder(home: str, shown: str):
    assert doctor._without_home("/home/ann/x /home/ann /home/anna/y", home) == shown
