"""The `minigpt` command: what to do with runs once they are trained.

Each verb is one function below, which imports what it needs when it is called: `minigpt --help`
must not wait for torch. Training and evaluation are `train.py` and `evaluate.py`.
"""

from __future__ import annotations

import logging
import re
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import typer.core

from minigpt.core.console import show_log
from minigpt.core.settings import UserError, one_line

Format = Literal["hf", "safetensors", "onnx", "gguf"]
Dtype = Literal["float32", "bfloat16"]
log = logging.getLogger("minigpt")
UsageError: Any = typer.BadParameter.__base__  # which typer does not name

app = typer.Typer(
    help="Use and study the story-telling models that train.py makes.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _minigpt() -> None:
    # A group of verbs even while there is one: typer would otherwise drop the verb's name.
    pass


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="A run folder, or a checkpoint file in one.")],
    prompt: Annotated[
        str, typer.Option(help="How the story begins; - reads it from standard input.")
    ] = "Once upon a time",
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among this much mass.")] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Leave out what is less probable than this × the likeliest."),
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: words of prompt and story come back less.")
    ] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="The longest continuation.")] = 256,
    n: Annotated[int, typer.Option(help="How many stories.")] = 1,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same stories.")] = None,
    dtype: Annotated[
        Dtype,
        typer.Option(help="bfloat16 rounds the weights, and is faster for many."),
    ] = "float32",
) -> None:
    """Write stories. One is shown as it is sampled, and stops at its end.

    Several are written together, with <|endoftext|> between them, which is what data=text reads.
    """
    import torch

    from minigpt.core.hardware import cpu_has_bfloat16
    from minigpt.generation.decoder import c_backend
    from minigpt.generation.sampling import SamplingConfig, iterate_stories, stream_text
    from minigpt.runs.folder import Run
    from minigpt.tokenizer import END_OF_TEXT

    sampling = SamplingConfig(
        temperature, top_k, top_p, max_tokens, seed, min_p, repetition_penalty
    )
    filters = {"--top-k": top_k, "--top-p": top_p, "--min-p": min_p}
    _check_generate(temperature, n, [name for name, value in filters.items() if value is not None])
    opened = Run.open(run)
    net, tokenizer = opened.load_net().to(getattr(torch, dtype)), opened.load_tokenizer()
    prompt = _standard_input() if prompt == "-" else prompt
    length = len(tokenizer.encode(prompt))  # refused before anything is shown
    if length >= net.config.context_length:
        log.warning(
            "a prompt of %s tokens outgrows the context of %s: the model reads its end alone",
            f"{length:,}", net.config.context_length,
        )  # fmt: skip
    if dtype == "bfloat16" and c_backend() is None and not cpu_has_bfloat16():
        log.warning("neither decode.c nor native bfloat16 here: --dtype float32 is faster")
    if n == 1:
        print(prompt, end="", flush=True)
        for piece in stream_text(net, tokenizer, prompt, sampling):
            print(piece, end="", flush=True)
        print()
        return
    for story, text in enumerate(iterate_stories(net, tokenizer, prompt, n, sampling)):
        print(f"{END_OF_TEXT}\n" if story else "", prompt, text, sep="", flush=True)


def _check_generate(temperature: float, n: int, filters: list[str]) -> None:
    if n < 1:
        raise UserError(f"--n {n} must be at least 1")
    if temperature == 0 and filters:
        raise UserError(
            f"--temperature 0 always takes the likeliest token: leave out {' and '.join(filters)}, "
            "or take a temperature above 0"
        )
    if temperature == 0 and n > 1:
        raise UserError(
            f"--temperature 0 writes one story only: leave out --n {n}, "
            "or take a temperature above 0"
        )


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


class _AnalogyCommand(typer.core.TyperCommand):
    """Takes an analogy as it is spoken, too: --analogy princess - girl + boy, without quotes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, join_analogies(args))


def join_analogies(args: list[str]) -> list[str]:
    """`args` with the words and signs behind each --analogy as one argument.

    A sign is followed by its word or stands in front of it: `- girl` or `-girl`.
    """
    joined: list[str] = []
    for arg in args:
        behind = len(joined) > 1 and joined[-2] == "--analogy"
        after_sign = behind and re.search(r"[-+−–]$", joined[-1])
        is_sign = re.fullmatch(r"[-+−–]|[+−–]\w+|-(?!h$)\w+", arg)
        if behind and (after_sign or is_sign):
            joined[-1] += f" {arg}"
        else:
            joined.append(arg)
    return joined


@app.command(cls=_AnalogyCommand)
def probe(
    run: Annotated[Path, typer.Argument(help="A run folder, or a checkpoint file in one.")],
    near: Annotated[
        list[str] | None, typer.Option(help="A word whose nearest tokens to show; may be repeated.")
    ] = None,
    analogy: Annotated[
        list[str] | None,
        typer.Option(help="Such as princess - girl + boy; may be repeated.", metavar="A - B + C"),
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="How many tokens to show.")] = 5,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the map goes; without it, into the run (for an export: here)."),
    ] = None,
) -> None:
    """Look into the embedding: nearest words, analogies, and a map of words as a PNG.

    Without --near and --analogy: a score over twenty analogies.
    """
    from rich.console import Console

    from minigpt.analysis.analogies import ask
    from minigpt.analysis.embedding_map import (
        MAP,
        FewWordsError,
        caption,
        embedding_map,
        write_map,
    )
    from minigpt.analysis.embeddings import EmbeddingProbe, SplitWordError, parse_analogy
    from minigpt.cli.tables import score_line, score_table, word_table
    from minigpt.runs.folder import Run

    _check_folder(out)
    asked = {text: parse_analogy(text) for text in analogy or []}
    opened = Run.open(run)
    probe = EmbeddingProbe(opened.load_net(), opened.load_tokenizer())
    looks = {f"Nearest to {word}": partial(probe.neighbours, word, k) for word in near or []}
    looks |= {text: partial(probe.analogy, *words, k) for text, words in asked.items()}
    console, split = Console(), {}
    for title, look in looks.items():
        try:
            console.print(word_table(title, look()))
        except SplitWordError as error:
            split[str(error)] = None  # once, though asked twice
    if not near and not asked:
        answers = ask(probe)
        console.print(score_table(answers), score_line(answers), sep="\n")
    try:
        found, path = embedding_map(probe), (out or opened.place) / MAP
        write_map(found, path)
        console.print(f"Wrote {path}. {caption(found)}", markup=False, highlight=False)
    except FewWordsError as error:  # the tables stand without it
        console.print(f"No map: {error}", markup=False, highlight=False)
    if split:
        raise UserError("; ".join(split))


@app.command()
def playground(
    runs: Annotated[
        list[Path], typer.Argument(help="One to four run folders or checkpoints, side by side.")
    ],
    host: Annotated[
        str, typer.Option(help="Where to listen; the default is this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Without it, the first free one from 7860 on."),
    ] = None,
    auth: Annotated[
        str | None, typer.Option(help="Who may come in.", metavar="USER:PASSWORD")
    ] = None,
) -> None:
    """Open a local web page: stories token by token, words, a map, attention."""
    from minigpt.playground.answers import Playground
    from minigpt.playground.server import read_auth, require_gradio, serve

    require_gradio()
    who = read_auth(auth)
    serve(Playground.load(runs), host, port, who)


@app.command()
def scaling(
    folders: Annotated[
        list[Path], typer.Argument(help="Run folders, or folders with runs somewhere below them.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write; without it, into the first folder given."),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(help="Copy what is read of the finished runs here: small, for a repository."),
    ] = None,
) -> None:
    """Compare runs by size: tables, L = E + A / N^α fitted, and three log-log figures.

    Writes scaling.md, scaling.json and the figures, and prints the table of runs.
    """
    from rich.console import Console

    from minigpt.scaling.results import find_runs, keep_run, read_run
    from minigpt.scaling.study import write_scaling
    from minigpt.scaling.tables import notes, rich_table

    _check_folder(out)
    _check_folder(keep, "--keep")
    runs = [read_run(folder) for folder in find_runs(folders)]
    if keep is not None:
        for run in runs:
            if run.point:
                keep_run(run.path, keep)
    out = out or (folders[0] if folders[0].is_dir() else runs[0].path)
    lines = write_scaling(runs, out)
    console = Console()
    console.print(rich_table(runs), "", notes(runs), sep="\n", markup=False, highlight=False)
    for line in lines:
        said = f"{line.label}: {line.verdict}" if line.fits else line.no_fit
        console.print("", said, sep="\n", markup=False, highlight=False)
    console.print("", f"Wrote {out / 'scaling.md'}, scaling.json and figures.", markup=False)


@app.command()
def study(
    runs: Annotated[list[Path], typer.Argument(help="The runs to compare, of different sizes.")],
    out: Annotated[Path, typer.Option(help="Where to write.")] = Path("study"),
    n: Annotated[int, typer.Option(help="Stories of each run at each temperature.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the stories.")] = 1,
) -> None:
    """Compare what runs write and know: coherence by temperature, samples, embeddings.

    Writes coherence.md, samples.md and embeddings.md, with their figure and JSON.
    """
    from minigpt.analysis.study import StudyConfig, write_study
    from minigpt.runs.folder import Run

    _check_folder(out)
    write_study([Run.open(run) for run in runs], out, StudyConfig(n=n, seed=seed))
    print(f"Wrote {out / 'coherence.md'}, samples.md and embeddings.md.")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder, or a checkpoint file in one.")],
    out: Annotated[Path, typer.Argument(help="A new folder, or an earlier export to replace.")],
    format: Annotated[
        Format,
        typer.Option(help="hf: for transformers. safetensors: for this project. onnx, gguf."),
    ] = "hf",
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of the weights in safetensors: bfloat16 unless you ask for float32."),
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Of the weights, for the model card: mit, cc-by-4.0, ...")
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Measure the exported weights if nobody has yet.")
    ] = False,
    average: Annotated[
        bool, typer.Option("--average", help="Of a run with init_from: the mean with that run.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(help="Send it to the Hugging Face Hub as this user/name.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push: a new repository only you can see.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --push: list what would be sent, send nothing.")
    ] = False,
) -> None:
    """Write a model for other programs, with a model card; nothing is sent without --push."""
    if dry_run and push is None:
        raise UserError("--dry-run lists what --push would send: add --push user/name")
    if private and push is None:
        raise UserError("--private is for what --push makes: add --push user/name")
    from minigpt.core.console import console
    from minigpt.exporting.export import ExportConfig, check_place
    from minigpt.exporting.export import export as write
    from minigpt.exporting.hub import check_repository, listing
    from minigpt.exporting.hub import push as send
    from minigpt.runs.folder import Run

    config = ExportConfig(format, dtype, evaluate, license, average)
    check_place(out)
    if push is not None:
        check_repository(push, dry_run)
    files = write(Run.open(run), out, config, push, console)
    print(f"Wrote {out}: {', '.join(path.name for path in files)}")
    if push is not None and dry_run:
        print(f"Nothing was sent. Without --dry-run this would be:\n{listing(push, files)}")
    elif push is not None:
        print(f"Sent to {send(out, push, files, private)}")


def main() -> None:
    """Entry point: a mistake is one line on stderr and exit code 2, ctrl-C a quiet 130."""
    show_log()
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        sys.exit(app(standalone_mode=False))
    except UserError as error:
        problem = one_line(error)
    except UsageError as error:
        verb = error.ctx.command_path if error.ctx else "minigpt"
        problem = f"{one_line(error.format_message()).rstrip('.')}; {verb} --help shows what is"
    except OSError as error:
        if error.filename is None:
            raise
        problem = f"cannot read or write {error.filename}: {error.strerror}; give another place"
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
