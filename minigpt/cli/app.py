"""The `minigpt` command, with one verb per task.

Each verb is a function below. It imports its modules only when it is called, so that
`minigpt --help` does not wait for torch. `train` and `evaluate` are Hydra apps in their own
modules.
"""

from __future__ import annotations

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
from minigpt.core.console import log, show_log
from minigpt.core.files import user_path
from minigpt.core.settings import UserError, one_line, speak

if TYPE_CHECKING:
    from minigpt.runs.folder import Run

Format = Literal["hf", "safetensors", "onnx", "gguf"]
Dtype = Literal["float32", "bfloat16"]
PathArgument = partial(Argument, parser=user_path)
PathOption = partial(Option, parser=user_path, metavar="PATH")
RunPath = Annotated[Path, PathArgument(help="Run folder, checkpoint, snapshot or exported model.")]
ClassPath = Annotated[str | None, Option(help="Class of the model, such as mypackage.MyGPT.")]
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
    prompt: Annotated[str, Option(help="Text to continue; - reads stdin.")] = "Once upon a time",
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

    A single story is printed token by token. Several stories are sampled in batches and printed
    with <|endoftext|> between them. data=text can read this format.
    """
    import torch

    from minigpt.core.hardware import cpu_has_bfloat16
    from minigpt.generation.decoder import c_backend
    from minigpt.generation.sampling import SamplingConfig, iterate_stories, stream_text
    from minigpt.tokenizer import END_OF_TEXT

    config = SamplingConfig(temperature, top_k, top_p, max_tokens, seed, min_p, repetition_penalty)
    if n < 1:
        raise UserError("must be at least 1", "n", n)
    options = {"--top-k": top_k, "--top-p": top_p, "--min-p": min_p, "--n": None if n == 1 else n}
    unused = [f"{name} {value}" for name, value in options.items() if value is not None]
    if temperature == 0 and unused:
        problem = "always takes the most likely token, so only one story is possible; leave out "
        raise UserError(f"{problem}{' and '.join(unused)}", "temperature", 0)
    (source,) = _load([run], class_path)
    model, tokenizer = source.load_model().to(getattr(torch, dtype)), source.tokenizer
    prompt = _standard_input() if prompt == "-" else prompt
    length = len(tokenizer.encode(prompt))  # raises before anything is printed
    if length >= (context := model.config.context_length):
        log.warning("only the end of the %d-token prompt fits the context of %d", length, context)
    if dtype == "bfloat16" and c_backend() is None and not cpu_has_bfloat16():
        log.warning("decode.c and native bfloat16 are not available: --dtype float32 is faster")
    if n == 1:
        for piece in chain([prompt], stream_text(model, tokenizer, prompt, config), ["\n"]):
            print(piece, end="", flush=True)
        return
    for story, text in enumerate(iterate_stories(model, tokenizer, prompt, n, config)):
        print(f"{END_OF_TEXT}\n" if story else "", prompt, text, sep="", flush=True)


def _load(paths: list[Path], class_path: str | None) -> list[Run]:
    """Load runs.

    `class_path` is used for the runs that were trained with a custom class, or for all runs if
    none was.
    """
    from minigpt.runs.folder import Run

    runs = [Run.load(path) for path in paths]
    if class_path is None:
        return runs
    from minigpt.cli.compose import import_class

    model = import_class(class_path, "class_path")
    custom = [run for run in runs if run.config.get("model_class") is not None] or runs
    return [replace(run, model=model) if run in custom else run for run in runs]


def _check_folder(path: Path | None, option: str = "--out") -> None:
    if path is not None and path.exists() and not path.is_dir():
        raise UserError(f"{option} {path} is a file: give an existing or a new folder")


def _standard_input() -> str:
    """Return standard input without the final newline that `echo` adds."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not valid UTF-8 at byte {error.start}") from None
    return text.removesuffix("\n").removesuffix("\r")


@app.command()
def probe(
    run: RunPath,
    near: Annotated[
        list[str] | None, Option(help="Show the tokens nearest to this word; may be repeated.")
    ] = None,
    analogy: Annotated[
        list[str] | None,
        Option(help="Analogy: 'princess - girl + boy'; may be repeated.", metavar="'A - B + C'"),
    ] = None,
    k: Annotated[int, Option(min=1, help="Number of tokens to show.")] = 5,
    out: Annotated[
        Path | None, PathOption(help="Folder for the map; default: the run's, or . for an export.")
    ] = None,
    class_path: ClassPath = None,
) -> None:
    """Explore the embedding: nearest words, analogies, and a map of words as a PNG.

    Without --near and --analogy, twenty analogies are scored.
    """
    from rich.console import Console

    from minigpt.analysis.analogies import ask
    from minigpt.analysis.embedding_map import MAP, FewWordsError, caption, embedding_map, write_map
    from minigpt.analysis.embeddings import EmbeddingProbe, SplitWordError, parse_analogy
    from minigpt.cli.tables import score_line, score_table, word_table

    _check_folder(out)
    analogies = {text: parse_analogy(text) for text in analogy or []}
    (source,) = _load([run], class_path)
    probe = EmbeddingProbe(source.load_model(), source.tokenizer)
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
        layout, path = embedding_map(probe), (out or source.output_dir) / MAP
        write_map(layout, path)
        console.print(f"Wrote {path}. {caption(layout)}", markup=False, highlight=False)
    except FewWordsError as error:  # the tables are useful without a map
        console.print(f"No map: {error}", markup=False, highlight=False)
    if problems:
        raise UserError("; ".join(problems))


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
    allow_training: Annotated[
        bool, Option("--allow-training", help="Allow training on another --host; needs --auth.")
    ] = False,
    class_path: ClassPath = None,
) -> None:
    """Serve a local web page to generate stories, to explore models and to train them.

    With snapshots in a run (callbacks.snapshots=8), a slider shows the model as it grew.
    """
    from minigpt.playground.server import serve
    from minigpt.runs.folder import bundled_release

    serve(_load(runs or [bundled_release()], class_path), host, port, auth, allow_training)


@app.command()
def scaling(
    folders: Annotated[list[Path], PathArgument(help="Run folders, or folders that contain runs.")],
    out: Annotated[Path | None, PathOption(help="Output folder; default: the first input.")] = None,
    keep: Annotated[Path | None, PathOption(help="Copy records of finished runs here.")] = None,
) -> None:
    """Compare runs of several sizes and fit the scaling law L = E + A / N^α.

    Prints the table of runs, and writes scaling.md, scaling.json and three log-log figures.
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
    files = f"Wrote {out / 'scaling.md'}, scaling.json and figures."
    paragraphs = (REFERENCE_NOTE, "\n".join(run_warnings(runs)), "\n".join(laws), files)
    console = Console()
    console.print(rich_table(runs))
    for paragraph in filter(None, paragraphs):
        console.print("", paragraph, sep="\n", markup=False, highlight=False)


@app.command()
def study(
    runs: Annotated[list[Path], PathArgument(help="Runs to compare, of different sizes.")],
    out: Annotated[Path, PathOption(help="Output folder.")] = Path("study"),
    n: Annotated[int, Option(help="Number of stories for each run and temperature.")] = 200,
    seed: Annotated[int, Option(help="Seed of the stories.")] = 1,
    over_time: Annotated[
        bool, Option("--over-time", help="Measure each snapshot of one run instead.")
    ] = False,
    class_path: ClassPath = None,
) -> None:
    """Compare runs by the coherence of their stories, by sample stories and by embeddings.

    Writes coherence.md, samples.md and embeddings.md, with figures and JSON files. With
    --over-time, writes over-time.md with a figure and a JSON file, and embeddings.html.
    """
    _check_folder(out)
    if over_time:
        from minigpt.analysis.over_time import SETTLING, TABLE, OverTimeConfig, write_over_time

        if len(runs) > 1:
            raise UserError(f"--over-time measures one run, not {len(runs)}: name one run")
        settings = OverTimeConfig(n_written=n, seed=seed)
        write_over_time(_load(runs, class_path)[0], out, settings)
        print(f"Wrote {out / TABLE} and {SETTLING}.")
        return
    from minigpt.analysis.study import StudyConfig, write_study

    write_study(_load(runs, class_path), out, StudyConfig(n=n, seed=seed))
    print(f"Wrote {out / 'coherence.md'}, samples.md and embeddings.md.")


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path, PathArgument(help="New folder, or an earlier export to replace.")],
    format: Annotated[Format, Option(help="hf: transformers; safetensors: Mini GPT.")] = "hf",
    dtype: Annotated[Dtype | None, Option(help="For safetensors; by default bfloat16.")] = None,
    license: Annotated[str | None, Option(help="License of the weights, such as mit.")] = None,
    evaluate: Annotated[bool, Option("--evaluate", help="Evaluate the weights if needed.")] = False,
    average: Annotated[bool, Option("--average", help="Average with init_from's weights.")] = False,
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

    config = ExportConfig(format, dtype, evaluate, license, average)
    check_output(out)
    if push is not None:
        check_repository(push, dry_run)
    (source,) = _load([run], class_path)
    files = write(source, out, config, push, console)
    print(f"Wrote {out}: {', '.join(path.name for path in files)}")
    if push is not None and dry_run:
        print(f"Nothing was uploaded to https://huggingface.co/{push}. The files would be:")
        print("\n".join(f"{path.stat().st_size:>12,}  {path.name}" for path in files))
    elif push is not None:
        print(f"Uploaded to {push_folder(out, push, private)}")


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
    """Write a sweep file for wandb sweep, with minigpt train as its command."""
    from minigpt.cli.sweep import write_sweep

    path = write_sweep(name, out or Path(f"{name}.yaml"))
    print(f"Wrote {path}. Next: wandb sweep {shlex.quote(str(path))}")


@app.command()
def doctor(as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False) -> None:
    """Print the facts that a bug report needs, and advice for this machine."""
    import json

    from minigpt.cli.doctor import diagnose

    facts, advice = diagnose()
    if as_json:
        print(json.dumps({"facts": facts, "advice": advice}, indent=2, ensure_ascii=False))
        return
    print("\n".join(f"{topic + ':':12}{fact}" for topic, fact in facts.items()))
    print("\n".join(f"could be better: {line}" for line in advice))


def main() -> None:
    """Run the command line.

    A user error prints one line on stderr and exits with code 2; Ctrl-C exits with code 130.
    """
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
        problem = f"{one_line(error.format_message()).rstrip('.')} (usage: {verb} --help)"
    except OSError as error:
        if error.filename is None:
            raise
        problem = f"cannot read or write {error.filename}: {error.strerror}; give another path"
    leave(problem)


def _options(verb: str) -> frozenset[str]:
    """Return the names of a verb's options, which the user types as --name."""
    command = getattr(typer.main.get_command(app), "commands", {}).get(verb)
    parameters = command.params if command is not None else ()
    return frozenset(p.name for p in parameters if p.param_type_name == "option")


if __name__ == "__main__":
    main()
