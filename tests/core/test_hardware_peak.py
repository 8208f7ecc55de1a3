import json

import pytest
import torch

from minigpt.core import hardware
from minigpt.core.hardware import Hardware, matmul_peak

CPU = Hardware.detect("cpu", "1", 1, "32-true")


def test_matmul_peak_is_measured_once_and_cached(tmp_path, monkeypatch):
    measured = matmul_peak(CPU, tmp_path / "cache")
    assert 1e9 < measured < 1e14
    monkeypatch.setattr(hardware, "_measure", lambda *_: pytest.fail("measured again"))
    assert matmul_peak(CPU, tmp_path / "cache") == measured


def test_matmul_peak_measured_again_replaces_a_lower_one(tmp_path, monkeypatch):
    speeds = iter([2e9, 1e9, 5e9])
    monkeypatch.setattr(hardware, "_measure", lambda *_: next(speeds))
    peaks = [matmul_peak(CPU, tmp_path, again) for again in (False, True, True, False)]
    assert peaks == [2e9, 2e9, 5e9, 5e9]


def test_matmul_peak_has_one_entry_per_dtype_and_replaces_a_damaged_file(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "_measure", lambda accelerator, dtype: float(dtype.itemsize))
    file = tmp_path / "matmul_peak.json"
    for content in ("", "[1]", '{"old": null}'):
        file.write_text(content)
        assert matmul_peak(CPU, tmp_path) == 4.0
        assert matmul_peak(Hardware.detect("cpu", "1", 1, "bf16-mixed"), tmp_path) == 2.0
        assert sorted(json.loads(file.read_text()).values()) == [2.0, 4.0]


def test_matmul_peak_works_with_a_read_only_cache(tmp_path):
    (tmp_path / "file").write_text("")
    assert matmul_peak(CPU, tmp_path / "file/cache") > 0


def test_matmul_peak_of_a_slow_dtype_uses_small_matrices(monkeypatch):
    sides = []

    def fastest(side: int, accelerator: str, dtype: torch.dtype, tries: int) -> float:
        sides.append(side)
        return side / 1000 if dtype == torch.bfloat16 else side / 1e6  # seconds

    monkeypatch.setattr(hardware, "_fastest", fastest)
    assert hardware._measure("cpu", torch.bfloat16) == 2 * 256**3 / 0.256
    assert set(sides) == {256}
    assert hardware._measure("cpu", torch.float32) == 2 * 2048**3 / 0.002048


def test_matmul_peak_ignores_the_warm_up_product(monkeypatch):
    clock = iter([0.0, 9.0, 9.0, 9.5])
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(clock))
    assert hardware._fastest(4, "cpu", torch.float32, 2) == 0.5
