"""Progress lines of a run whose output is a file."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.runs.records import read_metrics
from tests.conftest import ROOT

RUN = (  # train.py, with a line for each step
    "import sys, minigpt.core.progress as progress\n"
    "progress.SHORTEST = progress.LONGEST = 0.0\n"
    "sys.argv[0] = 'train.py'\n"
    "from minigpt.cli.train import main; main()"
)


@pytest.mark.long
def test_a_run_into_a_file_writes_lines_of_each_stage(tiny: list[str], tmp_path: Path):
    output = tmp_path / "output.txt"
    with output.open("wb") as file:
        command = [sys.executable, "-c", RUN, *tiny]
        command += ["callbacks.progress_bar=true", "trainer.log_every_n_steps=4"]
        subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=True)
    text = output.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert all(line.isprintable() for line in lines)  # no fragments of a bar
    for stage in ("training the tokenizer", "encoding the train split", "validating"):
        assert any(line.startswith(f"{stage} · ") for line in lines), text
    training = [line for line in lines if line.startswith("training · step ")]
    assert len(training) == 20
    pattern = r"step 9/20 · 576/1\.28k tokens · loss (\d\.\d+) · ppl (\d+\.\d+) · [\d,]+ tok/s"
    assert re.search(pattern, training[8]), training[8]
    assert " left" in training[8]
    # The loss is the latest one in metrics.csv, and is repeated until there is another.
    matches = [re.search(r"loss ([\d.]+)", line) for line in training]
    losses = [match and match[1] for match in matches]
    (folder,) = (tmp_path / "runs").iterdir()
    rows = {row["step"]: row["train/loss"] for row in read_metrics(folder) if "train/loss" in row}
    assert list(rows) == [4, 8, 12, 16, 20]
    expected = [rows.get(4 * (step // 4)) for step in range(1, 21)]
    assert losses == [loss and f"{loss:.3f}" for loss in expected]
