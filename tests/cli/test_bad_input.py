"""Whatever is wrong, it ends in one line that says so, exit code 2, and nothing written."""

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
    """A copy of it to break, with a secret beside it."""
    here = tmp_path / "x"
    shutil.copytree(template, here)
    (tmp_path / "target").write_text("not yours")
    shutil.copy(here / "runs/tiny/checkpoints/last.ckpt", tmp_path / "elsewhere.ckpt")
    return here


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder`, with a hash of what is in it; folders and links too.

    Without locks: the cache takes one before it reads stories, and a lock that is removed is none.
    """
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
        if path.suffix != ".lock"
    }


def listed(names: Names) -> tuple[str, ...]:
    """One name or several, as several."""
    return (names,) if isinstance(names, str) else names


def case_id(command: str, broken: Break | None, names: Names) -> str:
    """What is typed, how something was broken before, and the names."""
    how = broken.__qualname__.partition(".")[0] if broken is not None else ""
    return ascii(" ".join(filter(None, (command, how, *listed(names)))))[1:-1][:90]


@pytest.mark.parametrize(
    ("forked", "command", "broken", "names"),
    [(number % 3 == 0, *case) for number, case in enumerate(CASES)],
    ids=[case_id(*case) for case in CASES],
)
def test_one_line_names_the_fault(
    forked: bool, command: str, broken: Break | None, names: Names, here: Path
):
    """Every third case in a process of its own, the others in this one."""
    typed = [word.replace(str(here), ".") for word in tiny_overrides(here)]
    if broken is not None:
        broken(here)
    before = contents(here)
    stdin = here.with_name("x.stdin")
    data = stdin.read_bytes() if stdin.is_file() else b""
    done = (run if forked else run_here)(*split(command, typed), here, stdin=data)
    assert done.err.startswith("error: "), done.err
    assert done.err.count("\n") == 1, done.err
    assert done.err.strip().isprintable(), done.err
    assert all(name in done.err for name in listed(names)), done.err
    assert (done.code, done.out) == (2, "")
    assert contents(here) == before


def split(command: str, tiny: list[str]) -> tuple[str, list[str]]:
    """The program and its arguments, with settings in place of TINY."""
    program, *words = shlex.split(command)
    return program, [word for typed in words for word in (tiny if typed == "TINY" else [typed])]
