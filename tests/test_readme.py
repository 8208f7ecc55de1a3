"""The commands of the README run here, with a tiny corpus and budget."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.runs.records import read_summary
from minigpt.scaling.results import REFERENCE, read_run
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


ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in README.splitlines()
    if re.match(r"\| (small|medium|large), ", line)
]
RECORDS = {  # the records behind each recipe of the table; the reference has only its report
    "reference's recipe": "docs/results/first-edition/reference-{}-10M",
    "quickstart": "docs/results/first-edition/{}-3M",
    "alone": "docs/results/first-edition/{}-averaged",
    "with teachers": "releases/{}",
}


def test_readme_is_at_most_150_lines():
    assert len(README.splitlines()) <= 150


def test_results_are_those_of_the_recorded_runs():
    assert [len(row) for row in ROWS] == [9] * 12
    released = [row[0].split(",")[0] for row in ROWS if "**" in row[2]]
    assert released == ["small", "medium", "large"]
    reported = {f"{size.parameters / 1e6:.2f}M": size.perplexity for size in REFERENCE}
    for model, recipe, v2, v1, tokens, taught, unique, time, _ in ROWS:
        if recipe == "reference":
            assert v2 == f"{reported[model.split()[1]]:.2f}, V1 or V2"
            continue
        folder = ROOT / RECORDS[recipe].format(model.split(",")[0])
        run, summary = read_run(folder), read_summary(folder)
        assert run.train_tokens is not None
        perplexity = f"{run.perplexity:.2f}"
        release = read_run(ROOT / "releases" / model.split(",")[0])
        if run.perplexity == release.perplexity:
            perplexity = f"**{perplexity}**"
        assert v2 == f"{perplexity} · {run.bits_per_byte:.3f}", folder
        assert v1 == recorded_v1(folder), folder
        assert tokens == f"{run.tokens / 1e6:.0f}M", folder
        assert taught == (f"{run.teacher_tokens / 1e6:.0f}M" if run.teacher_tokens else "–"), folder
        assert unique == f"{min(run.tokens, run.train_tokens) / 1e6:.1f}M", folder
        seconds = summary["seconds"] + (summary.get("init_from") or {"seconds": 0})["seconds"]
        hours, minutes = re.fullmatch(r"(?:(\d+) h )?(\d+) min", time).groups("0")
        assert abs(int(hours) * 60 + int(minutes) - seconds / 60) < 1, folder


def recorded_v1(folder: Path) -> str:
    """Perplexity and bits per byte on V1 as the table shows them; a dash if there is no record."""
    if (path := folder / "evaluation-v1.json").is_file():
        v1 = json.loads(path.read_text(encoding="utf-8"))
    elif (path := folder / "evaluation.json").is_file():
        v1 = json.loads(path.read_text(encoding="utf-8"))["valid_v1"]
    else:
        return "–"
    return f"{v1['perplexity']:.2f} · {v1['bits_per_byte']:.3f}"


def test_experiments_of_the_results_exist():
    experiments = [name for row in ROWS for name in re.findall(r"experiment=(\w+)", row[-1])]
    assert len(experiments) == 6
    for name in experiments:
        assert (ROOT / f"conf/experiment/{name}.yaml").is_file(), name


def test_speed_of_generation_is_what_was_measured():
    table = json.loads((ROOT / "docs/results/benchmarks/avx2/generation.json").read_text())
    page = (ROOT / "docs/generation.md").read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", page.split("## What a token")[1], re.MULTILINE)
    speeds, ratios, engines = tables[:3]
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

    for batch in (1, 32):
        pattern = rf"^\| batch {batch} \| \S+ \| (\S+) \| \S+ \| (\S+) \|"
        (cells,) = re.findall(pattern, engines, re.MULTILINE)
        for cell, dtype in zip(cells, ("float32", "bfloat16"), strict=True):
            assert cell == f"{table[f'ours {dtype} / CTranslate2 float32, batch {batch}']:.2f}"
    shares = [
        int(share.replace("−", "-"))
        for share in re.findall(r"([−\d]+) %", page.split("**Sampling and")[1])[:4]
    ]
    keys = [f"{dtype}, batch {batch}" for batch in (1, 32) for dtype in ("float32", "bfloat16")]
    measured = [table[f"share of sampling and the loop, {key}"] for key in keys]
    assert shares == [round(100 * share) for share in measured]


def test_files_that_the_readme_and_the_pages_link_to_exist():
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            generated = path.parent.name == "docs" and target == "settings.md"
            assert generated or (path.parent / target).exists(), f"{path.name}: {target}"
