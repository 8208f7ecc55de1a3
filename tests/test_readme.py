"""What the README tells people to type is typed here, with a tiny corpus and budget."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.scaling.results import read_run
from tests.commands import run
from tests.conftest import ROOT, trained_folder, write_stories

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]

ELSEWHERE = {  # shown to work by other tests, or by .ci/run itself
    "make test": ".ci/run",
    "make quickstart": "test_quickstart_trains_and_then_evaluates",
    "minigpt generate releases/large": "test_releases.py",
    "python train.py experiment=full": "test_conf.py, test_download.py",
    "minigpt probe runs/<name> --near dad --analogy 'princess - girl + boy'": "test_probe.py",
    "pip install -e '.[playground]'": "make test-browser",
    "minigpt playground runs/<name>": "tests/extra/test_browser.py",
    "python train.py -m experiment=scaling": "test_sweep.py",
    "python train.py -m experiment=scaling_seeds": "test_sweep.py",
    "python train.py -m experiment=recipe": "test_sweep.py",
    "minigpt study runs/<name>": "test_study.py",
    "wandb sweep sweeps/scaling.yaml": "tests/extra/test_wandb.py",
    "wandb agent <entity>/mini-gpt/<id>": "tests/extra/test_wandb.py",
}


@pytest.fixture
def place(tmp_path: Path, tiny: list[str]) -> Path:
    """An empty folder with stories and a finished run in it."""
    (tmp_path / "stories").mkdir()
    write_stories(tmp_path / "stories/mine.txt", 400, 3)
    trained_folder([*tiny, "name=first"])
    return tmp_path


def small(tiny: list[str]) -> str:
    return " ".join(text for text in tiny if not text.startswith("runs_dir="))


def typed(command: str, place: Path) -> str:
    words = shlex.split(command)
    program, arguments = (words[1], words[2:]) if words[0] == "python" else (words[0], words[1:])
    done = run(program, arguments, place)
    assert done.code == 0, f"{command}\n{done.out}\n{done.err}"
    return done.out + done.err


TYPED = [command for command in COMMANDS if command and command not in ELSEWHERE]


@pytest.mark.parametrize("command", TYPED)
def test_every_command_of_the_readme_works(command: str, place: Path, tiny: list[str]):
    command = command.replace("runs/<name>", "runs/first")
    if "train.py" in command and not re.search(r"--help|resume=", command):
        kept = [text for text in shlex.split(small(tiny)) if text.split("=")[0] not in command]
        command += " " + " ".join(kept)
    typed(command, place)


def test_the_library_example_of_the_readme_runs(place: Path, tiny: list[str]):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (typed_there,) = re.findall(r"\[\"budget.*?\]", code)
    program = code.replace(typed_there, repr([*tiny, "name=library"]))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=place, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[0]) > 1


def test_quickstart_trains_and_then_evaluates(place: Path, tiny: list[str]):
    done = subprocess.run(
        ["make", "-n", "quickstart"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stdout.splitlines() if re.search(r"(train|evaluate)\.py ", line)]
    train, evaluate = (line for line in lines if not line.startswith("echo"))
    assert "experiment=quickstart" in train
    typed(re.sub(r"^\S+", "python", train) + " " + small(tiny), place)
    out = typed(re.sub(r"^\S+", "python", evaluate), place)
    for wanted in ("perplexity", "temperature 0.8", "princess − girl + boy", "report.html"):
        assert wanted in out


ROW = re.compile(
    r"\| (small|medium|large), [^|]*\| (\d+M) \| \**([\d.]+)\** \| ([\d.]+) \| [\d.]+ \| .* \|"
)


def test_the_results_are_those_of_the_runs_that_are_kept():
    kept = {}
    for path in [*ROOT.glob("docs/results/runs/*"), *ROOT.glob("releases/*")]:
        run = read_run(path)
        if not re.search("^reference|-seed", run.name):
            numbers = f"{run.perplexity:.2f}", f"{run.bits_per_byte:.3f}"
            kept[run.model, f"{run.tokens / 1e6:.0f}M"] = numbers
    rows = {(m[1], m[2]): (m[3], m[4]) for m in map(ROW.fullmatch, README.splitlines()) if m}
    assert len(rows) >= 4
    for what, numbers in rows.items():
        assert numbers == kept[what], what
    released = [read_run(ROOT / "releases" / size) for size in ("small", "medium", "large")]
    first = README.split("## ")[0]
    assert all(f"{run.perplexity:.2f}" in first for run in released)


def test_the_speed_of_generation_is_what_was_measured():
    table = json.loads((ROOT / "docs/results/benchmarks/avx2/generation.json").read_text())
    own, many = (table[f"tokens per second, ours float32 batch {n}"] for n in (1, 32))
    times, times_many = (table[f"ours / peer, float32, batch {n}"] for n in (1, 32))
    best = table["tokens per second, ours bfloat16 batch 32"]
    times_best = table["best of ours / best of peer, batch 32"]
    (told,) = (text for text in README.split("\n\n") if f"{own:,.0f}" in text)
    for number in (
        f"{times:.0f}", f"{many:,.0f}", f"{times_many:.1f}", f"{best:,.0f}", f"{times_best:.1f}"
    ):  # fmt: skip
        assert re.search(rf"\b{re.escape(number)}\b", told), number


def test_files_that_the_readme_links_to_are_there():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
