"""The floors of docs/architecture.md: import-linter holds them, and sees each breach."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [program, "--no-cache"], cwd=folder, env={"PYTHONPATH": str(folder)},
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "line"),
    [
        (None, ""),
        ("core/text.py", "import minigpt.runs.folder"),
        ("training/optim.py", "import minigpt.analysis.embeddings"),
        ("runs/folder.py", "import omegaconf"),
    ],
)
def test_layers_contract_sees_a_breach(module: str | None, line: str, tmp_path: Path):
    shutil.copytree(ROOT / "minigpt", tmp_path / "minigpt")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if module is not None:
        path = tmp_path / "minigpt" / module
        path.write_text(path.read_text(encoding="utf-8") + f"\n\n{line}\n", encoding="utf-8")
    done = lint(tmp_path)
    assert done.returncode == (0 if module is None else 1), done.stdout
    if module is not None:
        assert Path(module).stem in done.stdout


def test_the_package_stays_small_enough_to_find_a_room_in():
    entries = [p for p in (ROOT / "minigpt").iterdir() if p.name != "__pycache__"]
    assert len(entries) <= 18
