"""Terminal output: one console for log lines and progress bars, so that they do not overlap.

Output that can no longer be written is discarded, and the program continues. Examples are output to
a closed terminal, to a pipe whose reader has ended, and to a full disk. If the output is the result
of the program, an error is raised instead. A closed terminal also sends SIGHUP: see signals.py.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from minigpt.core.distributed import global_rank
from minigpt.core.files import DISK_FULL

console = Console(stderr=True, soft_wrap=True)
log = logging.getLogger("minigpt")


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(RuntimeError):  # a signal handler interrupted a write to stderr
            console.print(self.format(record), markup=False, highlight=False)


class _Output(io.RawIOBase):
    """Raw stream for stdout or stderr that discards what cannot be written.

    Args:
        raw: the stream to write to.

    Attributes:
        is_result: whether this output is the result of the program. If it is, errors are raised,
            and nothing is discarded.
        error: error of the first write that was discarded; None if nothing was discarded.
    """

    def __init__(self, raw: Any) -> None:
        self._raw, self.name, self.mode = raw, raw.name, raw.mode
        self.is_result, self.error = False, None

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        size = rest.nbytes
        try:
            while rest:
                count = self._raw.write(rest)
                rest = rest[count or 0 :]
                if count is None:  # another process has made the stream non-blocking
                    select.select([], [self._raw], [])
        except OSError as error:
            if self.is_result:
                error.filename = self.name
                raise
            self._discard(error)
        return size

    def _discard(self, error: OSError) -> None:
        is_full = error.errno in DISK_FULL  # there may be space again later
        if not is_full:  # nothing can be written any more, nor by native code
            with contextlib.suppress(OSError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.fileno())
                os.close(null)
        if self.error is None:
            self.error = error
            problem = f"{self.name} cannot be written" if is_full else "the terminal is gone"
            _losses.append(f"{problem} ({error.strerror}): continuing without it")

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()


_losses: list[str] = []  # lines about lost outputs, for train.log; only the first is written


def terminal_is_gone(reason: str) -> None:
    """Log that the terminal is gone, unless the loss of stdout or stderr is already recorded.

    Args:
        reason: the signal or the error that shows that the terminal is gone.
    """
    if not _losses:
        _losses.append(f"the terminal is gone ({reason}): continuing without it")
        log.warning("%s", _losses[0])


def outputs() -> list[_Output]:
    """Return the raw streams of stdout and stderr; a stream is left out if it is not an `_Output`.

    `show_log` replaces the raw streams with an `_Output`.
    """
    buffers = (getattr(stream, "buffer", None) for stream in (sys.stdout, sys.stderr))
    raws = (getattr(buffer, "raw", buffer) for buffer in buffers)
    return [raw for raw in raws if isinstance(raw, _Output)]


def show_log() -> None:
    """Print the package's log records of level INFO and higher, above any progress bar.

    Only the process of rank 0 prints log records. The function also replaces stdout and stderr. The
    new streams write a question mark for each character that their encoding lacks. They discard
    output that cannot be written, for example because the terminal is closed.
    """
    for number in range(3):  # otherwise a file of the run would get the number of a closed stream
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
            if number and not _losses:
                _losses.append(
                    "the terminal is gone (closed before the start): continuing without it"
                )
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = _replaced(sys.stdout, 1), _replaced(sys.stderr, 2)
    log.setLevel(logging.INFO)
    log.handlers = [] if global_rank() else [_ConsoleHandler()]


def _replaced(stream: Any, number: int) -> Any:
    """Return a stream that writes through an `_Output`, to use instead of stdout or stderr.

    `stream` itself is returned if it already writes through an `_Output`, or if Python code has
    redirected it. If Python code has redirected it to a file, the returned stream writes a question
    mark for each character that its encoding lacks.

    Args:
        stream: `sys.stdout` or `sys.stderr`; None if it was closed before the start.
        number: file descriptor of stdout or stderr.
    """
    raw: Any = None
    if stream is None:
        raw = io.FileIO(number, "w", closefd=False)
    elif isinstance(stream, io.TextIOWrapper):
        raw = getattr(stream.buffer, "raw", stream.buffer)  # python -u has no buffer
    if not isinstance(raw, io.RawIOBase) or isinstance(raw, _Output) or raw.fileno() != number:
        if isinstance(stream, io.TextIOWrapper):  # redirected within Python
            stream.reconfigure(errors="replace")
        return stream
    encoding = "utf-8" if stream is None else stream.encoding
    unbuffered = stream is not None and stream.write_through  # python -u
    output: Any = _Output(raw) if unbuffered else io.BufferedWriter(_Output(raw))
    return io.TextIOWrapper(
        output, encoding, "replace",
        line_buffering=stream is None or stream.line_buffering, write_through=unbuffered,
    )  # fmt: skip


class _RunLog(logging.FileHandler):
    """Handler for the log file of a run.

    The first time that the terminal or another output is lost, one line about this is added.
    """

    has_loss = False

    def emit(self, record: logging.LogRecord) -> None:
        if _losses and not self.has_loss:
            self.has_loss = True
            if record.getMessage() != _losses[0]:
                super().emit(logging.makeLogRecord({"msg": _losses[0]}))
        super().emit(record)


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Append the package's log records, with timestamps, to a file during the `with` block.

    Args:
        path: the log file; its folder must exist.
    """
    handler = _RunLog(path, encoding="utf-8")
    handler.handleError = lambda record: None  # training continues when the disk is full
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        with contextlib.suppress(OSError):  # the disk may still be full
            handler.close()
