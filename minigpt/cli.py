"""The `minigpt` command: what to do with runs once they are trained.

Each verb is one function below, which imports what it needs when it is called: `minigpt --help`
must not wait for torch. Training and evaluation are `train.py` and `evaluate.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from minigpt.config import UserError
from minigpt.console import show_log

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
    keep: Annotated[
        Path | None,
        typer.Option(help="Copy what is read of the finished runs here: small, for a repository."),
    ] = None,
) -> None:
    """Compare runs by size: tables, L = E + A / N^α fitted, and three log-log figures.

    Writes scaling.md, scaling.json and the figures, and prints the table of runs.
    """
    from rich.console import Console

    from minigpt.scaling import write_scaling
    from minigpt.scaling_runs import find_runs, keep_run, read_run
    from minigpt.scaling_tables import notes, rich_table

    runs = [read_run(folder) for folder in find_runs(folders)]
    if keep is not None:
        for run in runs:
            if run.point:
                keep_run(run.path, keep)
    out = out or folders[0]
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
    from minigpt.runs import Run
    from minigpt.study import StudyConfig, write_study

    write_study([Run.open(run) for run in runs], out, StudyConfig(n=n, seed=seed))
    print(f"Wrote {out / 'coherence.md'}, samples.md and embeddings.md.")


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
