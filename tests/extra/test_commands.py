"""Commands that are printed, stored or written into files can be pasted into bash and zsh.

A run with awkward names is trained, reported and exported. All commands in the outputs are pasted
into interactive shells, whose words are compared, and then they are run.
"""

import html
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.cli.compose import load_config
from minigpt.core.typed import shell_word, typed_settings
from minigpt.runs.folder import Run
from minigpt.runs.records import read_summary
from tests.commands import Result, run_here
from tests.conftest import tiny_settings, write_stories

FOLDER = "It's größe, 1 (a) [v2]"
NAME = '$HOME !x  "q" #&;~{a}`|${b}'
FILES = ("a, b's [1].txt", "(ü).txt")
PROGRAMS = ("python", "minigpt", "wandb")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an awkward name, stories with awkward names, and the run that read them."""
    folder = tmp_path_factory.mktemp("commands") / FOLDER
    folder.mkdir()
    write_stories(folder / FILES[0], 400, 1)
    write_stories(folder / FILES[1], 40, 2)
    *words, name = run_words()
    result = typed("train.py", [*words, f"--{name}"], folder)  # as W&B types it
    (folder / "log").write_text(result.err, encoding="utf-8")
    return folder


def run_words() -> list[str]:
    """Return the settings of the run, as a user types them."""
    files = [f'data.train_files=["{FILES[0]}"]', f"data.valid_files={FILES[1]}"]
    return [
        *tiny_settings(Path()),
        *files,
        "callbacks.prompts=[It's raining!, größe]",
        *typed_settings({"name": NAME}),
    ]


def typed(program: str, words: list[str], folder: Path, code: int = 0) -> Result:
    """Run a command in this process, with the programs of this environment on the PATH."""
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{path}"
    try:
        result = run_here(program, words, folder)
    finally:
        os.environ["PATH"] = path
    assert result.code == code, result.err
    return result


@pytest.fixture(scope="module")
def commands(here: Path) -> dict[str, list[str]]:
    """All commands by the output that holds them."""
    run = f"runs/{NAME}"
    report = (here / run / "report.html").read_text(encoding="utf-8")
    texts = {
        "log": re.findall(r"next:\s+(.*)", (here / "log").read_text(encoding="utf-8")),
        "report": [html.unescape(text) for text in re.findall(r"<pre>(minigpt.*)</pre>", report)],
    }
    for form in ("hf", "safetensors"):
        folder = f"path/to/{NAME} {form}"
        typed("minigpt", ["export", run, folder, "--format", form], here)
        card = (here / folder / "README.md").read_text(encoding="utf-8")
        blocks = re.findall("```sh\n(.*?)\n```", card, re.DOTALL)
        texts[form] = [line for block in blocks for line in block.splitlines()]
    (resume,) = typed_settings({"resume": run})
    errors = {
        "resume": ("train.py", run_words()),
        "budget": ("train.py", [resume, "budget.tokens=2560"]),
        "auto": ("train.py", [*run_words(), "resume=auto", "budget.tokens=2560"]),
        "prompt": ("minigpt", ["generate", run, "It's", "größe"]),
    }
    for case, (program, words) in errors.items():
        step = typed(program, words, here, code=2).err.strip().rpartition(": type ")[2]
        start = f"minigpt generate {shell_word(run)} " if case == "prompt" else ""
        texts[case] = [start + step]
    sweep = typed("minigpt", ["sweep", "scaling", "--out", f"{NAME}.yaml"], here).out
    texts["sweep"] = re.findall(r"Next: (.*)", sweep)
    for name in ("train.py", "evaluate.py"):
        settings = re.findall(r"^ +(\S+=\S.*?)  ", typed(name, ["--help"], here).out, re.MULTILINE)
        texts[name] = [f"python {name} {typed}" for typed in settings]
    return texts


def pasted(shell: str, lines: list[str], folder: Path) -> list[list[str]]:
    """Return the words of the commands that an interactive shell would start.

    The programs are replaced by functions that write their arguments into a file.
    """
    if (path := shutil.which(shell)) is None:
        pytest.skip(f"{shell} is not installed")
    out = folder.parent / f"{shell}.words"
    functions = "".join(
        f"function {name} {{ printf '%s\\0' {name} \"$@\" '' >> {shlex.quote(str(out))}; }}\n"
        for name in PROGRAMS
    )
    rc = folder.parent / f".{shell}rc"
    rc.write_text(functions + "PS1=''\n", encoding="utf-8")
    environment = os.environ | {"ZDOTDIR": str(folder.parent), "HISTFILE": "", "TERM": "dumb"}
    start = [path, "--rcfile", str(rc), "-i"] if shell == "bash" else [path, "-i"]
    text = "".join(f"{line}\n" for line in [*lines, "exit"])
    subprocess.run(
        start, input=text.encode(), cwd=folder, env=environment, capture_output=True, timeout=60
    )
    words = out.read_text(encoding="utf-8").split("\0")[:-1]
    groups: list[list[str]] = [[]]
    for word in words:
        if word == "":
            groups.append([])
        else:
            groups[-1].append(word)
    return groups[:-1]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_read_the_words_of_every_command(shell: str, commands, here: Path):
    lines = [line for group in commands.values() for line in group]
    assert len(lines) >= 30
    assert all(line.isprintable() for line in lines)
    assert pasted(shell, lines, here) == [shlex.split(line) for line in lines]


def test_every_command_runs(commands: dict[str, list[str]], here: Path):
    quick = {"evaluate": ["--stories.prompts=[]"], "generate": ["--max-tokens", "2"], "train": []}
    shutil.copy(here / FILES[1], here / "stories.txt")  # the card's name for your own stories
    n_runs = len(list((here / "runs").iterdir()))
    for group in ("log", "report", "safetensors", "resume", "budget", "prompt"):
        for line in commands[group]:
            program, verb, *words = shlex.split(line)
            if program == "python":
                typed(verb, [*words, *quick[verb.removesuffix(".py")]], here)
            elif verb != "train":
                typed("minigpt", [verb, *words, *quick[verb]], here)
    assert len(list((here / "runs").iterdir())) == n_runs + 1  # trained by the command of "budget"


def test_command_for_a_larger_budget_trains_on_from_the_weights(commands, here: Path):
    budget, auto = (shlex.split(commands[case][0]) for case in ("budget", "auto"))
    assert set(budget[2:]) == set(auto[2:])
    config = load_config("train", budget[2:])
    assert (config.init_from, config.name) == (f"runs/{NAME}", None)
    trained = read_summary(here / "runs" / NAME)["tokens"]
    assert (trained, config.budget.tokens) == (1280, 2560 - trained)


def test_command_of_a_card_has_the_settings_of_the_run(commands, here: Path):
    for form in ("hf", "safetensors"):
        words = shlex.split(commands[form][-1])
        assert words[:2] == ["minigpt", "train"]
        config, own = load_config("train", words[2:]), Run.load(here / "runs" / NAME).config
        assert (config.name, config.data.train_files) == (NAME, (FILES[0],))
        assert config.data.valid_files == (FILES[1],)
        assert config.budget.tokens == own["budget"]["tokens"]


def test_log_counts_the_prompts_of_a_list(here: Path):
    assert '2 prompts: "It\'s raining!", "größe"' in (here / "log").read_text(encoding="utf-8")
