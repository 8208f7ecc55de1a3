"""Arguments that several verbs share: runs, output folders and model classes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from minigpt.core.files import user_path
from minigpt.core.settings import UserError

if TYPE_CHECKING:
    from minigpt.runs.folder import Run

PathArgument = partial(Argument, parser=user_path)
PathOption = partial(Option, parser=user_path, metavar="PATH")
RunPath = Annotated[Path, PathArgument(help="Run folder, checkpoint, snapshot or exported model.")]
ClassPath = Annotated[str | None, Option(help="Class of the model, such as mypackage.MyGPT.")]


def load_runs(paths: list[Path], class_path: str | None) -> list[Run]:
    """Load the runs at `paths`.

    Args:
        paths: run folders, checkpoints, snapshots or exported models.
        class_path: dotted path of a custom model class. The class is used for the runs that were
            trained with a custom class. If there are no such runs, it is used for all runs.
    """
    from minigpt.runs.folder import Run, with_factory

    runs = [Run.load(path) for path in paths]
    if class_path is None:
        return runs
    from minigpt.cli.compose import import_class

    return with_factory(runs, import_class(class_path, "class_path"))


def check_folder(path: Path | None, option: str = "--out") -> None:
    """Raise UserError if `path`, the value of the option called `option`, is a file."""
    if path is not None and path.exists() and not path.is_dir():
        raise UserError(f"{option} {path} is a file: give an existing or a new folder")
