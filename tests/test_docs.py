"""The documentation site: it builds strictly, needs no other server, and says a thing once."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

PAGES = sorted(path for path in ROOT.glob("docs/*.md") if path.name != "LOG.md")
README = ROOT / "README.md"


class Resources(HTMLParser):
    """Collect what a page loads by itself: scripts, style sheets, images, frames."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}
        self.urls += [value for name, value in attrs if value and name == names.get(tag)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does, into a folder of the test."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_site_loads_nothing_from_another_server(site: Path):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        reader = Resources()
        reader.feed(page.read_text(encoding="utf-8"))
        assert reader.urls, page
        assert not [url for url in reader.urls if re.match(r"(https?:)?//", url)], page
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", path.read_text()), path


def test_settings_page_has_every_field_with_its_meaning(site: Path):
    page = (site / "settings.html").read_text(encoding="utf-8")
    for name in ("model.d_model", "data.batch_size", "optimizer.lr", "seed", "stories.n", "top_k"):
        assert f"<code>{name}</code>" in page
    cells = re.findall(r"<td><code>(\w+(?:\.\w+)?)</code></td>\s*<td>.*?</td>\s*"
                       r"<td>.*?</td>\s*<td>(.*?)</td>", page)  # fmt: skip
    assert len(cells) > 60
    cells += re.findall(r"<td><code>(\w+=\w+)</code></td>\s*<td>(.*?)</td>", page)
    assert not [name for name, meaning in cells if not meaning]


def test_home_page_of_the_site_is_the_readme(site: Path):
    home = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="start.html"' in home
    assert 'src="images/playground.png"' in home
    assert "docs/" not in re.sub(r"<code>.*?</code>", "", home, flags=re.DOTALL)


def test_pages_of_the_library_name_every_public_object(site: Path):
    import minigpt

    page = (site / "api.html").read_text(encoding="utf-8")
    for name in minigpt.__all__:
        if name != "__version__":
            assert re.search(rf'id="minigpt\.([\w.]+\.)?{name}"', page), name


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
    assert len(perplexities) == 8
    for number in perplexities:
        for path in [README, *PAGES]:
            count = len(re.findall(rf"(?<![\d.]){number}(?!\d)", path.read_text("utf-8")))
            assert count == (path == README), f"{number} in {path.name}"


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
    assert {".txt", ".md", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"} == set(endings)
