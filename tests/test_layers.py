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
    ("module", "line", "n_broken"),
    [
        (None, "", 0),
        ("core/text.py", "import minigpt.runs.folder", 1),
        ("training/optim.py", "import minigpt.analysis.embeddings", 1),
        ("runs/folder.py", "import omegaconf", 1),
        ("novel/novel.py", "", 1),  # a package without a layer
        ("novel/novel.py", "import hydra", 2),
    ],
)
def test_layers_contract_finds_a_breach(
    module: str | None, line: str, n_broken: int, tmp_path: Path
):
    shutil.copytree(ROOT / "minigpt", tmp_path / "minigpt")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if module is not None:
        path = tmp_path / "minigpt" / module
        path.parent.mkdir(exist_ok=True)
        path.with_name("__init__.py").touch()
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n\n{line}\n")
    process = lint(tmp_path)
    assert process.returncode == min(n_broken, 1), process.stdout
    assert process.stdout.count("BROKEN") == n_broken
    if module is not None:
        assert Path(module).stem in process.stdout


def test_package_has_few_entries():
    entries = [p for p in (ROOT / "minigpt").iterdir() if p.name != "__pycache__"]
    assert len(entries) <= 18
