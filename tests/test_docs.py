"""The documentation site: it builds strictly, needs no other server, and says a thing once."""

import re
from pathlib import Path

import pytest
import yaml

from minigpt.data.formats import _OPENERS, KINDS
from minigpt.scaling.fit import run_groups
from minigpt.scaling.results import find_runs, read_run
from tests.conftest import ROOT

PAGES = sorted(path for path in ROOT.glob("docs/*.md") if path.name != "LOG.md")
README = ROOT / "README.md"


def test_subclass_of_the_architecture_page_trains(tiny: list[str], tmp_path: Path, monkeypatch):
    import minigpt

    page = (ROOT / "docs/your-own-architecture.md").read_text(encoding="utf-8")
    module, example = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "mymodel.py").write_text(module, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    from mymodel import PowerGPT  # type: ignore[import-not-found]

    overrides = re.findall(r"\[(.*?)\]", example)[0]
    names = {"minigpt": minigpt, "PowerGPT": PowerGPT}
    exec(example.replace(overrides, f"{overrides}, *{[*tiny, 'name=power']!r}"), names)
    run = names["run"]
    assert run.config["model"]["power"] == 2
    assert type(run.load_model()) is PowerGPT


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load(re.sub(r"!!\S+", "", (ROOT / "mkdocs.yml").read_text()))["nav"]
    listed = re.findall(r"[\w/.-]+\.md", str(nav))
    assert len(set(listed)) == len(listed)
    assert {path.name for path in ROOT.glob("docs/*.md")} <= set(listed)
    for path in ROOT.glob("examples/*.ipynb"):
        assert f"examples/{path.stem}.md" in listed


def paragraphs(path: Path) -> set[str]:
    """The paragraphs, rows and blocks of a page that say something, of eight words or more."""
    text = path.read_text(encoding="utf-8")
    pieces = re.split(r"\n\s*\n|\n(?=- |\| )", text)
    lines = {" ".join(piece.split()).lstrip("-| ") for piece in pieces}
    return {line for line in lines if len(line.split()) >= 8}


def test_pages_do_not_repeat_each_other():
    first: dict[str, str] = {}
    for path in [README, *PAGES]:
        for text in paragraphs(path):
            assert text not in first, f"{path.name} repeats {first.get(text)}: {text}"
            first[text] = path.name


def test_numbers_of_results_stand_once():
    rows = re.findall(r"^\| (?:small|medium|large), .*", README.read_text("utf-8"), re.MULTILINE)
    perplexities = [re.findall(r"\d+\.\d\d\b", row.split("|")[3])[0] for row in rows]
    assert len(perplexities) == 12
    for number in perplexities:
        for path in [README, *PAGES]:
            count = len(re.findall(rf"(?<![\d.]){number}(?!\d)", path.read_text("utf-8")))
            assert count == (path == README), f"{number} in {path.name}"


def test_scaling_law_on_the_page_is_that_of_the_kept_runs():
    page = (ROOT / "docs/sweeps.md").read_text("utf-8").split("## The law")[1].split("\n## ")[0]
    runs = [read_run(path) for path in find_runs([ROOT / "docs/results/runs"])]
    (study,) = run_groups(runs, replicates=2)
    (error,) = re.findall(r"predicts the loss within (\S+) nats", page)
    assert len(study.sizes) == 8
    assert len(study.predictions) == 4
    assert all(abs(p.measured - p.predicted) <= float(error) for p in study.predictions)
    gains = dict(re.findall(r"(small|medium|large) by (\d\.\d\d)", page))
    assert len(gains) == 3
    for size in study.sizes:
        if size.model in gains:
            released = read_run(ROOT / "releases" / size.model).loss
            assert size.loss
            assert released
            assert f"{size.loss - released:.2f}" == gains[size.model]
    (millions,) = re.findall(r"a model with (\S+)M parameters", page)
    law, small = study.fits["parameters"], read_run(ROOT / "releases/small")
    assert law.loss(float(millions) * 1e6) == pytest.approx(small.loss, abs=2e-3)


def test_log_says_which_findings_hold():
    log = (ROOT / "docs/LOG.md").read_text(encoding="utf-8")
    head = log.split("\n## ")[1]
    rows = [row.split(" | ") for row in re.findall(r"^\| (.*) \|$", head, re.MULTILINE)]
    dates = set(re.findall(r"^## (\d{4}-\d\d-\d\d)$", log, re.MULTILINE))
    findings = [row for row in rows if len(row) == 3 and row[1] in dates]
    assert len(findings) >= 20
    assert dates - {row[1] for row in findings} <= {max(dates)}


def test_formats_are_listed_once_each():
    page = (ROOT / "docs/your-own-text.md").read_text(encoding="utf-8")
    table = page.split("## Formats")[1].split("\n##")[0]
    endings = re.findall(r"`(\.\w+)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))
    assert sorted(endings) == sorted(set(endings))
    assert set(endings) == set(KINDS)
    packings = re.search(r"may be compressed with .*?\n", page)
    assert packings is not None
    assert set(re.findall(r"`(\.\w+)`", page[packings.start() :].split(" to the name")[0])) == set(
        _OPENERS
    )


def test_every_test_that_the_reliability_page_names_exists():
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    files = {path.name: path.read_text("utf-8") for path in ROOT.glob("tests/**/test_*.py")}
    promises = page.split("## What you can rely on")[1].split("\n## ")[0]
    names = re.findall(r"`(test_\w+)`(?: in `tests/\S*?(\w+\.py)`)?", page)
    for name, file in names:
        default = "test_surroundings.py" if f"`{name}`" in promises else ""
        texts = [text for key, text in files.items() if key == (file or default or key)]
        assert any(f"\ndef {name}(" in text for text in texts), name
    assert len(names) >= 25
    for path in re.findall(r"`(?:tests/\S*?)?(test_\w+\.py)`", page):
        assert path in files, path
    for section in (promises, page.split("\n## Surroundings")[1].split("\n## ")[0]):
        rows = re.findall(r"^\| (.*) \|$", section, re.MULTILINE)[2:]
        assert len(rows) >= 10
        assert all("`test" in row.rpartition(" | ")[2] for row in rows)
