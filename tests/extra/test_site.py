"""The built documentation site: it needs no other server, and has every setting and object."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

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
