"""Our programs in real processes, forked from a server that has imported them: a third of a second.

>>> done = run("train.py", ["model=huge"], cwd)
>>> done.code, done.out, done.err
"""

import multiprocessing
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("minigpt.training.loop", "minigpt.evaluation", "minigpt.exporting"),
        *("minigpt.analysis.study", "minigpt.scaling.tables", "minigpt.cli.app"),
        *("minigpt.cli.hydra_errors", "hydra._internal.hydra", "hydra.main"),
        "omegaconf.grammar_visitor",
    ]
)


@dataclass(frozen=True)
class Done:
    """What became of a process."""

    code: int
    out: str
    err: str


def run(program: str, arguments: list[str], cwd: Path, stdin: bytes = b"") -> Done:
    """`python <program> <arguments>` in the folder `cwd`; `minigpt` is the console script.

    What it prints passes through files beside `cwd`, since `cwd` is to stay as it is.
    """
    streams = [cwd.with_name(f"{cwd.name}.{name}") for name in ("stdin", "stdout", "stderr")]
    streams[0].write_bytes(stdin)
    process = CONTEXT.Process(target=_start, args=(program, arguments, cwd, streams))
    process.start()
    process.join()
    assert process.exitcode is not None
    out, err = (path.read_text(encoding="utf-8") for path in streams[1:])
    return Done(process.exitcode, out, err)


def _start(program: str, arguments: list[str], cwd: Path, streams: list[Path]) -> None:
    for number, path in enumerate(streams):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if number else 0))
        os.dup2(opened, number)
    # multiprocessing gave the process another standard input, and none of ours is a terminal.
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    sys.argv = [program, *arguments]
    if program == "minigpt":
        from minigpt.cli import app

        app.main()
    else:
        runpy.run_path(str(ROOT / program), run_name="__main__")
