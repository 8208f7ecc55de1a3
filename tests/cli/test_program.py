"""The commands that a program suggests start the program that the user typed."""

from pathlib import Path

import minigpt
from minigpt.cli.program import Program


def test_python_dash_m_suggests_python_dash_m():
    path = str(Path(minigpt.__file__).with_name("__main__.py"))
    program = Program(path, ("train",), path)
    train = program.command("train", resume="runs/a")
    assert train.endswith("python -m minigpt train resume=runs/a")
    assert program.command("generate", run="runs/a").endswith("python -m minigpt generate runs/a")
