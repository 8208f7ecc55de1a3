import dataclasses
import inspect
import io
import re
import shlex
import subprocess
import sys

import pytest
import torch

from minigpt.analysis.over_time import OverTimeConfig
from minigpt.analysis.study import StudyConfig
from minigpt.cli import app
from minigpt.exporting import ExportConfig
from minigpt.generation.sampling import SamplingConfig
from minigpt.scaling import results
from tests.conftest import trained_folder


def run_main(monkeypatch, *words: str) -> int:
    """Return the exit code of `minigpt words…`."""
    monkeypatch.setattr(sys, "argv", ["minigpt", *words])
    with pytest.raises(SystemExit) as leaving:
        app.main()
    return int(leaving.value.code or 0)


def test_help_lists_the_verbs_with_one_line_each(monkeypatch, capsys):
    assert run_main(monkeypatch, "--help") == 0
    output = capsys.readouterr().out
    verbs = ("export", "generate", "playground", "probe", "scaling", "study")
    assert all(re.search(rf"\b{verb} +\w", output) for verb in verbs)  # a name, then its help


def test_help_does_not_import_torch_or_matplotlib():
    code = (
        "import sys; from minigpt.cli import app\n"
        "sys.argv = ['minigpt', '--help']\n"
        "try: app.main()\n"
        "except SystemExit: print({'torch', 'lightning', 'matplotlib'} & set(sys.modules))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.endswith("set()\n")


@pytest.mark.parametrize(
    ("verb", "config", "n_shared"),
    [
        ("generate", SamplingConfig, 7),
        ("study", StudyConfig, 2),
        ("study", OverTimeConfig, 2),
        ("export", ExportConfig, 5),
    ],
)
def test_options_have_the_defaults_of_the_dataclass(verb: str, config: type, n_shared: int):
    (command,) = [c for c in app.app.registered_commands if c.callback.__name__ == verb]
    parameters = inspect.signature(command.callback).parameters
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    options = {name: parameters[name].default for name in fields if name in parameters}
    assert len(options) == n_shared
    expected = {name: None if fields[name] == () else fields[name] for name in options}
    assert options == expected


def test_user_error_is_one_line_on_stderr_and_exit_code_2(tmp_path, monkeypatch, capsys):
    assert run_main(monkeypatch, "scaling", str(tmp_path)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert str(tmp_path) in err
    assert err.count("\n") == 1


def test_positional_argument_in_an_error_is_shown_as_typed(tmp_path, monkeypatch, capsys):
    missing = str(tmp_path / "no folder")
    assert run_main(monkeypatch, "scaling", missing) == 2
    assert capsys.readouterr().err.startswith(f"error: {shlex.quote(missing)}: ")


def test_unknown_verb_exits_with_code_2(monkeypatch, capsys):
    assert run_main(monkeypatch, "scalling") == 2
    err = capsys.readouterr().err
    assert "scalling" in err
    assert "scaling" in err  # the verb that was meant


def test_keyboard_interrupt_exits_with_code_130(tmp_path, monkeypatch, capsys):
    def interrupted(folders):
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "find_runs", interrupted)
    assert run_main(monkeypatch, "scaling", str(tmp_path)) == 130
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "SIGINT" in err


def test_generate_by_seed_prompt_and_dtype(tiny, trained_once, monkeypatch, capsys):
    folder = trained_once([*tiny, "name=parent"])
    words = ("generate", str(folder), "--prompt", "Tom", "--max-tokens", "9")
    outputs = []
    for choice in (("--seed", "1"), ("--seed", "1"), ("--seed", "5"), ("--temperature", "0")):
        capsys.readouterr()
        assert run_main(monkeypatch, *words, *choice) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert all(text.startswith("Tom") for text in outputs)
    plain = [word for word in words if word != "--prompt"]
    assert run_main(monkeypatch, *plain, "--seed", "1") == 0
    assert capsys.readouterr().out == outputs[0]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Tom\n")))
    assert run_main(monkeypatch, *["-" if word == "Tom" else word for word in plain]) == 0
    assert capsys.readouterr().out.startswith("Tom")
    assert run_main(monkeypatch, *words, "Lily") == 2
    assert "--prompt Tom" in capsys.readouterr().err
    assert run_main(monkeypatch, *words, "--n", "70", "--seed", "1") == 0
    stories = capsys.readouterr().out.split("\n<|endoftext|>\n")
    assert len(stories) == 70
    assert all(story.startswith("Tom") for story in stories)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Zoë 🐉\r\n".encode())))
    assert run_main(monkeypatch, *words, "--prompt", "-") == 0
    assert capsys.readouterr().out.startswith("Zoë 🐉")
    for prompt in ("", "Once upon a time," * 40):
        assert run_main(monkeypatch, *words, "--prompt", prompt) == 0
        out, err = capsys.readouterr()
        assert out.startswith(prompt)
        assert err.count("\n") == bool(prompt)  # a warning that names the context, of 16 tokens
        assert bool(re.search(r"\b16\b", err)) == bool(prompt)
    for dtype in ("float32", "bfloat16"):
        with monkeypatch.context() as patched:
            taken = []
            patched.setattr(
                "minigpt.generation.sampling.stream_text",
                lambda net, *rest, taken=taken: taken.append(net.embedding.weight.dtype) or "x",
            )
            assert run_main(monkeypatch, *words, "--dtype", dtype) == 0
            assert taken == [getattr(torch, dtype)]
        assert run_main(monkeypatch, *words, "--dtype", dtype) == 0
        assert capsys.readouterr().out.startswith("Tomx\nTom")
    monkeypatch.setattr("minigpt.generation.decoder.c_backend", lambda: None)
    for has_bfloat16 in (True, False):
        monkeypatch.setattr("minigpt.core.hardware.cpu_has_bfloat16", lambda has=has_bfloat16: has)
        assert run_main(monkeypatch, *words, "--dtype", "bfloat16", "--max-tokens", "1") == 0
        assert ("--dtype float32" in capsys.readouterr().err) is not has_bfloat16
    for wrong, names in WRONG_PROMPTS.items():
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a \xff")))
        assert run_main(monkeypatch, *words, "--prompt", wrong) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch("error: .*\n", err)
        assert all(name in err for name in names)


WRONG_PROMPTS = {"\udcff": [r"\xff", "UTF-8"], "-": ["UTF-8", "2"]}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("--top-p 2", ["--top-p", "2.0"]),
        ("--temperature nan", ["--temperature", "nan"]),
        ("--temperature 0 --top-k 5 --min-p 0.1", ["--temperature", "--top-k", "--min-p"]),
        ("--temperature 0 --n 2", ["--temperature", "--n 2"]),
        ("--n -1", ["--n", "-1"]),
        ("--seed -1", ["--seed", "-1"]),
        ("--repetition-penalty nan", ["--repetition-penalty", "nan", "0.01", "100"]),
        ("--max-tokens 0", ["--max-tokens"]),
        ("--min-p 3", ["--min-p", "3.0"]),
        ("", ["nowhere"]),
    ],
)
def test_generate_options_out_of_range_are_one_line_errors(options, names, monkeypatch, capsys):
    assert run_main(monkeypatch, "generate", "nowhere", *options.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch("error: .*\n", err)
    assert all(name in err for name in names)


@pytest.mark.long
def test_generate_into_a_closed_pipe_has_no_traceback(tiny):
    folder = trained_folder(tiny)
    words = [str(folder), "--n", "500", "--max-tokens", "60", "--temperature", "5"]
    with subprocess.Popen(
        [sys.executable, "-m", "minigpt.cli.app", "generate", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
