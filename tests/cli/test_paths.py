"""Paths with ~, spaces, brackets and other letters, in the commands that take one."""

import os
from pathlib import Path

import pytest

from minigpt.cli.words import hydra_word
from minigpt.core.files import user_path
from minigpt.core.settings import UserError
from minigpt.data.config import DataConfig
from minigpt.evaluation import EvaluationConfig, evaluate
from minigpt.exporting import export
from minigpt.runs.folder import Run
from minigpt.training.config import TrainConfig
from minigpt.training.inheritance import typed_tokenizer
from tests.commands import run_here
from tests.conftest import naming, tiny_overrides, trained_folder, write_stories

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder of its own, which is not the working directory."""
    folder, cwd = tmp_path / "home", tmp_path / "cwd"
    folder.mkdir()
    cwd.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(cwd)
    return folder


def test_the_folder_of_a_sweep_has_no_tilde(home):
    """Hydra creates it, and would not expand the tilde."""
    hints = {"runs_dir": str, "init_from": str | None}
    words = [hydra_word(f"{key}=~/r (1)", hints, sweep=True) for key in hints]
    assert words == [f'runs_dir="{home}/r (1)"', 'init_from="~/r (1)"']
    assert hydra_word("hydra.sweep.dir=~/r", {}, sweep=True) == f"hydra.sweep.dir={home}/r"


def test_a_name_that_begins_with_a_tilde_is_not_the_home_folder(home):
    path = user_path("./~notes.txt")
    assert (path, user_path(path)) == (Path.cwd() / "~notes.txt",) * 2


def test_settings_with_a_name_that_begins_with_a_tilde_name_that_file(home):
    config = TrainConfig(runs_dir="./~r", resume="./~r/a", data=DataConfig(tokenizer="./~root"))
    here = str(Path.cwd())
    assert (config.runs_dir, config.resume) == (f"{here}/~r", f"{here}/~r/a")
    assert config.data.tokenizer == f"{here}/~root"
    with pytest.raises(UserError, match=naming("data.tokenizer", f"{here}/~root")):
        typed_tokenizer(config.data)


def test_the_folder_of_more_config_groups_has_no_tilde(home):
    assert hydra_word("--config-dir=~/conf", {}, sweep=False) == f"--config-dir={home}/conf"


def test_a_user_who_does_not_exist_is_named():
    for typed in ("~nobody-of-that-name/x", Path("~nobody-of-that-name")):
        with pytest.raises(UserError, match=naming("runs_dir", "~nobody-of-that-name")):
            user_path(typed, "runs_dir")
    with pytest.raises(UserError, match=naming("runs_dir", "~nobody-of-that-name")):
        TrainConfig(runs_dir="~nobody-of-that-name/runs")


def test_the_settings_of_a_run_have_no_tilde(home):
    config = TrainConfig(runs_dir="~/runs", resume="~/runs/a", init_from="~/b")
    paths = (config.runs_dir, config.resume, config.init_from)
    assert paths == (f"{home}/runs", f"{home}/runs/a", f"{home}/b")


def test_library_functions_expand_the_home_folder(home):
    folder = trained_folder([*tiny_overrides(home), "name=a"])
    assert folder.is_relative_to(home)
    run = Run.load("~/runs/a")
    assert run.folder == home / "runs" / "a"
    (home / "out").mkdir()
    evaluate("~/runs/a", EvaluationConfig(), out=Path("~/out"))
    assert (home / "out" / "evaluation.json").is_file()
    export(run, "~/exported")
    assert (home / "exported" / "README.md").is_file()
    assert os.listdir() == []


def test_commands_expand_the_home_folder(home):
    stories = home / "mÿ störies [v2]"
    stories.mkdir()
    tiny = [word for word in tiny_overrides(home) if "files" not in word and "dir=" not in word]
    write_stories(stories / "a [1].txt", 400, 1)
    train = [*tiny, "data.train_files=[~/mÿ störies [v2]/*.txt]", "name=a", "runs_dir=~/r s"]
    commands = {
        "train.py": [[*train, "data.cache_dir=~/c ç"]],
        "minigpt": [
            ["export", "~/r s/a", "~/exported"],
            ["sweep", "scaling", "--out=~/sweep.yaml"],
            ["probe", "~/r s/a", "--near", "the", "--out=~/maps"],
        ],
    }
    for program, lines in commands.items():
        for words in lines:
            result = run_here(program, words, Path.cwd())
            # The vocabulary is too small for a map.
            assert result.code == (2 if words[0] == "probe" else 0), result.err
    for name in ("r s/a/summary.json", "c ç/prepared", "exported/README.md", "sweep.yaml"):
        assert (home / name).exists()
    assert os.listdir() == []
