"""train.py and evaluate.py as they are typed: help in no time, mistakes in one line."""

import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )


@pytest.mark.parametrize("program", ["train.py", "evaluate.py"])
def test_help_shows_what_people_need_and_does_not_keep_them_waiting(program: str):
    start = time.perf_counter()
    done = run(program, "--help")
    assert time.perf_counter() - start < 4
    assert done.returncode == 0
    wanted = {
        "train.py": ["model: large, medium, small", "budget.tokens=", "logger=wandb", "-m model="],
        "evaluate.py": ["ckpt=runs/", "stride=128", "data=text"],
    }
    assert all(text in done.stdout for text in wanted[program])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=large"], "settings are typed without dashes: type model=large, not --model"),
        (["--model", "large"], "settings are typed without dashes: type model=large, not --model"),
        (["optimizer.lrr=1"], "unknown setting 'optimizer.lrr': did you mean optimizer.lr"),
        (["modle=large"], "unknown setting 'modle': did you mean model"),
        (["+foo=1"], "unknown setting 'foo'"),
        (["model=huge"], "unknown option 'model=huge': did you mean model=large"),
        (["experiment=nope"], "unknown option 'experiment=nope': "),
        (["a b"], "cannot read 'a b': settings are typed as key=value"),
        (["optimizer.lr=abc"], "optimizer.lr='abc': expected a number"),
        (["model.d_model=100", "model.n_heads=8"], "d_model 100 is not divisible by n_heads 8"),
        (["budget=3"], "budget=3: a group of settings; type budget.<setting>=<value>"),
        (["budget.tokens=100"], "less than one step of 2,048 tokens: type budget.tokens=2048"),
        (["budget.tokens=1e6"], "warm-up of 500 steps does not fit the budget, which is 488 steps"),
        (["trainer.max_steps=100"], "type budget.tokens=204800 instead"),
        (["trainer.max_epochs=3"], "trainer.max_epochs=3: the length of a run is set in tokens"),
        (["resume=runs/absent"], "does not exist: give a run folder"),
        (
            ["resume=runs/x", "model=large"],
            "with the settings of that run: leave out model",
        ),
        (["name=../x"], "is a folder's name under runs_dir, not a path"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_with_what_to_type_instead(arguments: list[str], message: str):
    done = run("train.py", *arguments)
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the run to evaluate: python evaluate.py ckpt=runs/<name>"),
        (["ckpt=absent"], "absent does not exist: give a run folder"),
        (["ckpt=conf"], "conf holds no checkpoints/best.ckpt"),
        (["ckpt=README.md"], "has no config.yaml: give a run folder"),
        (["ckpt=x", "data.valid_files=[a]"], "not a setting of the chosen data: add data=text"),
        (["chkpt=x"], "unknown setting 'chkpt': did you mean ckpt"),
    ],
)
def test_evaluate_says_what_it_needs(arguments: list[str], message: str):
    done = run("evaluate.py", *arguments)
    assert message in done.stderr
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
