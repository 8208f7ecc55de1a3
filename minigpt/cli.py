"""The `minigpt` command: what to do with runs once they are trained.

Each verb is one function below, which imports what it needs when it is called: `minigpt --help`
must not wait for torch. Training and evaluation are `train.py` and `evaluate.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from minigpt.config import UserError
from minigpt.console import show_log

Format = Literal["hf", "safetensors", "onnx", "gguf"]
Dtype = Literal["float32", "bfloat16"]

app = typer.Typer(
    help="Use and study the story-telling models that train.py makes.",
    no_args_is_help=True,
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
    prompt: Annotated[str, typer.Option(help="How the story begins.")] = "Once upon a time",
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among this much mass.")] = None,
    max_tokens: Annotated[int, typer.Option(help="The longest continuation.")] = 256,
    n: Annotated[int, typer.Option(min=1, help="How many stories.")] = 1,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same stories.")] = None,
) -> None:
    """Write stories, shown as they are sampled."""
    from minigpt.generation import SamplingConfig, stream_text
    from minigpt.runs import Run

    opened = Run.open(run)
    net, tokenizer = opened.load_net(), opened.load_tokenizer()
    for story in range(n):
        story_seed = None if seed is None else seed + story
        sampling = SamplingConfig(temperature, top_k, top_p, max_tokens, story_seed)
        print(prompt, end="", flush=True)
        for piece in stream_text(net, tokenizer, prompt, sampling):
            print(piece, end="", flush=True)
        print("\n" if story < n - 1 else "")


@app.command()
def scaling(
    folders: Annotated[
        list[Path], typer.Argument(help="Run folders, or folders with runs somewhere below them.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write; without it, into the first folder given."),
    ] = None,
) -> None:
    """Compare runs by size: a table, and a log-log figure of perplexity against parameters.

    Writes scaling.md, scaling.png and scaling.json, and prints the table.
    """
    from rich.console import Console

    from minigpt.scaling import find_runs, notes, read_run, rich_table, write_scaling

    runs = [read_run(folder) for folder in find_runs(folders)]
    out = out or folders[0]
    write_scaling(runs, out)
    console = Console()
    console.print(rich_table(runs), "", notes(runs), sep="\n", markup=False, highlight=False)
    console.print(f"Wrote {out / 'scaling.md'}, scaling.json and scaling.png.", markup=False)


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
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Measure the exported weights if nobody has yet.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(help="Send it to the Hugging Face Hub as this user/name.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --push: list what would be sent, send nothing.")
    ] = False,
) -> None:
    """Write a model for other programs, with a model card; nothing is sent without --push."""
    if dry_run and push is None:
        raise UserError("--dry-run lists what --push would send: add --push user/name")
    from minigpt.console import console
    from minigpt.export import ExportConfig, check_place
    from minigpt.export import export as write
    from minigpt.publish import check_repository, listing
    from minigpt.publish import push as send
    from minigpt.runs import Run

    config = ExportConfig(format, dtype, evaluate)
    check_place(out)
    if push is not None:
        check_repository(push, dry_run)
    files = write(Run.open(run), out, config, push, console)
    print(f"Wrote {out}: {', '.join(path.name for path in files)}")
    if push is not None and dry_run:
        print(f"Nothing was sent. Without --dry-run this would be:\n{listing(push, files)}")
    elif push is not None:
        print(f"Sent to {send(out, push, files)}")


def main() -> None:
    """Entry point: a UserError is one line on stderr and exit code 2, ctrl-C a quiet 130."""
    show_log()
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
