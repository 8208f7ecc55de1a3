"""The Makefile: `make help` lists every target with what it does."""

import json
import re
import subprocess

from tests.conftest import ROOT


def make_help(*words: str) -> dict[str, str]:
    """Return the description of each target that `make words…` prints."""
    # The suite may itself be a child of make, which then prints the names of folders.
    command = ["make", "--no-print-directory", *words]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(line.strip().split(maxsplit=1) for line in process.stdout.splitlines())


def test_make_help_describes_every_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    phony = {name for names in re.findall(r"^\.PHONY:(.*)", makefile, re.MULTILINE)
             for name in names.split()}  # fmt: skip
    assert targets == phony
    assert targets == set(make_help("help"))
    assert {"quickstart", "test", "lint", "docs", "golden"} <= targets


def test_make_without_a_target_prints_the_help():
    assert make_help() == make_help("help")


def test_make_life_names_the_minutes_of_each_size_at_the_recorded_speeds():
    life = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nlife:")[2]
    life = life.partition("\n\n")[0]
    budget = re.search(r"budget\.tokens=(\S+)", life)
    assert budget is not None
    records = [
        json.loads((ROOT / "docs/results/benchmarks" / name).read_text(encoding="utf-8"))
        for name in ("training.json", "avx2/training.json")
    ]
    printed = re.findall(r"(small|medium|large) +(\d+) to +(\d+) min", life)
    assert [size for size, *_ in printed] == ["small", "medium", "large"]
    for size, *minutes in printed:
        speeds = [record[f"tokens per second, ours {size}"] for record in records]
        assert list(map(int, minutes)) == [round(float(budget[1]) / v / 60) for v in speeds]
