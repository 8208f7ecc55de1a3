"""Peak memory of preparing large texts, in processes of their own."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.timeout(600)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", ["chinese", "base64:one"])
def test_memory_of_a_preparation_does_not_grow_with_the_text(case, monkeypatch):
    """Unbounded, the larger text takes 0.5 GB more than the smaller one."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    name, *one = case.split(":")
    cases = [":".join([name, megabytes, *one]) for megabytes in ("4", "10")]
    command = [sys.executable, str(ROOT / "benchmarks/preparation.py"), "--vocab-size", "300"]
    output = subprocess.run([*command, *cases], check=True, stdout=subprocess.PIPE).stdout
    small, large = (row["peak_memory_megabytes"] for row in json.loads(output)["rows"])
    assert large < small + 120
    assert large < 1000
