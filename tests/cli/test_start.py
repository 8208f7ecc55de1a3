"""Programs that are stopped before they have started."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ctrl_c_during_the_imports_prints_one_line(rank: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", rank)
    (tmp_path / "slow.py").write_text("print('ready', flush=True)\nimport time\ntime.sleep(60)\n")
    script = f"import signal, sys; sys.path.append({str(tmp_path)!r})\n"
    # A program that a shell starts in the background ignores SIGINT.
    script += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "from minigpt.cli.start import run; run('slow')"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == (b"stopped by SIGINT\n" if rank == "0" else b"")
        assert process.wait() == 130
