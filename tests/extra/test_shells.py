"""The installed programs in real shells: pasted commands, and a locale without UTF-8."""

import contextlib
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.core.typed import shell_command
from tests.conftest import ROOT, tiny_overrides

FOLDER = "It's größe, 1 (a) [v2]"
NAME = '$HOME !x  "q" #&;~{a}`|'
BIN = Path(sys.executable).parent
UTF8 = {"LC_ALL": "C.UTF-8"}
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of an activated Python environment, with more variables."""
    paths = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HISTFILE": ""}
    return {**os.environ, **paths, **variables}


def pasted(shell: str, line: str, folder: Path) -> int:
    """Paste a command into an interactive shell on a terminal of its own; return its exit code."""
    options = ["--norc", "-i"] if shell == "bash" else ["-f", "-i"]
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [shell, *options], stdin=end, stdout=end, stderr=end, cwd=folder,
        env=environment(**UTF8), start_new_session=True,
    )  # fmt: skip
    os.close(end)
    os.write(terminal, f"{line}\nexit $?\n".encode())
    with contextlib.suppress(OSError):  # EIO, when the shell has ended
        while os.read(terminal, 4096):
            pass
    os.close(terminal)
    return process.wait(timeout=60)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_printed_commands_run_when_they_are_pasted(shell: str, tmp_path: Path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    folder = tmp_path / FOLDER
    folder.mkdir()
    tiny = [word.replace(str(folder), ".") for word in tiny_overrides(folder)]
    train = shell_command("minigpt", "train", *tiny, f"name={NAME}")
    assert pasted(shell, train, folder) == 0
    log = (folder / "runs" / NAME / "train.log").read_text(encoding="utf-8")
    (evaluate,) = re.findall(r"next:\s+(.*)", log)
    assert evaluate.startswith("minigpt evaluate ")
    assert pasted(shell, evaluate, folder) == 0
    assert (folder / "runs" / NAME / "evaluation.json").is_file()
    generate = shell_command("minigpt", "generate", f"runs/{NAME}", "It's größer!", "--n", "0")
    assert pasted(shell, generate, folder) == 2
    assert pasted(shell, generate.replace("--n 0", "--n 1"), folder) == 0


@pytest.mark.parametrize("program", [["minigpt"], [sys.executable, "-m", "minigpt"]])
def test_umlauts_in_the_c_locale(program: list[str], tmp_path: Path):
    run = tmp_path / "größe"
    shutil.copytree(ROOT / "releases/small", run)
    command = [*program, "generate", str(run), "Es war größer", "--max-tokens", "1"]
    process = subprocess.run(
        [os.fsencode(word) for word in command], env=environment(**ASCII), capture_output=True
    )
    assert process.stderr == b""
    assert process.stdout.startswith("Es war größer".encode())
    assert process.returncode == 0
