"""Run our programs in processes that start in a third of a second.

They are forked from a server that has imported the packages.

>>> result = run("train.py", ["model=huge"], cwd)
>>> result.code, result.out, result.err
"""

import contextlib
import io
import multiprocessing
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra

from minigpt.cli import app, evaluate, train
from minigpt.core import distributed, settings
from minigpt.core.process import preserved_process
from tests.conftest import ROOT

MAINS = {"train.py": train.main, "evaluate.py": evaluate.main, "minigpt": app.main}

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("minigpt.training.loop", "minigpt.evaluation", "minigpt.exporting"),
        *("minigpt.analysis.study", "minigpt.scaling.tables", "minigpt.cli.app"),
        *("minigpt.cli.hydra_errors", "hydra._internal.hydra", "hydra.main"),
        *("omegaconf.grammar_visitor", "tests.warm_hydra"),
    ]
)


@dataclass(frozen=True)
class Result:
    """Exit code and output of a process."""

    code: int
    out: str
    err: str


def run(program: str, arguments: list[str], cwd: Path, stdin: bytes = b"") -> Result:
    """Run `python <program> <arguments>` in the folder `cwd`; `minigpt` is the console script.

    The output passes through files beside `cwd`, because tests compare the content of `cwd`.
    """
    streams = [cwd.with_name(f"{cwd.name}.{name}") for name in ("stdin", "stdout", "stderr")]
    streams[0].write_bytes(stdin)
    process = CONTEXT.Process(target=_start, args=(program, arguments, cwd, streams))
    process.start()
    process.join()
    assert process.exitcode is not None
    out, err = (path.read_text(encoding="utf-8") for path in streams[1:])
    return Result(process.exitcode, out, err)


def run_here(program: str, arguments: list[str], cwd: Path, stdin: bytes = b"") -> Result:
    """Do the same as `run`, but faster, in this process, whose state is restored."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = [program, *arguments], io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
    code = 0
    try:
        with (
            preserved_process(),
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            MAINS[program]()
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    finally:
        sys.argv, sys.stdin = before
        GlobalHydra.instance().clear()
        settings.speak(settings.python_call)
        distributed._may_start_processes = False
    texts = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    return Result(code, *texts)


def _start(program: str, arguments: list[str], cwd: Path, streams: list[Path]) -> None:
    for number, path in enumerate(streams):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if number else 0))
        os.dup2(descriptor, number)
    # multiprocessing replaced standard input; none of the three streams is a terminal.
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    sys.argv = [program, *arguments]
    if program == "minigpt":
        from minigpt.cli import app

        app.main()
    else:
        runpy.run_path(str(ROOT / program), run_name="__main__")
