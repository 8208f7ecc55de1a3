"""Entry points of the programs.

A Ctrl-C during the imports ends a program with one line of output.
"""

from __future__ import annotations

import importlib
import os
import signal
from typing import Any


def main() -> None:
    """Run `minigpt`."""
    run("minigpt.cli.app")


def run(module: str) -> None:
    """Import a module and run its function `main`.

    The import takes a second or more. A Ctrl-C during this time ends the process with one line
    of output.

    Args:
        module: name of the module.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)
    importlib.import_module(module).main()


def _exit(number: int, _: Any) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, b"stopped by SIGINT\n")
    os._exit(128 + number)
