"""W&B sweep files for an installed Mini GPT: those of sweeps/, with `minigpt train` as command."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

import minigpt
from minigpt.core.files import write_text
from minigpt.core.settings import UserError, unknown_name


def write_sweep(name: str, path: Path) -> Path:
    """Write the sweep `name` to `path`, with `minigpt train` as its command; return the path.

    Raises:
        UserError: there is no sweep of that name, or the file exists.
    """
    beside = Path(minigpt.__file__).parent.parent / "sweeps"  # in a checkout
    folder = beside if beside.is_dir() else resources.files("minigpt") / "sweeps"
    files = [file for file in folder.iterdir() if file.name.endswith(".yaml")]
    sweeps = {file.name.removesuffix(".yaml"): file for file in files}
    if name not in sweeps:
        raise UserError(unknown_name(name, sorted(sweeps), "sweep"))
    if path.exists():
        raise UserError(f"{path} exists: remove it, or give another file", "out")
    sweep: dict[str, Any] = yaml.safe_load(sweeps[name].read_text(encoding="utf-8"))
    words = {"${interpreter}": "minigpt", "${program}": "train"}
    sweep["command"] = [words.get(word, word) for word in sweep["command"]]
    sweep["program"] = "minigpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(sweep, sort_keys=False))
    return path
