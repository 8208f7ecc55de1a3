"""The verbs (subcommands) of `minigpt` that study runs: probe, scaling, compare and study.

`minigpt.cli.app` registers these functions. Each function imports the modules that it needs only
when it is called.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Option

from minigpt.cli.arguments import (
    ClassPath,
    PathArgument,
    PathOption,
    RunPath,
    check_folder,
    load_runs,
)
from minigpt.core.settings import UserError, flat, plain_defaults
from minigpt.runs.names import REPORT


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

    Without --near and --analogy, a fixed list of twenty analogies is scored.
    """
    from rich.console import Console

    from minigpt.analysis.analogies import ask
    from minigpt.analysis.embedding_map import MAP, FewWordsError, caption, embedding_map, write_map
    from minigpt.analysis.embeddings import EmbeddingProbe, SplitWordError, parse_analogy
    from minigpt.cli.tables import score_line, score_table, word_table

    check_folder(out)
    near, analogies = near or [], {text: parse_analogy(text) for text in analogy or []}
    (source,) = load_runs([run], class_path)
    probe = EmbeddingProbe(source.load_model(), source.tokenizer)
    queries = {f"Nearest to {word}": partial(probe.neighbours, word, k) for word in near}
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

    check_folder(out)
    check_folder(keep, "--keep")
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


def compare(
    folders: Annotated[list[Path], PathArgument(help="Run folders, or folders that contain runs.")],
    out: Annotated[Path | None, PathOption(help="Write the table to this Markdown file.")] = None,
) -> None:
    """Compare recipes (settings without the seed) by the validation losses of runs.

    Runs that differ only in their seed have the same recipe. Each recipe is
    compared with the recipe of the first run: the table lists the mean difference
    of the losses over the common seeds, and the standard error of this mean.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from minigpt.core.files import write_text
    from minigpt.scaling.comparison import COLUMNS, NOTE, cells, markdown
    from minigpt.scaling.comparison import compare as compare_recipes
    from minigpt.scaling.results import find_runs, read_run
    from minigpt.training.config import TrainConfig

    runs = [read_run(folder) for folder in find_runs(folders)]
    comparisons = compare_recipes(runs, flat(plain_defaults(TrainConfig)))
    table = Table(*COLUMNS, box=None, pad_edge=False, header_style="bold")
    for comparison in comparisons:
        table.add_row(*(Text(cell, overflow="fold") for cell in cells(comparison)))
    console = Console()
    console.print(table)
    console.print("", NOTE, sep="\n", markup=False, highlight=False)
    if out is not None:
        write_text(out, markdown(comparisons))


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

    Writes coherence.md, samples.md and embeddings.md, with figures and JSON files.
    With --over-time, writes these files instead: over-time.md, a figure, a JSON file
    and embeddings.html. If --out is the folder of the run, its report.html then shows
    the figure and the tables.
    """
    check_folder(out)
    if over_time:
        from minigpt.analysis.over_time import OverTimeConfig, write_over_time

        if len(runs) > 1:
            raise UserError(f"--over-time measures one run, not {len(runs)}: give only one")
        settings = OverTimeConfig(n=n, seed=seed)
        (run,) = load_runs(runs, class_path)
        files = write_over_time(run, out, settings)
        if out.resolve() == run.folder.resolve() and (report := run.folder / REPORT).is_file():
            from minigpt.training.report import write_report

            write_report(run.folder)
            files.append(report)
        print(f"Wrote {out}: {', '.join(path.name for path in files)}")
        return
    from minigpt.analysis.study import StudyConfig, write_study

    write_study(load_runs(runs, class_path), out, StudyConfig(n=n, seed=seed))
    print(f"Wrote {out / 'coherence.md'}, samples.md and embeddings.md.")
