"""Stop a program at a signal, even while the main thread of the program runs native code.

Python runs the handler of a signal only when the main thread executes Python code. Training a
tokenizer or resolving a host name can block the main thread for minutes. The `SignalWatch` of this
module, `watch`, therefore also receives SIGINT and SIGTERM in another thread.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from minigpt.core.console import terminal_is_gone
from minigpt.core.distributed import global_rank

_ANSWER_SECONDS = 4.0
# A SIGINT within this time after the first one is part of the same Ctrl-C: the terminal sends a
# Ctrl-C to all processes, and a launcher, such as torchrun, forwards it to them again.
REPEAT_SECONDS = 0.25
SIGHUP: int = getattr(signal, "SIGHUP", 0)  # 0 on Windows, which has neither of the two
SIGUSR1: int = getattr(signal, "SIGUSR1", 0)


def is_ignored(number: int) -> bool:
    """Return whether a signal does not exist here, or is ignored, as SIGHUP is under nohup.

    Args:
        number: number of the signal; 0 for a signal that does not exist on this system.
    """
    return not number or signal.getsignal(number) == signal.SIG_IGN


def has_terminal() -> bool:
    """Return whether this process has a terminal that can still be opened."""
    time.sleep(0.1)  # the kernel sends SIGHUP shortly before it detaches the terminal
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | getattr(os, "O_NOCTTY", 0)))
    except OSError:
        return False
    return True


class SignalWatch:
    """Signal handling of a program: stop at SIGINT, SIGTERM and SIGHUP.

    The first signal raises KeyboardInterrupt. If the program does not end within four seconds after
    SIGINT or SIGTERM, the process exits. At a second Ctrl-C, the process exits at once. A SIGHUP
    does not stop the program if the signal was ignored at the start, as under nohup, or if the
    program is one that continues when its terminal is closed.

    Attributes:
        number: number of the signal that stops the program; 0 if there was none.
        patient: whether the limit of four seconds is off, because exiting would lose work. A second
            Ctrl-C still makes the process exit.
    """

    def __init__(self) -> None:
        self._is_running = self._outlives_terminal = False
        self._reset()

    def _reset(self) -> None:
        self.number, self.patient = 0, False
        self._first = math.inf  # time of the first signal

    @contextlib.contextmanager
    def running(self, outlives_terminal: bool) -> Iterator[None]:
        """Handle the signals of this process during the `with` block.

        Nothing is changed outside the main thread, or if an outer `with` block already handles the
        signals.

        Args:
            outlives_terminal: whether the program continues when its terminal is closed.
        """
        if self._is_running or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._reset()
        self._is_running, self._outlives_terminal = True, outlives_terminal
        numbers = [signal.SIGINT, signal.SIGTERM, *([] if is_ignored(SIGHUP) else [SIGHUP])]
        previous = {number: signal.signal(number, self._stop) for number in numbers}
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._read, args=(reader,), daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            writer.close()  # ends the thread
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._is_running = False

    def answer(self, number: int) -> bool:
        """Record a signal if it is the first one, and return whether it should stop the process.

        The result is False only for a SIGHUP to a process that has no terminal, or whose terminal
        was closed. Such a signal is not recorded.

        Args:
            number: number of the signal.
        """
        if number == SIGHUP and not has_terminal():
            terminal_is_gone("SIGHUP")
            return False
        self.number = self.number or number
        return True

    def exit(self) -> NoReturn:
        """Exit after a few seconds at most; the exit code is 128 plus the number of the signal.

        `atexit` functions are called. The rest of Python's normal exit is skipped, because it would
        wait for all threads, and would abort if one of them runs native code.
        """
        code = 128 + self.number
        self._later(lambda: os._exit(code))
        atexit._run_exitfuncs()
        os._exit(code)

    def _stop(self, number: int, _: Any) -> None:
        is_first = not self.number
        if self.answer(number) or not self._outlives_terminal:
            self.number = self.number or number
            if is_first:
                raise KeyboardInterrupt

    def _read(self, reader: socket.socket) -> None:
        with reader:
            while numbers := reader.recv(64):
                for number in numbers:
                    if number in (signal.SIGINT, signal.SIGTERM):
                        self._receive(number)

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and now - self._first > REPEAT_SECONDS:
            _exit_now(number)
        self._first = min(self._first, now)

        def check() -> None:  # a library may even have caught the KeyboardInterrupt
            if self._is_running and not self.patient:
                _exit_now(number)

        self._later(check)

    def _later(self, action: Callable[[], object]) -> None:
        timer = threading.Timer(_ANSWER_SECONDS, action)
        timer.daemon = True
        timer.start()


def _exit_now(number: int) -> None:
    if global_rank() == 0:
        with contextlib.suppress(OSError, ValueError):
            cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides the cursor
            os.write(2, f"{cursor}\nstopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


watch = SignalWatch()
