"""Each mistake ends with a one-line error and exit code 2, and nothing is written."""

import hashlib
import shlex
import shutil
from pathlib import Path

import pytest

from minigpt.exporting import ExportConfig, export
from minigpt.runs.folder import Run
from tests.bad_input import CASES, Break, Names
from tests.commands import run, run_here
from tests.conftest import tiny_overrides, trained_folder


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, its export, its stories and its cache."""
    folder = tmp_path_factory.mktemp("bad") / "template"
    folder.mkdir()
    trained_folder([*tiny_overrides(folder), "name=tiny"])
    export(Run.load(folder / "runs/tiny"), folder / "out", ExportConfig("safetensors"))
    return folder


@pytest.fixture
def here(template: Path, tmp_path: Path) -> Path:
    """A copy of the template to break, with other files beside it."""
    here = tmp_path / "x"
    shutil.copytree(template, here)
    (tmp_path / "target").write_text("not yours")
    shutil.copy(here / "runs/tiny/checkpoints/last.ckpt", tmp_path / "elsewhere.ckpt")
    return here


def contents(folder: Path) -> dict[str, str]:
    """Return a hash of each file below `folder`, and "" for folders.

    Lock files do not count: the cache creates one before it reads stories.
    """
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
        if path.suffix != ".lock"
    }


def listed(names: Names) -> tuple[str, ...]:
    """Return one or several names as a tuple."""
    return (names,) if isinstance(names, str) else names


def case_id(command: str, broken: Break | None, names: Names) -> str:
    """Return a test id: the command, the function that breaks something, and the names."""
    how = broken.__qualname__.partition(".")[0] if broken is not None else ""
    return ascii(" ".join(filter(None, (command, how, *listed(names)))))[1:-1][:90]


@pytest.mark.parametrize(
    ("forked", "command", "broken", "names"),
    [(number % 7 == 0, *case) for number, case in enumerate(CASES)],
    ids=[case_id(*case) for case in CASES],
)
def test_bad_input_is_a_one_line_error_with_exit_code_2(
    forked: bool, command: str, broken: Break | None, names: Names, here: Path
):
    """Run every seventh case in a process of its own, and the others in this one."""
    typed = [word.replace(str(here), ".") for word in tiny_overrides(here)]
    if broken is not None:
        broken(here)
    before = contents(here)
    stdin = here.with_name("x.stdin")
    data = stdin.read_bytes() if stdin.is_file() else b""
    result = (run if forked else run_here)(*split(command, typed), here, stdin=data)
    *progress, error = result.err.splitlines()  # of a preparation that takes more than 5 s
    assert error.startswith("error: "), result.err
    assert all(" MB/s" in line for line in progress), result.err
    assert error.isprintable(), result.err
    assert all(name in error for name in listed(names)), result.err
    assert (result.code, result.out) == (2, "")
    assert contents(here) == before


def split(command: str, tiny: list[str]) -> tuple[str, list[str]]:
    """Return the program and its arguments, with TINY replaced by settings."""
    program, *words = shlex.split(command)
    return program, [word for typed in words for word in (tiny if typed == "TINY" else [typed])]
