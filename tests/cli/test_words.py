"""What is typed is what is meant: texts of settings, lists, sweeps, and W&B's dashes."""

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from minigpt.cli.compose import load_config, types_of_settings
from minigpt.cli.words import _text_depth, hydra_word, without_dashes
from minigpt.core.settings import UserError
from minigpt.core.typed import typed_settings
from tests.conftest import naming

HINTS = {**types_of_settings("evaluate"), **types_of_settings("train")}
TEXTS = {name: depth for name, hint in HINTS.items() if (depth := _text_depth(hint)) is not None}
LITERAL = [
    "größe", "It's raining!", "runs/lr=0.1", "(1)", "a#b&c~d", "中文", "3.10", "1e3", "1_000",
    "0x10", "true", "2026-11-28", "inf", "NULL", "a, b", "[x]", "{a: 1}", "'a", '"a', "a  b", " a",
    "$HOME", "a\\b", "a\\,b", "choice(a,b)", "~x", "a\nb", "'a' 'b'", "\U0001f600", "", "@:*?|%+",
]  # fmt: skip


def read(word: str, sweep: bool = False) -> Any:
    """Return the value that Hydra and OmegaConf read from a typed setting."""
    override = OverridesParser.create().parse_override(hydra_word(word, HINTS, sweep))
    if override.is_sweep_override():
        rest = [f"{override.key_or_group}={text}" for text in override.sweep_string_iterator()]
        return [read(word) for word in rest]
    config = OmegaConf.create({"v": override.value(), "seed": 5})
    values: Any = OmegaConf.to_container(config, resolve=True)
    return values["v"]


@pytest.mark.parametrize("text", LITERAL)
def test_the_value_of_a_text_setting_is_the_text(text: str):
    assert read(f"name={text}") == text


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_every_text_setting_is_read_as_typed(name: str):
    for text in ("It's größe (1) = 3", "1e3"):
        assert read(f"{name}={text}") == text
        assert read(f"+{name}={text}") == text
    assert read(f"{name}=null") is None
    if TEXTS[name] == 1:
        assert read(f"{name}=[It's, größe (1),3.10,null]") == ["It's", "größe (1)", "3.10", "null"]
    elif TEXTS[name] == 2:
        assert read(f"{name}=[[könig,1,it's],['a,b',c,d]]") == [
            ["könig", "1", "it's"],
            ["a,b", "c", "d"],
        ]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("name='null'", "null"), ('name="a, b"', "a, b"), ("name=run-${seed} (a)", "run-5 (a)"),
        (r"name=a\${b}", "a${b}"), ("callbacks.prompts=[]", []), ("callbacks.prompts=[ ]", []),
        ("callbacks.prompts=['Hello, world',b]", ["Hello, world", "b"]),
        (r"callbacks.prompts=[Hello\, world]", ["Hello, world"]),
        ("data.train_files=[v2]/*.txt", "[v2]/*.txt"),
        ("data.train_files=[a [v2].txt, b]", ["a [v2].txt", "b"]),
        ("optimizer.lr=1e-3", 1e-3), ("data.batch_size=20_000", 20000),
        ("trainer.compile=True", True),
        ("optimizer.lr=1e-3 €", "1e-3 €"), ("seed=0x10", "0x10"), ("model=größe", "größe"),
    ],
)  # fmt: skip
def test_values_with_quotes_lists_references_and_numbers(word: str, value: Any):
    assert read(word) == value


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("name=größe,3.10,'a, b'", ["größe", "3.10", "a, b"]),
        ("callbacks.prompts=[It's,b],[ö]", [["It's", "b"], ["ö"]]),
        ("init_from=runs/a (1),runs/b", ["runs/a (1)", "runs/b"]),
        ("name=choice(a,b)", ["a", "b"]),
        ("seed=1,2", [1, 2]),
    ],
)
def test_commas_of_a_sweep_separate_values(word: str, values: list[Any]):
    assert read(word, sweep=True) == values


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("a1,\"'[]{}\\$ (=:.ö\n~"), max_size=12))
@example("\\${b\\")
@example("null")
def test_settings_that_are_printed_are_read_as_the_same_value(text: str):
    words = typed_settings({"name": text, "callbacks.prompts": [text, "b"]})
    assert list(map(read, words)) == [text, [text, "b"]]
    again = hydra_word(words[0], HINTS, sweep=False)
    assert hydra_word(again, HINTS, sweep=False) == again  # as a child process gets it


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("callbacks.prompts=Hello, world", ["callbacks.prompts", "Hello, world"]),
        ("words=[dad,,mom]", ["words", "dad", "mom"]),
        ("name=a${", ["name", "${"]),
        ("model=small,large", ["model=small,large", "-m"]),
        ("optimizer.lr=0,1", ["optimizer.lr=0,1", "-m"]),
    ],
)
def test_ambiguous_values_are_refused(word: str, names: list[str]):
    with pytest.raises(UserError, match=naming(*names)):
        read(word)


def test_arguments_of_wandb_are_settings():
    words = [
        "--optimizer.lr=0.1",
        "--name=True",
        "-m",
        "--config-dir=x",
        "--callbacks.prompts=['a', 'b']",
    ]
    plain = [
        "optimizer.lr=0.1",
        "name=True",
        "-m",
        "--config-dir=x",
        "callbacks.prompts=['a', 'b']",
    ]
    assert without_dashes(words) == plain
    assert without_dashes(plain) == plain
    config = load_config("train", [plain[0], plain[1], plain[4]])
    assert (config.optimizer.lr, config.name, config.callbacks.prompts) == (0.1, "True", ("a", "b"))


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--model", "large"], "model=large"),
        (["-model=large"], "model=large"),
        (["--model"], "model=<value>"),
        (["seed=1", "name=my", "own", "run", "model=large"], "'name=my own run'"),
        (["callbacks.prompts=[Once", "upon]", "-m"], "'callbacks.prompts=[Once upon]'"),
    ],
)
def test_words_that_are_no_settings_show_what_to_type(words: list[str], name: str):
    with pytest.raises(UserError) as error:
        without_dashes(words)
    assert name in str(error.value)
