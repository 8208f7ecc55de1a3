"""Help of train.py and evaluate.py, which does not import torch."""

import errno
import os
import subprocess
import sys

import pytest

from minigpt.cli.program import Program
from minigpt.cli.run import _leave_explained
from minigpt.cli.train import main
from tests.conftest import ROOT


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )


@pytest.mark.parametrize("program", ["train.py", "evaluate.py"])
def test_help_names_common_settings_and_does_not_import_torch(program: str):
    before = os.times()
    process = run("-X", "importtime", program, "--help")
    after = os.times()
    # CPU time, so that other processes do not count.
    assert after.children_user + after.children_system < before.children_user + (
        before.children_system + 4
    )
    assert process.returncode == 0
    modules = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert "hydra" in modules
    assert not {"torch", "lightning", "matplotlib"} & modules  # seconds, each
    expected = {
        "train.py": ["model: large, medium, small", "budget.tokens=", "logger=wandb", "-m model="],
        "evaluate.py": ["ckpt=runs/", "stride=128", "data=text"],
    }
    assert all(text in process.stdout for text in expected[program])


def test_help_of_a_group_is_printed_in_place_of_the_general_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help", "logger"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert not exit.value.code
    assert "logger.kind=csv" in (out := capsys.readouterr().out)
    assert "Groups" not in out


@pytest.mark.parametrize("full", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_full_disk_exits_with_code_1_and_another_file_error_with_2(program, full, capsys):
    for number, code in ((full, 1), (errno.EACCES, 2)):
        error = OSError(number, os.strerror(number), "runs/a/metrics.csv")
        with pytest.raises(SystemExit) as leaving:
            _leave_explained(error, program, Program.detect(program))
        assert leaving.value.code == code
        (line,) = capsys.readouterr().err.splitlines()
        assert "runs/a/metrics.csv" in line
