"""Settings as text, split lists, and words quoted for bash and zsh."""

import json
import shutil
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minigpt.core.typed import (
    is_quoted,
    path_argument,
    shell_command,
    shell_word,
    split_items,
    typed_settings,
    typed_value,
)

WORDS = [
    "It's größe (1) [v2]", "$HOME ${x} `id` !x !!", '"q" #&;|<>', "~/x", "=ls", "*", "{a,b}", "^a",
    "a  b", "", "-x", "a\nb\tc", "\xa0\u200b", "x\udcf6'\\n!", "\\", "%1", "x=~/y:~/z", "中文",
]  # fmt: skip


@pytest.mark.parametrize("shell", ["bash", "zsh", "dash"])
def test_shells_split_a_command_into_its_words(shell: str):
    if (program := shutil.which(shell)) is None:
        pytest.skip(f"{shell} is not installed")
    words = WORDS if shell != "dash" else [word for word in WORDS if word.isprintable()]
    script = "import json, sys; print(json.dumps(sys.argv[1:]))"
    command = shell_command(sys.executable, "-c", script, *words)
    assert command.isprintable()
    process = subprocess.run([program, "-c", command], capture_output=True, check=True, timeout=60)
    assert json.loads(process.stdout) == words


def test_plain_words_are_not_quoted():
    assert shell_command("minigpt", "train", "name=a-b_1.5/x:y") == "minigpt train name=a-b_1.5/x:y"
    assert shell_word("name=größe") == "'name=größe'"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"), (True, "true"), (1.5, "1.5"), ("null", '"null"'),
        ("größe (1)", "größe (1)"),
        (["a, b", "c"], '["a, b",c]'), ([], "[]"), ("", '""'), ("'a'", "\"'a'\""),
        ("${a}", r'"\${a}"'), ('\\"', r'"\\\""'), (" a", '" a"'), ([["a", None]], "[[a,null]]"),
    ],
)  # fmt: skip
def test_values_are_typed_plainly_where_that_is_clear(value, text):
    assert typed_value(value) == text
    assert typed_settings({"k": value}) == [f"k={text}"]


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("a,b", ["a", "b"]), (" a b , c ", ["a b", "c"]), ("'a, b', \"c,d\"", ["'a, b'", '"c,d"']),
        ("It's, it's", ["It's", "it's"]), (r"a\, b", ["a, b"]), ("", [""]), ("a,", ["a", ""]),
        ("[a,b],[c]", ["[a,b]", "[c]"]), ("[[a,b],[c]],x", ["[[a,b],[c]]", "x"]),
        ("${oc.env:X,y}/z,w", ["${oc.env:X,y}/z", "w"]), ("[a,b", ["[a", "b"]),
        ('"a" b,c', ['"a" b', "c"]),
    ],
)  # fmt: skip
def test_items_are_split_at_commas_outside_quotes_and_brackets(text, items):
    assert split_items(text) == items


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("a1,\"'[]\\$ (=ö\n{}", max_size=8), min_size=1, max_size=3))
@example(["\\,", "'"])
def test_lists_are_split_into_the_items_that_were_typed(texts: list[str]):
    typed = [typed_value(text) for text in texts]
    assert split_items(",".join(typed)) == typed


def test_quotes_and_paths():
    assert [is_quoted(text) for text in ("'a'", '"a\\""', "'a' 'b'", "a", "'")] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert [path_argument(path) for path in ("-x", "a/-x")] == ["./-x", "a/-x"]
