"""The layers of docs/architecture.md: import-linter accepts the package and finds each breach."""

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
def test_layers_contract_finds_a_breach(module: str | None, line: str, tmp_path: Path):
    shutil.copytree(ROOT / "minigpt", tmp_path / "minigpt")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if module is not None:
        path = tmp_path / "minigpt" / module
        path.write_text(path.read_text(encoding="utf-8") + f"\n\n{line}\n", encoding="utf-8")
    process = lint(tmp_path)
    assert process.returncode == (0 if module is None else 1), process.stdout
    if module is not None:
        assert Path(module).stem in process.stdout


def test_package_has_few_entries():
    entries = [p for p in (ROOT / "minigpt").iterdir() if p.name != "__pycache__"]
    assert len(entries) <= 18
