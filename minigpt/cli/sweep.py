"""Write W&B sweep files that start their runs with `minigpt train` instead of train.py."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

import minigpt
from minigpt.core.files import write_text
from minigpt.core.settings import UserError, unknown_name


def write_sweep(name: str, path: Path) -> Path:
    """Write the W&B sweep `name` to `path`; each run of the sweep calls `minigpt train`.

    Args:
        name: name of a file in sweeps/, without its extension.
        path: the file to write; its folder is created if missing.

    Returns:
        The path.

    Raises:
        UserError: no sweep has that name, or the file already exists.
    """
    checkout = Path(minigpt.__file__).parent.parent / "sweeps"
    folder = (
        checkout if (checkout / "scaling.yaml").is_file() else resources.files("minigpt") / "sweeps"
    )
    sweeps = {f.name.removesuffix(".yaml"): f for f in folder.iterdir() if f.name.endswith(".yaml")}
    if name not in sweeps:
        raise UserError(unknown_name(name, sorted(sweeps), "sweep"), "name", name)
    if path.exists():
        raise UserError(f"{path} already exists: remove it or choose another file", "out")
    sweep: dict[str, Any] = yaml.safe_load(sweeps[name].read_text(encoding="utf-8"))
    words = {"${interpreter}": "minigpt", "${program}": "train"}
    sweep["command"] = [words.get(word, word) for word in sweep["command"]]
    sweep["program"] = "minigpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(sweep, sort_keys=False))
    return path
