"""The `minigpt` command, with one verb (subcommand) per task.

Each verb is a function below or in `minigpt.cli.analysis`. The slow imports are inside these
functions, so that `minigpt --help` does not wait for torch. The verbs `train` and `evaluate` call
the Hydra apps in `minigpt.cli.train` and `minigpt.cli.evaluate`.
"""

from __future__ import annotations

import signal
import sys
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from minigpt.cli.analysis import compare, probe, scaling, study
from minigpt.cli.arguments import ClassPath, PathArgument, PathOption, RunPath, load_runs
from minigpt.cli.exits import orderly_exit, result_on_stdout
from minigpt.cli.program import Program, describe, leave, program_words, use_utf8
from minigpt.core.console import log
from minigpt.core.cores import limit_threads
from minigpt.core.distributed import forget_launcher
from minigpt.core.files import provide_home
from minigpt.core.settings import UserError, one_line, speak
from minigpt.core.typed import path_argument, shell_command, shell_word

Format = Literal["hf", "safetensors", "onnx", "gguf", "html"]
Dtype = Literal["float32", "bfloat16"]
UsageError: Any = typer.BadParameter.__base__  # typer does not export it

app = typer.Typer(
    help="Train, study and share small GPTs that write stories.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def generate(
    run: RunPath,
    words: Annotated[
        list[str] | None, Argument(metavar="PROMPT", help="Text to continue; - reads stdin.")
    ] = None,
    prompt: Annotated[
        str | None, Option(help="The same as an option; default: Once upon a time.")
    ] = None,
    temperature: Annotated[float, Option(help="0 always takes the most likely token.")] = 0.8,
    top_k: Annotated[int | None, Option(help="Sample from the k most likely tokens.")] = None,
    top_p: Annotated[float | None, Option(help="Sample from this much probability mass.")] = None,
    min_p: Annotated[
        float | None, Option(help="Drop tokens below this fraction of the top token's probability.")
    ] = None,
    repetition_penalty: Annotated[float, Option(help="Above 1 penalises repeated tokens.")] = 1.0,
    max_tokens: Annotated[int, Option(help="Maximum number of new tokens.")] = 256,
    n: Annotated[int, Option(help="Number of stories.")] = 1,
    seed: Annotated[int | None, Option(help="The same seed gives the same stories.")] = None,
    dtype: Annotated[Dtype, Option(help="bfloat16 is faster for many stories.")] = "float32",
    class_path: ClassPath = None,
) -> None:
    """Generate stories.

    A single story is printed token by token. Several stories are sampled in
    batches and printed with <|endoftext|> between them. To train on a file in this
    format, type minigpt train data=text data.train_files=FILE.
    """
    import torch

    from minigpt.core.hardware import cpu_has_bfloat16
    from minigpt.generation.decoder import c_backend
    from minigpt.generation.sampling import SamplingConfig, device_for, iterate_stories, stream_text
    from minigpt.tokenizer import END_OF_TEXT

    config = SamplingConfig(temperature, top_k, top_p, max_tokens, seed, min_p, repetition_penalty)
    if n < 1:
        raise UserError("must be at least 1", "n", n)
    options = {"--top-k": top_k, "--top-p": top_p, "--min-p": min_p, "--n": None if n == 1 else n}
    unused = [f"{name} {value}" for name, value in options.items() if value is not None]
    if temperature == 0 and unused:
        problem = "always takes the most likely token, so only one story is possible; leave out "
        raise UserError(f"{problem}{' and '.join(unused)}", "temperature", 0)
    prompt = _one_prompt(words or [], prompt)
    (source,) = load_runs([run], class_path)
    model, tokenizer = source.load_model(device_for(n)), source.tokenizer
    model = model.to(getattr(torch, dtype))
    if prompt.endswith(" ") and prompt.strip():  # a rare token in stories
        problem = "remove the space at the end of the prompt: each word is predicted with the space"
        log.warning(f"{problem} before it")
    length = len(tokenizer.encode(prompt))  # raises before anything is printed
    if length >= (context := model.config.context_length):
        problem = "the prompt has %d tokens, the context %d: only the end of the prompt is read"
        log.warning(problem, length, context)
    c_works = c_backend() is not None  # logs its warning before the story is printed
    if dtype == "bfloat16" and not c_works and not cpu_has_bfloat16():
        reason = "decode.c is not used, and this CPU has no native bfloat16"
        log.warning(f"--dtype float32 is faster here: {reason}")
    result_on_stdout()
    if n == 1:
        for piece in chain([prompt], stream_text(model, tokenizer, prompt, config), ["\n"]):
            print(piece, end="", flush=True)
        return
    for story, text in enumerate(iterate_stories(model, tokenizer, prompt, n, config)):
        print(f"{END_OF_TEXT}\n" if story else "", prompt, text, sep="", flush=True)


def _one_prompt(words: list[str], option: str | None) -> str:
    """Return the prompt that was typed, or a default if none was typed.

    The prompt is typed as a positional argument or as the value of --prompt. If it is "-", the text
    of standard input is returned.

    Args:
        words: positional arguments after the run, of which at most one is allowed.
        option: value of --prompt; None if the option is missing.
    """
    if len(words) > 1:
        raise UserError("the prompt must be one argument", fix={"prompt": " ".join(words)})
    if words and option is not None:
        problem = f"{shell_word(words[0])} is also given as the prompt; leave out one of them"
        raise UserError(problem, "prompt", option)
    prompt = option if option is not None else (words or ["Once upon a time"])[0]
    # These characters stand for bytes that are not UTF-8, see os.fsdecode.
    if any("\udc80" <= character <= "\udcff" for character in prompt):
        raise UserError("is not valid UTF-8: type it in a UTF-8 terminal", "prompt", prompt)
    return _standard_input() if prompt == "-" else prompt


def _standard_input() -> str:
    """Return standard input without the final newline that `echo` adds."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"standard input is not UTF-8 (at byte {error.start})"
        remedy = "if it is WINDOWS-1252, pipe it through iconv -f WINDOWS-1252 -t UTF-8"
        raise UserError(f"{problem}; {remedy}") from None
    return text.removesuffix("\n").removesuffix("\r")


app.command()(probe)


@app.command()
def playground(
    runs: Annotated[
        list[Path] | None,
        PathArgument(help="One to four runs to show side by side; default: the bundled model."),
    ] = None,
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None, Option(min=0, max=65535, help="By default the first free port from 7860 up.")
    ] = None,
    auth: Annotated[str | None, Option(help="Require a login.", metavar="USER:PASSWORD")] = None,
    root_path: Annotated[
        str | None,
        Option(help="Path or URL of the page behind a reverse proxy.", metavar="PATH"),
    ] = None,
    allow_training: Annotated[
        bool | None,
        Option("--allow-training", help="Allow training if others reach it; needs --auth."),
    ] = None,
    class_path: ClassPath = None,
) -> None:
    """Serve a local web page to generate stories, to explore models and to train them.

    For a run that was trained with snapshots (callbacks.snapshots=8), a slider
    shows the model at earlier points of its training.
    """
    from minigpt.playground.server import serve
    from minigpt.runs.folder import bundled_release

    models = load_runs(runs or [bundled_release()], class_path)
    serve(models, host, port, auth, root_path, allow_training)


for verb in (scaling, compare, study):
    app.command()(verb)


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path, PathArgument(help="New folder, or an earlier export to replace.")],
    format: Annotated[Format, Option(help="hf: transformers; html: a page to open.")] = "hf",
    dtype: Annotated[Dtype | None, Option(help="For safetensors and html: bfloat16.")] = None,
    license: Annotated[str | None, Option(help="License of the weights, such as mit.")] = None,
    evaluate: Annotated[bool, Option("--evaluate", help="Evaluate the weights if needed.")] = False,
    average: Annotated[
        list[str] | None,
        Option(help="Average the weights with the run of init_from, or another run from it."),
    ] = None,
    push: Annotated[str | None, Option(help="Upload to the Hugging Face Hub as user/name.")] = None,
    private: Annotated[bool, Option("--private", help="With --push: private repository.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="With --push: only list the files.")] = False,
    class_path: ClassPath = None,
) -> None:
    """Export a model for other programs, with a model card. Only --push uploads files."""
    for option, is_set in {"--dry-run": dry_run, "--private": private}.items():
        if is_set and push is None:
            raise UserError(f"{option} needs --push: add --push user/name, or omit this option")
    from minigpt.core.console import console
    from minigpt.exporting import ExportConfig
    from minigpt.exporting import export as write
    from minigpt.exporting.folder import check_output
    from minigpt.exporting.hub import check_repository, push_folder

    config = ExportConfig(format, dtype, evaluate, license, tuple(average or ()))
    check_output(out)
    if push is not None:
        check_repository(push, dry_run)
    (source,) = load_runs([run], class_path)
    files = write(source, out, config, push, console)
    print(f"Wrote {out}: {', '.join(path.name for path in files)}")
    if push is not None and dry_run:
        print(f"Nothing was uploaded to https://huggingface.co/{push}. The files would be:")
        print("\n".join(f"{path.stat().st_size:>12,}  {path.name}" for path in files))
    elif push is not None:
        print(f"Uploaded to {push_folder(out, push, private)}")


@app.command()
def publish(
    run: RunPath,
    name: Annotated[str, Argument(help="Name on the Hugging Face Hub, user/name.")],
    space: Annotated[bool, Option("--space", help="A web page with the model.")] = False,
    out: Annotated[
        Path | None, PathOption(help="Folder to write; by default NAME without the user.")
    ] = None,
    private: Annotated[bool, Option("--private", help="Private repository.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only write the folder.")] = False,
    class_path: ClassPath = None,
) -> None:
    """Upload a model in the format of transformers; with --space, upload a web page instead.

    The page is the playground with this model, as a Space on the Hugging Face Hub.
    To try the page on this machine first, add --dry-run --out page, then type
    python page/app.py.
    """
    from minigpt.exporting import export as write
    from minigpt.exporting.folder import check_output
    from minigpt.exporting.hub import check_repository, push_folder
    from minigpt.exporting.space import write_space

    check_repository(name, dry_run, "name")
    folder = out or Path(name.rpartition("/")[2])
    check_output(folder)
    (source,) = load_runs([run], class_path)
    files = write_space(source, folder, name) if space else write(source, folder, name=name)
    print(f"Wrote {folder}: {len(files)} files")
    if dry_run:
        page = shell_command(*program_words("python"), path_argument(str(folder / "app.py")))
        print(f"Nothing was uploaded.{f' To try it: {page}' if space else ''}")
    else:
        print(f"Uploaded to {push_folder(folder, name, private, 'space' if space else 'model')}")


# ---------------------------------------------------------------------------- Hydra's verbs

_FORWARDED = {"ignore_unknown_options": True, "help_option_names": []}
Settings = Annotated[list[str] | None, Argument(metavar="SETTING=VALUE...")]


@app.command("train", context_settings=_FORWARDED)
def train_verb(settings: Settings = None) -> None:
    """Train a model; see minigpt train --help.

    Example: minigpt train model=large budget.tokens=20e6
    """
    from minigpt.cli.train import main

    main()


@app.command("evaluate", context_settings=_FORWARDED)
def evaluate_verb(settings: Settings = None) -> None:
    """Evaluate a model; see minigpt evaluate --help.

    Example: minigpt evaluate ckpt=runs/my-run
    """
    from minigpt.cli.evaluate import main

    main()


@app.command()
def sweep(
    name: Annotated[str, Argument(help="Name of the sweep: scaling, scaling_seeds or recipe.")],
    out: Annotated[Path | None, PathOption(help="Output file; by default <name>.yaml.")] = None,
) -> None:
    """Write a file for the command wandb sweep; each run of the sweep calls minigpt train."""
    from minigpt.cli.sweep import write_sweep

    path = write_sweep(name, out or Path(f"{name}.yaml"))
    command = shell_command(*program_words("wandb"), "sweep", path_argument(str(path)))
    print(f"Wrote {path}. Next: {command}")


@app.command()
def doctor(as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False) -> None:
    """Print the facts that a bug report needs, and advice for this machine."""
    import json

    from minigpt.cli.doctor import diagnose

    facts, advice = diagnose()
    result_on_stdout()
    if as_json:
        print(json.dumps({"facts": facts, "advice": advice}, indent=2, ensure_ascii=False))
        return
    lines = [f"{topic + ':':12}{fact}" for topic, fact in facts.items()]
    print("\n".join([*lines, *(f"could be better: {line}" for line in advice)]))


def main() -> None:
    """Run the command line.

    At a `UserError` or a usage error of typer, the program prints one line on stderr and exits with
    the code of the error, which is usually 2. `orderly_exit` handles signals.
    """
    use_utf8()
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    verb = sys.argv[1]
    if verb not in ("train", "doctor"):
        forget_launcher()
    if verb != "train":
        limit_threads()
    program = Program.detect(verb)
    speak(program.command)
    with orderly_exit(verb):
        code = 2
        try:
            if not {"-h", "--help"} & set(sys.argv):
                provide_home()
            if (code := app(standalone_mode=False)) == 128 + signal.SIGINT:  # at Ctrl-C
                raise KeyboardInterrupt
            sys.exit(code)
        except UserError as error:
            problem, code = describe(error, program, *_parameters(verb)), error.exit_code
        except UsageError as error:
            path = error.ctx.command_path if error.ctx else "minigpt"
            problem = f"{one_line(error.format_message()).rstrip('.')} (usage: {path} --help)"
        leave(problem, code)


def _parameters(verb: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of a verb's options, such as top_k for --top-k, and of its arguments."""
    command = getattr(typer.main.get_command(app), "commands", {}).get(verb)
    parameters = command.params if command is not None else ()
    options = frozenset(p.name for p in parameters if p.param_type_name == "option")
    return options, frozenset(p.name for p in parameters) - options


if __name__ == "__main__":
    main()
