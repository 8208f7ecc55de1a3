"""`minigpt evaluate`: what it prints, writes and refuses."""

import re
from pathlib import Path

import pytest

from tests import commands
from tests.evaluation.conftest import untrained_run, write_text_corpus, written


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return untrained_run(tmp_path)


def test_command_refuses_valid_on_another_corpus(run, tmp_path):
    process = commands.run("evaluate.py", ["ckpt=runs/tiny", "valid=both"], tmp_path)
    assert process.code == 2
    (line,) = process.err.strip().splitlines()
    assert line.startswith("error: valid=both")


def test_command_prints_the_evaluation_and_leaves_no_other_files(run, tmp_path):
    before = {path.name for path in tmp_path.iterdir()} | {"cache"}
    x = write_text_corpus(tmp_path / "x.txt", ["The hen saw a pig."])
    overrides = [
        "ckpt=runs/tiny", "data=text", f"data.valid_files=[{x}]", "stories.max_tokens=5",
        f"data.cache_dir={tmp_path / 'cache'}", "stride=4",
    ]  # fmt: skip
    process = commands.run("evaluate.py", overrides, tmp_path)
    assert process.code == 0, process.err
    assert "perplexity" in process.out
    (path,) = run.glob("evaluation*.json")
    assert re.fullmatch(r"evaluation-text-[0-9a-f]{8}-stride4\.json", path.name)
    assert f"runs/tiny/{path.name}\n" in process.out
    record = written(run, path.name)
    assert record["stride"] == 4
    assert record["data"]["valid_files"] == [x]
    assert {path.name for path in tmp_path.iterdir()} == before | {"x.txt"}


def test_command_without_a_run_prints_what_to_type(tmp_path):
    process = commands.run("evaluate.py", [], tmp_path)
    assert process.code == 2
    (line,) = process.err.strip().splitlines()
    assert line.startswith("error: ")
    assert "evaluate.py ckpt=runs/" in line
