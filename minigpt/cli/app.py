"""The `minigpt` command: what to do with runs once they are trained.

Each verb is one function below, which imports what it needs when it is called: `minigpt --help`
must not wait for torch. `train` and `evaluate` are Hydra apps, in modules of their own.
"""

from __future__ import annotations

import logging
import shlex
import sys
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from minigpt.cli.program import Program, describe, leave
from minigpt.core.console import show_log
from minigpt.core.files import user_path
from minigpt.core.settings import UserError, one_line, speak

if TYPE_CHECKING:
    from minigpt.runs.folder import Run

Format = Literal["hf", "safetensors", "onnx", "gguf"]
Dtype = Literal["float32", "bfloat16"]
PathArgument = partial(Argument, parser=user_path)
PathOption = partial(Option, parser=user_path, metavar="PATH")
RunPath = Annotated[Path, PathArgument(help="A run folder, or a checkpoint file in one.")]
ClassPath = Annotated[str | None, Option(help="Class of the model, such as mypackage.MyGPT.")]
log = logging.getLogger("minigpt")
UsageError: Any = typer.BadParameter.__base__  # which typer does not name

app = typer.Typer(
    help="Use and study the story-telling models that train.py makes.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def generate(
    run: RunPath,
    prompt: Annotated[str, Option(help="How it begins; -: standard input.")] = "Once upon a time",
    temperature: Annotated[float, Option(help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, Option(help="Choose among the k likeliest.")] = None,
    top_p: Annotated[float | None, Option(help="Choose among this much mass.")] = None,
    min_p: Annotated[float | None, Option(help="Least share of the top-1 probability.")] = None,
    repetition_penalty: Annotated[float, Option(help="Above 1: tokens come back less.")] = 1.0,
    max_tokens: Annotated[int, Option(help="The longest continuation.")] = 256,
    n: Annotated[int, Option(help="How many stories.")] = 1,
    seed: Annotated[int | None, Option(help="The same seed, the same stories.")] = None,
    dtype: Annotated[Dtype, Option(help="bfloat16 rounds weights; faster for many.")] = "float32",
    class_path: ClassPath = None,
) -> None:
    """Write stories. One is shown as it is sampled, and stops at its end.

    Several are written together, with <|endoftext|> between them, which is what data=text reads.
    """
    import torch

    from minigpt.core.hardware import cpu_has_bfloat16
    from minigpt.generation.decoder import c_backend
    from minigpt.generation.sampling import SamplingConfig, iterate_stories, stream_text
    from minigpt.tokenizer import END_OF_TEXT

    sampling = SamplingConfig(
        temperature, top_k, top_p, max_tokens, seed, min_p, repetition_penalty
    )
    if n < 1:
        raise UserError("must be at least 1", "n", n)
    options = {"--top-k": top_k, "--top-p": top_p, "--min-p": min_p, "--n": None if n == 1 else n}
    unused = [f"{name} {value}" for name, value in options.items() if value is not None]
    if temperature == 0 and unused:
        problem = "always takes the most likely token, and so writes one story: leave out "
        raise UserError(f"{problem}{' and '.join(unused)}", "temperature", 0)
    (opened,) = _load([run], class_path)
    net, tokenizer = opened.load_model().to(getattr(torch, dtype)), opened.tokenizer
    prompt = _standard_input() if prompt == "-" else prompt
    length = len(tokenizer.encode(prompt))  # refused before anything is shown
    if length >= (context := net.config.context_length):
        log.warning("the model reads only the end of %d tokens: its context is %d", length, context)
    if dtype == "bfloat16" and c_backend() is None and not cpu_has_bfloat16():
        log.warning("neither decode.c nor native bfloat16 here: --dtype float32 is faster")
    if n == 1:
        for piece in chain([prompt], stream_text(net, tokenizer, prompt, sampling), ["\n"]):
            print(piece, end="", flush=True)
        return
    for story, text in enumerate(iterate_stories(net, tokenizer, prompt, n, sampling)):
        print(f"{END_OF_TEXT}\n" if story else "", prompt, text, sep="", flush=True)


def _load(paths: list[Path], class_path: str | None) -> list[Run]:
    """Load runs. Those of a class of their own take the class; plain ones may stand beside them."""
    from minigpt.runs.folder import Run

    runs = [Run.load(path) for path in paths]
    if class_path is None:
        return runs
    from minigpt.cli.compose import import_class

    model = import_class(class_path, "class_path")
    own = [run for run in runs if run.config.get("model_class") is not None] or runs
    return [replace(run, model=model) if run in own else run for run in runs]


def _check_folder(path: Path | None, option: str = "--out") -> None:
    if path is not None and path.exists() and not path.is_dir():
        raise UserError(f"{option} {path} is a file: give a folder, new or not")


def _standard_input() -> str:
    """All of it, without the line end that `echo` puts behind."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text: byte {error.start}") from None
    return text.removesuffix("\n").removesuffix("\r")


@app.command()
def probe(
    run: RunPath,
    near: Annotated[
        list[str] | None, Option(help="A word whose nearest tokens to show; may be repeated.")
    ] = None,
    analogy: Annotated[
        list[str] | None,
        Option(help="Such as 'princess - girl + boy'; may be repeated.", metavar="'A - B + C'"),
    ] = None,
    k: Annotated[int, Option(min=1, help="How many tokens to show.")] = 5,
    out: Annotated[
        Path | None, PathOption(help="Where the map goes; default: the run, or here for an export.")
    ] = None,
    class_path: ClassPath = None,
) -> None:
    """Look into the embedding: nearest words, analogies, and a map of words as a PNG.

    Without --near and --analogy: a score over twenty analogies.
    """
    from rich.console import Console

    from minigpt.analysis.analogies import ask
    from minigpt.analysis.embedding_map import MAP, FewWordsError, caption, embedding_map, write_map
    from minigpt.analysis.embeddings import EmbeddingProbe, SplitWordError, parse_analogy
    from minigpt.cli.tables import score_line, score_table, word_table

    _check_folder(out)
    analogies = {text: parse_analogy(text) for text in analogy or []}
    (opened,) = _load([run], class_path)
    probe = EmbeddingProbe(opened.load_model(), opened.tokenizer)
    queries = {f"Nearest to {word}": partial(probe.neighbours, word, k) for word in near or []}
    queries |= {text: partial(probe.analogy, *words, k) for text, words in analogies.items()}
    console, problems = Console(), {}
    for title, query in queries.items():
        try:
            console.print(word_table(title, query()))
        except SplitWordError as error:
            problems[str(error)] = None  # each once
    if not queries:
        answers = ask(probe)
        console.print(score_table(answers), score_line(answers), sep="\n")
    try:
        layout, path = embedding_map(probe), (out or opened.output_dir) / MAP
        write_map(layout, path)
        console.print(f"Wrote {path}. {caption(layout)}", markup=False, highlight=False)
    except FewWordsError as error:  # the tables are of use without it
        console.print(f"No map: {error}", markup=False, highlight=False)
    if problems:
        raise UserError("; ".join(problems))


@app.command()
def playground(
    runs: Annotated[list[Path], PathArgument(help="One to four runs, shown side by side.")],
    host: Annotated[str, Option(help="Where to listen; by default, locally.")] = "127.0.0.1",
    port: Annotated[
        int | None, Option(min=0, max=65535, help="First free one from 7860 on.")
    ] = None,
    auth: Annotated[str | None, Option(help="Require a login.", metavar="USER:PASSWORD")] = None,
    class_path: ClassPath = None,
) -> None:
    """Open a local web page: stories token by token, words, a map, attention."""
    from minigpt.playground.server import serve

    serve(_load(runs, class_path), host, port, auth)


@app.command()
def scaling(
    folders: Annotated[list[Path], PathArgument(help="Run folders, or folders with runs inside.")],
    out: Annotated[
        Path | None, PathOption(help="Where to write; default: the first folder.")
    ] = None,
    keep: Annotated[Path | None, PathOption(help="Copy the records of finished runs here.")] = None,
) -> None:
    """Compare runs by size: tables, L = E + A / N^α fitted, and three log-log figures.

    Writes scaling.md, scaling.json and the figures, and prints the table of runs.
    """
    from rich.console import Console

    from minigpt.scaling.fit import run_warnings
    from minigpt.scaling.results import find_runs, keep_run, read_run
    from minigpt.scaling.tables import REFERENCE_NOTE, law_line, rich_table, write_scaling

    _check_folder(out)
    _check_folder(keep, "--keep")
    runs = [read_run(folder) for folder in find_runs(folders)]
    for run in runs:
        if keep is not None and run.point:
            keep_run(run.path, keep)
    out = out or (folders[0] if folders[0].is_dir() else runs[0].path)
    laws = map(law_line, write_scaling(runs, out))
    wrote = f"Wrote {out / 'scaling.md'}, scaling.json and figures."
    paragraphs = (REFERENCE_NOTE, "\n".join(run_warnings(runs)), "\n".join(laws), wrote)
    console = Console()
    console.print(rich_table(runs))
    for paragraph in filter(None, paragraphs):
        console.print("", paragraph, sep="\n", markup=False, highlight=False)


@app.command()
def study(
    runs: Annotated[list[Path], PathArgument(help="The runs to compare, of different sizes.")],
    out: Annotated[Path, PathOption(help="Where to write.")] = Path("study"),
    n: Annotated[int, Option(help="Stories of each run at each temperature.")] = 200,
    seed: Annotated[int, Option(help="Of the stories.")] = 1,
    class_path: ClassPath = None,
) -> None:
    """Compare what runs write and know: coherence by temperature, samples, embeddings.

    Writes coherence.md, samples.md and embeddings.md, with their figure and JSON.
    """
    from minigpt.analysis.study import StudyConfig, write_study

    _check_folder(out)
    write_study(_load(runs, class_path), out, StudyConfig(n=n, seed=seed))
    print(f"Wrote {out / 'coherence.md'}, samples.md and embeddings.md.")


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path, PathArgument(help="A new folder, or an earlier export to replace.")],
    format: Annotated[Format, Option(help="hf: transformers; safetensors: Mini GPT.")] = "hf",
    dtype: Annotated[Dtype | None, Option(help="Of safetensors: bfloat16 by default.")] = None,
    license: Annotated[str | None, Option(help="Of the weights: mit, cc-by-4.0, ...")] = None,
    evaluate: Annotated[bool, Option("--evaluate", help="Measure the weights if needed.")] = False,
    average: Annotated[bool, Option("--average", help="Mean with the run of init_from.")] = False,
    push: Annotated[str | None, Option(help="Send to the Hugging Face Hub as user/name.")] = None,
    private: Annotated[bool, Option("--private", help="With --push: nobody else sees it.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="With --push: list, send nothing.")] = False,
    class_path: ClassPath = None,
) -> None:
    """Write a model for other programs, with a model card; nothing is sent without --push."""
    for option, is_set in {"--dry-run": dry_run, "--private": private}.items():
        if is_set and push is None:
            raise UserError(f"{option} is for what --push sends: add --push user/name")
    from minigpt.core.console import console
    from minigpt.exporting import ExportConfig
    from minigpt.exporting import export as write
    from minigpt.exporting.folder import check_output
    from minigpt.exporting.hub import check_repository, push_folder

    config = ExportConfig(format, dtype, evaluate, license, average)
    check_output(out)
    if push is not None:
        check_repository(push, dry_run)
    (opened,) = _load([run], class_path)
    files = write(opened, out, config, push, console)
    print(f"Wrote {out}: {', '.join(path.name for path in files)}")
    if push is not None and dry_run:
        print(f"Nothing was sent. Without --dry-run, to https://huggingface.co/{push}:")
        print("\n".join(f"{path.stat().st_size:>12,}  {path.name}" for path in files))
    elif push is not None:
        print(f"Sent to {push_folder(out, push, private)}")


# ---------------------------------------------------------------------------- Hydra's verbs

_PASSED_ON = {"ignore_unknown_options": True, "help_option_names": []}
Settings = Annotated[list[str] | None, Argument(metavar="SETTING=VALUE...")]


@app.command("train", context_settings=_PASSED_ON)
def train_verb(settings: Settings = None) -> None:
    """Train a model: minigpt train model=large budget.tokens=20e6. See minigpt train --help."""
    from minigpt.cli.train import main

    main()


@app.command("evaluate", context_settings=_PASSED_ON)
def evaluate_verb(settings: Settings = None) -> None:
    """Measure a model: minigpt evaluate ckpt=runs/<name>. See minigpt evaluate --help."""
    from minigpt.cli.evaluate import main

    main()


@app.command()
def sweep(
    name: Annotated[str, Argument(help="Of the sweep: scaling, scaling_seeds or recipe.")],
    out: Annotated[
        Path | None, PathOption(help="File to write; default: <name>.yaml here.")
    ] = None,
) -> None:
    """Write a W&B sweep file whose command is minigpt train, for wandb sweep."""
    from minigpt.cli.sweep import write_sweep

    path = write_sweep(name, out or Path(f"{name}.yaml"))
    print(f"Wrote {path}. Next: wandb sweep {shlex.quote(str(path))}")


def main() -> None:
    """Entry point: a mistake is one line on stderr and exit code 2, ctrl-C a quiet 130."""
    show_log()
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    verb = sys.argv[1]
    program = Program.detect(verb)
    speak(program.command)
    try:
        sys.exit(app(standalone_mode=False))
    except UserError as error:
        problem = describe(error, program, _options(verb))
    except UsageError as error:
        verb = error.ctx.command_path if error.ctx else "minigpt"
        problem = f"{one_line(error.format_message()).rstrip('.')}; {verb} --help shows what is"
    except OSError as error:
        if error.filename is None:
            raise
        problem = f"cannot read or write {error.filename}: {error.strerror}; give another place"
    leave(problem)


def _options(verb: str) -> frozenset[str]:
    """The names of a verb's parameters that are typed as --name."""
    command = getattr(typer.main.get_command(app), "commands", {}).get(verb)
    parameters = command.params if command is not None else ()
    return frozenset(p.name for p in parameters if p.param_type_name == "option")


if __name__ == "__main__":
    main()
