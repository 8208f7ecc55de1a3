"""`train.py --help optimizer.lr`: what single settings mean."""

import pytest

from minigpt.cli.settings_help import settings_help
from minigpt.core.settings import UserError
from tests.conftest import naming


@pytest.mark.parametrize(
    ("name", "word", "settings"),
    [
        ("train", "optimizer.lr", ["optimizer.lr=null"]),
        ("train", "budget", ["budget.tokens=10000000"]),
        ("train", "seed=3", ["seed=1"]),
        ("train", "model.class_path", ["model.class_path=null"]),
        ("evaluate", "ckpt", ["ckpt=<required>"]),
        ("evaluate", "data.holdout", ["data.holdout=0.05"]),
    ],
)
def test_help_of_a_setting_shows_its_default_and_its_sentence(
    name: str, word: str, settings: list[str]
):
    lines = settings_help(name, [word]).splitlines()
    assert [line for line in lines if not line.startswith(" ")] == settings
    assert lines[1].startswith("    ")
    assert lines[-1].endswith(".")
    assert "None" not in "".join(lines)  # which is typed as null


def test_help_of_all_settings_has_each_of_them():
    text = settings_help("train", ["all"])
    for setting in ("model.d_model=128", "data.vocab_size=3000", "resume=null", "seed=1"):
        assert f"\n{setting}\n    " in f"\n{text}"
    assert "overrides" not in text


def test_help_of_an_unknown_setting_names_the_nearest():
    with pytest.raises(UserError, match=naming("optimizer.lrr", "optimizer.lr")):
        settings_help("train", ["optimizer.lrr"])
