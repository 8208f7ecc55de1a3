"""What a program does at a signal: stop, exit if it is busy, exit at once at a second Ctrl-C."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from minigpt.core import signals
from minigpt.core.signals import SIGHUP, SignalWatch, is_ignored
from tests.conftest import ROOT


def handlers() -> list:
    return [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, SIGHUP)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_raises_once_and_the_handlers_are_restored(number: int):
    watch, before = SignalWatch(), handlers()
    with watch.running(outlives_terminal=True):
        assert watch.number == 0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert watch.number == number
        watch._stop(number, None)  # a signal that follows is not raised again
        with watch.running(outlives_terminal=True):  # already running
            assert watch.number == number
    assert handlers() == before
    assert signal.set_wakeup_fd(-1) == -1


def test_other_threads_do_not_handle_signals():
    watch, before, inside = SignalWatch(), handlers(), []

    def program() -> None:
        with watch.running(outlives_terminal=True):
            inside.extend(handlers())

    thread = threading.Thread(target=program)
    thread.start()
    thread.join()
    assert inside == before


@pytest.mark.parametrize(("outlives", "stops"), [(True, False), (False, True)])
def test_closed_terminal_stops_only_programs_that_need_it(outlives, stops, monkeypatch):
    monkeypatch.setattr(signals, "has_terminal", lambda: False)
    monkeypatch.setattr(signals, "terminal_is_gone", lambda name: None)
    watch = SignalWatch()
    watch._outlives_terminal = outlives
    if stops:
        with pytest.raises(KeyboardInterrupt):
            watch._stop(SIGHUP, None)
    else:
        watch._stop(SIGHUP, None)
    assert watch.number == (SIGHUP if stops else 0)


def test_signal_that_is_ignored_or_does_not_exist():
    assert is_ignored(0)
    before = signal.signal(SIGHUP, signal.SIG_IGN)
    try:
        assert is_ignored(SIGHUP)
    finally:
        signal.signal(SIGHUP, before)
    assert not is_ignored(signal.SIGTERM)


# Native code without the GIL, which KeyboardInterrupt cannot end.
BUSY = """
import atexit, hashlib, sys
from minigpt.core import signals
signals._ANSWER_SECONDS = float(sys.argv[1])
with signals.watch.running(outlives_terminal=False):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.parametrize(
    ("seconds", "numbers"),
    [(0.2, [signal.SIGTERM]), (60, [signal.SIGINT, signal.SIGINT])],
)
def test_program_in_native_code_exits_in_time_or_at_a_second_ctrl_c(seconds, numbers):
    command = [sys.executable, "-c", BUSY, str(seconds)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for number in numbers:
            time.sleep(2 * signals.REPEAT_SECONDS)  # else a part of the same Ctrl-C
            process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + numbers[-1]
    assert signal.Signals(numbers[-1]).name in err
    assert "Traceback" not in err
