"""Pages that mkdocs generates: the home page, the notebooks and the table of every setting."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import sys
import typing
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the files of the site."""
    add(files, config, "index.md", (ROOT / "README.md").read_text(encoding="utf-8"))
    add(files, config, "settings.md", settings_page())
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        text, images = notebook_page(path)
        add(files, config, f"examples/{path.stem}.md", text)
        for name, content in images.items():
            add(files, config, f"examples/{name}", content)
    return files


def add(files: Files, config: MkDocsConfig, uri: str, content: str | bytes) -> None:
    """Add a generated file at `uri`, its path below docs/, instead of a file that is there."""
    if (there := files.get_file_from_path(uri)) is not None:
        files.remove(there)
    files.append(File.generated(config, uri, content=content))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make the links of the repository links of the site.

    A link to a page of docs/ or to the README becomes one between pages. A link to another file of
    the repository leads to `repo_url` if mkdocs.yml has it; else only its text stays.
    """
    home = page.file.src_uri == "index.md"
    folder = ROOT if home else (ROOT / "docs" / page.file.src_uri).parent

    def replace(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or ":" in target:
            return match[0]
        full = (folder / path).resolve()
        suffix = f"#{anchor}" if anchor else ""
        depth = "../" * page.file.src_uri.count("/")
        if full == ROOT / "README.md":
            return f"[{text}]({depth}index.md{suffix})"
        if full.suffix == ".ipynb" and full.parent == ROOT / "examples":
            return f"[{text}]({depth}examples/{full.stem}.md)"
        if not full.is_relative_to(ROOT) or not full.exists():
            return match[0]
        if full.is_relative_to(ROOT / "docs") and full.is_file() and full.suffix != ".json":
            return f"[{text}]({depth}{full.relative_to(ROOT / 'docs').as_posix()}{suffix})"
        if config.repo_url:
            url = f"{config.repo_url.rstrip('/')}/blob/main/{full.relative_to(ROOT).as_posix()}"
            return f"[{text}]({url}{suffix})"
        return text

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [LINK.sub(replace, part) for part in parts[::2]]
    return "".join(parts)


# ---------------------------------------------------------------------------- notebooks


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook with its stored outputs as Markdown, and its images by file name."""
    import nbformat
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(path, as_version=4)
    text, resources = MarkdownExporter().from_notebook_node(
        notebook, {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
    )
    title, _, rest = text.partition("\n\n")
    note = f"*This page is the notebook examples/{path.name}, with its stored outputs.*"
    return f"{title}\n\n{note}\n\n{rest}", resources["outputs"]


# ---------------------------------------------------------------------------- every setting


def settings_page() -> str:
    """Return the page of every setting, from the sentence under each field."""
    from minigpt.evaluation import EvaluationConfig
    from minigpt.exporting.config import ExportConfig
    from minigpt.generation.sampling import SamplingConfig
    from minigpt.training.config import TrainConfig

    parts = [
        "# Every setting",
        "Type a setting as `key=value` after `python train.py` or `python evaluate.py`, or give it "
        "to `minigpt.load_config` in its list. The sentences are those of the dataclasses, so "
        "`help(minigpt.TrainConfig)` shows them as well.",
        "## Groups",
        "An option of a group sets several settings at once, as in `model=large`. Experiments also "
        "choose options of other groups.",
        group_table(),
        "## Training",
        *section(TrainConfig, ""),
        "## Evaluation",
        *section(EvaluationConfig, ""),
        "## Sampling",
        "Arguments of `minigpt.SamplingConfig`; `minigpt generate` has an option for each but the "
        "backend, such as `--top-k`.",
        *section(SamplingConfig, ""),
        "## Export",
        "Arguments of `minigpt.ExportConfig`, and options of `minigpt export`.",
        *section(ExportConfig, ""),
    ]
    return "\n\n".join(parts) + "\n"


def group_table() -> str:
    """Return the options of conf/ with the first comment of each file."""
    rows = ["| option | what it sets |", "|---|---|"]
    for path in sorted((ROOT / "conf").glob("*/*.yaml")):
        if path.parent.name == "local":
            continue
        text = path.read_text(encoding="utf-8").removeprefix("# @package _global_\n")
        comment = re.search(r"#(.*(?:\n#.*)*)", text)
        meaning = comment[1].replace("\n#", " ") if comment else ""
        rows.append(f"| `{path.parent.name}={path.stem}` | {cell(meaning)} |")
    return "\n".join(rows)


def section(cls: type, prefix: str) -> list[str]:
    """Return the table of the fields of `cls`, then one for each field that is a dataclass."""
    from minigpt.core.fields import field_docs

    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    rows, nested = ["| setting | type | default | meaning |", "|---|---|---|---|"], []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        hint = hints[field.name]
        inner = [t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)]
        if inner and field.default is dataclasses.MISSING:
            nested += [f"### {prefix}{field.name}", *section(inner[0], f"{prefix}{field.name}.")]
            continue
        name = f"`{prefix}{field.name}`"
        meaning = cell(docs.get(field.name, ""))
        rows.append(f"| {name} | {cell(type_name(hint))} | {default(field)} | {meaning} |")
    return ["\n".join(rows), *nested]


def default(field: dataclasses.Field[Any]) -> str:
    """Return the default of a field as Markdown."""
    if field.default is dataclasses.MISSING:
        return ""
    value = field.default
    return code(json.dumps(value, ensure_ascii=False) if isinstance(value, tuple) else str(value))


def type_name(hint: Any) -> str:
    """Return a type as a reader writes it: `int | None`, or the choices of a Literal."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(map(str, typing.get_args(hint)))
    if args := typing.get_args(hint):
        if typing.get_origin(hint) is tuple:
            return f"list of {type_name(args[0])}"
        return " or ".join(type_name(arg) for arg in args)
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def cell(text: str) -> str:
    """Return `text` for a cell of a table: one line, in which nothing but backticks is markup."""
    parts = " ".join(text.split()).split("`")
    parts[::2] = [html.escape(part, quote=False).replace("|", "&#124;") for part in parts[::2]]
    parts[1::2] = [code(part) for part in parts[1::2]]
    return "".join(parts)


def code(text: str) -> str:
    """Return `text` as code in a cell of a table, where backticks do not protect a bar."""
    return f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>"
