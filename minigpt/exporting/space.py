"""Export of a model as a Space: a folder from which the Hugging Face Hub runs the playground.

>>> write_space(Run.load("runs/my-run"), "my-space")  # then: python my-space/app.py

Like the page of `minigpt playground`, the page of a Space generates stories and shows the internals
of the model. It cannot train models.
"""

from __future__ import annotations

import shutil
import sys
from importlib import metadata
from pathlib import Path

import yaml

import minigpt
from minigpt.core.files import user_path, write_json, write_text
from minigpt.core.settings import UserError
from minigpt.exporting.config import ExportConfig
from minigpt.exporting.exporter import export
from minigpt.exporting.folder import MARKER, atomic_folder, check_output
from minigpt.kernels.choice import is_plain
from minigpt.runs.folder import Run, class_path

APP, MODEL = "app.py", "model"
# Parts of this package, and other packages, that the playground needs. The Hub installs Gradio.
_PARTS = (
    "__init__.py", "analysis", "core", "generation", "kernels", "model.py", "playground", "runs",
    "tokenizer.py",
)  # fmt: skip
_PACKAGES = (
    "torch", "tokenizers", "safetensors", "numpy", "pyyaml", "rich", "matplotlib", "filelock",
)  # fmt: skip
_PROGRAM = '''"""Web page of the model in model/, for a Space or for this machine: python app.py."""

import os
import sys
from pathlib import Path

from minigpt.core.console import show_log
from minigpt.core.settings import UserError
from minigpt.playground.server import serve
from minigpt.runs.folder import Run

show_log()
try:
    serve(
        [Run.load(Path(__file__).parent / "model")],
        host=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),  # set by the Hub
        port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
        allow_training=False,
    )
except KeyboardInterrupt:
    sys.exit(130)
except UserError as error:
    sys.exit(f"error: {error}")
'''


def write_space(run: Run, out: str | Path, name: str | None = None) -> list[Path]:
    """Write a Space with the model of a run; `out` is replaced only if all files were written.

    The folder contains the weights (bfloat16), the code of the playground, app.py, a README.md with
    the settings of the Space, and requirements.txt with the package versions that are installed
    here.

    Args:
        run: a run, or an export in the format safetensors.
        out: the output folder: a new or an empty folder, or an earlier export, which is replaced.
        name: name of the Space, such as user/name; None means the name of the output folder.

    Returns:
        The paths of all files in `out`, sorted.

    Raises:
        UserError: the run cannot be read, the class of its model is not `GPT`, `out` contains files
            that are not from an export, or Gradio is not installed.
    """
    out = user_path(out, "out")
    check_output(out, [run.folder])
    try:
        gradio = _version("gradio")
    except metadata.PackageNotFoundError:
        raise UserError("a Space needs the package gradio: run pip install gradio") from None
    if not is_plain(model := run.load_model()):
        problem = (
            f"a Space lacks the code of {class_path(run.model or type(model))}: choose a run of GPT"
        )
        raise UserError(problem, "run", str(run.folder))
    title = (name or out.resolve().name).rpartition("/")[2]
    settings = {
        "title": title,
        "sdk": "gradio",
        "sdk_version": gradio,
        "python_version": ".".join(map(str, sys.version_info[:2])),
        "app_file": APP,
        "short_description": "A small language model that tells stories",
        "pinned": False,
    }
    front = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    text = f"The playground of Mini GPT with one model. To run it here: `python {APP}`."
    versions = [f"{package}=={_version(package)}" for package in _PACKAGES]
    with atomic_folder(out) as folder:
        export(run, folder / MODEL, ExportConfig("safetensors"), title)
        _copy_code(folder / "minigpt")
        write_text(folder / APP, _PROGRAM)
        write_text(folder / "requirements.txt", "\n".join([*versions, ""]))
        write_text(folder / "README.md", f"---\n{front}---\n# {title}\n\n{text}\n")
        files = sorted([MARKER, *(path.name for path in folder.iterdir())])
        write_json(folder / MARKER, {"format": "space", "dtype": "bfloat16", "files": files})
    return sorted(path for path in out.rglob("*") if path.is_file())


def _version(package: str) -> str:
    """Return the installed version of a package, without a local part such as +cpu."""
    return metadata.version(package).partition("+")[0]


def _copy_code(folder: Path) -> None:
    package = Path(str(minigpt.__file__)).parent
    for part in _PARTS:
        source = package / part
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, folder / part)
