"""The commands of the README run here, with a tiny corpus and budget."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.scaling.results import read_run
from tests.commands import run
from tests.conftest import ROOT, tiny_overrides, trained_folder, write_stories

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]

ELSEWHERE = {  # run by other tests, or by .ci/run itself
    "make test": ".ci/run",
    "make quickstart": "test_quickstart_trains_and_then_evaluates",
    "minigpt generate releases/large": "test_releases.py",
    "minigpt playground runs/<name>": "tests/extra/test_browser.py",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stories and a finished run in it."""
    folder = tmp_path_factory.mktemp("readme") / "place"
    (folder / "stories").mkdir(parents=True)
    write_stories(folder / "stories/mine.txt", 400, 3)
    trained_folder([*tiny_overrides(folder), "name=first"])
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return shutil.copytree(trained, tmp_path, dirs_exist_ok=True)


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
        budget = [text for text in shlex.split(small(tiny)) if text.split("=")[0] not in command]
        command += " " + " ".join(budget)
    typed(command, place)


@pytest.mark.long
def test_the_library_example_of_the_readme_runs(place: Path, tiny: list[str]):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (overrides,) = re.findall(r"\[\"budget.*?\]", code)
    program = code.replace(overrides, repr([*tiny, "name=library"]))
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
    for name in ("perplexity", "temperature 0.8", "princess − girl + boy", "report.html"):
        assert name in out


ROW = re.compile(
    r"\| (small|medium|large), [^|]*\| (\d+M) \| \**([\d.]+)\** \| ([\d.]+) \| [\d.]+ \| .* \|"
)


def test_readme_is_at_most_150_lines():
    assert len(README.splitlines()) <= 150


def test_results_are_those_of_the_recorded_runs():
    recorded, released = {}, {}
    for path in [*ROOT.glob("docs/results/runs/*"), *ROOT.glob("releases/*")]:
        run = read_run(path)
        if not re.search("^reference|-seed", run.name):
            numbers = f"{run.perplexity:.2f}", f"{run.bits_per_byte:.3f}"
            recorded[run.model, f"{run.tokens / 1e6:.0f}M"] = numbers
            if path.parent.name == "releases" and run.model != "w64":
                released[run.model] = numbers[0]
    rows = {(m[1], m[2]): (m[3], m[4]) for m in map(ROW.fullmatch, README.splitlines()) if m}
    assert len(rows) == 8
    for row, numbers in rows.items():
        assert numbers == recorded[row], row
    assert set(re.findall(r"\*\*([\d.]+)\*\*", README)) == set(released.values())
    assert len(released) == 3


def test_experiments_of_the_results_exist():
    table = "\n".join(line for line in README.splitlines() if ROW.fullmatch(line))
    experiments = re.findall(r"experiment=(\w+)", table)
    assert len(experiments) == 7
    for name in experiments:
        assert (ROOT / f"conf/experiment/{name}.yaml").is_file(), name


def test_speed_of_generation_is_what_was_measured():
    table = json.loads((ROOT / "docs/results/benchmarks/avx2/generation.json").read_text())
    page = (ROOT / "docs/generation.md").read_text(encoding="utf-8")
    speeds, ratios = re.findall(r"(?:^\|.*\n)+", page.split("## What a token")[1], re.MULTILINE)[:2]
    for batch in (1, 32, 64):
        (cells,) = re.findall(rf"^\| batch {batch} \| (\S+) \| (\S+) \|", speeds, re.MULTILINE)
        for cell, dtype in zip(cells, ("float32", "bfloat16"), strict=True):
            assert cell == f"{table[f'tokens per second, ours {dtype} batch {batch}']:,.0f}"
    for batch, digits in ((1, 0), (32, 1)):
        pattern = rf"^\| to transformers, batch {batch} \| 5 \| (\S+) \| (\S+) \|"
        (cells,) = re.findall(pattern, ratios, re.MULTILINE)
        best, same = "best of ours / best of peer", "ours / peer, float32"
        for cell, name in zip(cells, (best, same), strict=True):
            assert cell == f"{table[f'{name}, batch {batch}']:.{digits}f}"


def test_files_that_the_readme_and_the_pages_link_to_exist():
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            generated = path.parent.name == "docs" and target == "settings.md"
            assert generated or (path.parent / target).exists(), f"{path.name}: {target}"
