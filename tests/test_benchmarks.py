"""The parts of benchmarks/ that depend on the system; `make bench` runs the benchmarks."""

import io
import json
import runpy
import sys
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT

training = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks/training.py")))


@pytest.mark.parametrize(("platform", "megabytes"), [("linux", 2048.0), ("darwin", 2.0)])
def test_peak_memory_is_in_megabytes_on_every_system(platform, megabytes, monkeypatch):
    usage = SimpleNamespace(ru_maxrss=2_000_000)
    resource = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: usage)
    monkeypatch.setitem(sys.modules, "resource", resource)
    monkeypatch.setattr(sys, "platform", platform)
    assert training.peak_memory() == megabytes


def test_worker_measures_steps_without_the_resource_module(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    training.worker("peak", 8, 1, 1, "float32")
    answer = json.loads(capsys.readouterr().out)
    assert answer["seconds"] > 0
    assert answer["memory_mb"] is None
