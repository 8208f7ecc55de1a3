"""The notebooks as they are stored: the library alone, small outputs, nothing of one machine."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted(ROOT.glob("examples/*.ipynb"))
PACKAGES = {"minigpt", "torch", "matplotlib", "lightning", "IPython"}
STANDARD = {"pathlib", "dataclasses", "statistics", "collections", "itertools", "html"}


def test_there_are_three():
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_as_it_ran(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    kinds = {"stream", "display_data", "execute_result"}
    assert {output.output_type for output in outputs} <= kinds
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any(output.get("name") == "stdout" for output in outputs)
    assert path.stat().st_size < 420_000
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(work|home|root|tmp|Users)/|file://", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_uses_the_library_alone(path: Path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    source = re.sub(r"^%.*$", "", "\n".join(cells), flags=re.MULTILINE)
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    assert {module.split(".")[0] for module in modules} <= PACKAGES | STANDARD
    assert not [module for module in modules if module.startswith(("minigpt.cli", "hydra"))]
