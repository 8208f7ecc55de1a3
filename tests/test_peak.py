import json

import pytest

from minigpt import peak
from minigpt.hardware import Hardware
from minigpt.peak import matmul_peak

CPU = Hardware.find("cpu", "1", 1, "32-true")


def test_the_peak_is_measured_once_and_kept(tmp_path, monkeypatch):
    measured = matmul_peak(CPU, tmp_path / "cache")
    assert 1e9 < measured < 1e14
    monkeypatch.setattr(peak, "_measure", lambda *_: pytest.fail("measured again"))
    assert matmul_peak(CPU, tmp_path / "cache") == measured


def test_each_dtype_has_its_own_and_a_damaged_file_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(peak, "_measure", lambda accelerator, dtype: float(dtype.itemsize))
    kept = tmp_path / "matmul_peak.json"
    for content in ("", "[1]", '{"old": null}'):
        kept.write_text(content)
        assert matmul_peak(CPU, tmp_path) == 4.0
        assert matmul_peak(Hardware.find("cpu", "1", 1, "bf16-mixed"), tmp_path) == 2.0
        assert sorted(json.loads(kept.read_text()).values()) == [2.0, 4.0]
