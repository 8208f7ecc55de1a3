"""The notebooks of examples/ run from the first cell to the last, on tiny budgets."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT, tiny_overrides, trained_folder

NOTEBOOKS = sorted(ROOT.glob("examples/*.ipynb"))


def run_notebook(path: Path, folder: Path, parameters: dict[str, object]) -> nbformat.NotebookNode:
    """Run a notebook in `folder` with other values in the cell that is tagged `parameters`."""
    notebook = nbformat.read(path, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    names: dict[str, object] = {}
    exec(cell.source, names)
    assert set(parameters) <= set(names)
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def printed(notebook: nbformat.NotebookNode) -> str:
    """All that the cells printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def figures(notebook: nbformat.NotebookNode) -> int:
    """Number of cells that show a figure."""
    cells = [cell.get("outputs", []) for cell in notebook.cells]
    return sum(any("image/png" in output.get("data", {}) for output in cell) for cell in cells)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with a trained run, and the settings that made it."""
    os.environ["PYTHONPATH"] = str(ROOT)  # of the kernels
    folder = tmp_path_factory.mktemp("examples")
    settings = tiny_overrides(folder)
    return trained_folder([*settings, "name=parent"]), settings


def test_own_text_trains_and_fine_tunes(trained: tuple[Path, list[str]], tmp_path: Path):
    parent, settings = trained
    own = [word for word in settings if not word.startswith(("data=", "data.train", "budget"))]
    values = {
        "files": [str(parent.parent.parent / "train.txt")], "budget": 2560,
        "parent": str(parent), "settings": own,
    }  # fmt: skip
    notebook = run_notebook(NOTEBOOKS[0], tmp_path, values)
    assert printed(notebook).count("bits per byte") == 2
    assert figures(notebook) == 1


def test_look_inside_shows_words_attention_and_loss(tmp_path: Path):
    small = str(ROOT / "releases/small")
    values = {"models": {"first": small, "last": small}, "n_stories": 3}
    notebook = run_notebook(NOTEBOOKS[1], tmp_path, values)
    assert "princess - girl + boy: " in printed(notebook)
    assert printed(notebook).count("nats per word") == 2
    assert figures(notebook) == 5


def test_architectures_are_compared_over_seeds(trained: tuple[Path, list[str]], tmp_path: Path):
    _, settings = trained
    own = [word for word in settings if not word.startswith(("data=", "data.train", "data.valid"))]
    values = {"budget": 2560, "seeds": (1, 2), "n_stories": 200, "settings": own}
    notebook = run_notebook(NOTEBOOKS[2], tmp_path, values)
    assert printed(notebook).count("validation loss") == 4
    assert "standard error" in printed(notebook)
    assert figures(notebook) == 1
