"""Tests of the playground in a browser: Debian's Chromium, driven by Playwright."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import ConsoleMessage, Page, expect, sync_playwright

from minigpt.exporting.space import write_space
from minigpt.playground.training import SNAPSHOTS
from minigpt.runs.folder import Run
from tests.extra.conftest import Served, page_of

SECONDS = 1000  # Playwright counts in milliseconds
pytestmark = pytest.mark.timeout(300)


class Visitor:
    """A page, with the errors on its console and the hosts of its requests."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        self.hosts: set[str | None] = set()
        page.on("console", self._note_error)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self._note_host(request.url))

    def _note_error(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def _note_host(self, url: str) -> None:
        if not url.startswith(("data:", "blob:")):
            self.hosts.add(urlsplit(url).hostname)


@pytest.fixture
def visitor(served: Served) -> Iterator[Visitor]:
    with visit(served, width=1280) as visitor:
        yield visitor


@pytest.fixture
def phone(guarded: Served) -> Iterator[Visitor]:
    """A small screen that shows the page with a login."""
    with visit(guarded, width=390) as visitor:
        yield visitor


@contextlib.contextmanager
def visit(served: Served, width: int, url: str | None = None) -> Iterator[Visitor]:
    chromium = shutil.which("chromium")
    assert chromium, "chromium is not installed: make test-browser does it as root"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(60 * SECONDS)
        expect.set_options(timeout=60 * SECONDS)
        visitor = Visitor(page)
        page.goto(url or served.url)
        yield visitor
        browser.close()
    assert visitor.errors == []
    assert visitor.hosts == {"127.0.0.1"}
    assert served.reached_out() == ""


# Records the number of tokens on the page at each change.
WATCH_GROWTH = """() => {
    window.growth = [];
    new MutationObserver(() => {
        const n = document.querySelectorAll(".story .token").length;
        if (n > 0 && n !== window.growth.at(-1)) window.growth.push(n);
    }).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""


def wild_story(page: Page) -> list[int]:
    """Write a story on a fresh page; return the numbers of tokens on the page while it grew."""
    page.reload()
    page.get_by_label("Prompt").fill("One day, Tom <b>saw</b> a dog")
    slider = page.get_by_label("number input for Temperature")
    slider.fill("2")  # so random that the story hardly ever ends
    slider.press("Enter")
    page.get_by_label("number input for Maximum length (tokens)").fill("300")
    page.evaluate(WATCH_GROWTH)
    page.get_by_role("button", name="Write").click()
    expect(page.locator(".story .note")).to_be_visible()  # how it ended
    return page.evaluate("window.growth")


def test_story_grows_token_by_token_and_a_token_shows_its_alternatives(visitor: Visitor):
    page = visitor.page
    story = page.locator(".story")
    tokens = story.locator(".token")
    growth = wild_story(page)
    for _ in range(4):  # the seed is random: one story in two hundred ends at once
        if tokens.count() < 5:
            growth = wild_story(page)
    assert growth == sorted(growth)
    assert 0 < growth[0] < tokens.count()  # it was shown before it was complete
    expect(story.locator(".prompt")).to_have_text("One day, Tom <b>saw</b> a dog")

    panel = page.locator("#token-panel")
    expect(panel).to_be_hidden()
    tokens.nth(3).hover()
    expect(panel).to_be_visible()
    assert panel.locator(".row").count() in (5, 6)
    assert re.search(r"\d %", panel.inner_text())
    page.get_by_role("heading", name="Mini GPT playground").hover()
    expect(panel).to_be_hidden()
    tokens.nth(4).click()
    expect(panel).to_be_visible()


def test_temperature_zero_writes_the_same_story_twice(visitor: Visitor):
    page = visitor.page
    story, texts = page.locator(".story"), []
    for name, value in (("Temperature", "0"), ("Maximum length (tokens)", "20")):
        page.get_by_label(f"number input for {name}").fill(value)
    for _ in range(2):
        page.get_by_role("button", name="Write").click()
        expect(story.locator(".note")).to_be_visible()
        texts.append(story.locator(".token").all_inner_texts())
        page.get_by_label("Prompt").fill(" ")
        page.get_by_role("button", name="Write").click()
        expect(story.locator(".error")).to_contain_text("type")
        page.get_by_label("Prompt").fill("Once upon a time, there was a dog")
    assert texts[0] == texts[1]


def test_age_slider_shows_younger_models_in_the_open_tab(visitor: Visitor):
    page = visitor.page
    for name, value in (("Temperature", "0"), ("Maximum length (tokens)", "20")):
        page.get_by_label(f"number input for {name}").fill(value)
    page.get_by_role("button", name="Write").click()
    tokens, note = page.locator(".story .token"), page.locator(".story .note")
    expect(note).to_be_visible()
    old, age = tokens.all_inner_texts(), page.get_by_label("number input for Age")
    end = str(SNAPSHOTS)  # the page can train models with so many
    assert age.input_value() == end
    age.fill("0")
    age.press("Enter")
    expect(page.locator("#age figcaption")).to_contain_text("after 0 tokens")
    page.wait_for_function(
        """old => {
            const tokens = [...document.querySelectorAll(".story .token")];
            return tokens.length && tokens.some((token, i) => token.innerText !== old[i]);
        }""",
        arg=old,
    )
    page.get_by_role("button", name="Play").click()
    expect(age).to_have_value(end, timeout=60 * SECONDS)
    parts = {"Words": "#neighbours", "Layers": "#lens", "Attention": "#scores"}
    for (tab, part), value in zip(parts.items(), ("0", end, "0"), strict=True):
        page.get_by_role("tab", name=tab).click()
        expect(page.locator(f"{part} td").first).to_be_visible()
        before = [part, page.locator(part).inner_text()]
        age.fill(value)
        age.press("Enter")
        page.wait_for_function(
            "([part, text]) => document.querySelector(part).innerText !== text", arg=before
        )


def test_story_and_its_title_have_the_age_that_was_chosen_in_another_tab(visitor: Visitor):
    page = visitor.page
    for name, value in (("Temperature", "0"), ("Maximum length (tokens)", "20")):
        page.get_by_label(f"number input for {name}").fill(value)
    page.get_by_role("button", name="Write").click()
    tokens = page.locator(".story .token")
    expect(page.locator(".story .note")).to_be_visible()
    old = tokens.all_inner_texts()
    page.get_by_role("tab", name="Words").click()
    age = page.get_by_label("number input for Age")
    age.fill("0")
    age.press("Enter")
    expect(page.locator("#age figcaption")).to_contain_text("after 0 tokens")
    page.get_by_role("tab", name="Story").click()
    expect(page.locator("#tab-story").get_by_text("after 0 tokens")).to_be_visible()
    page.wait_for_function(
        """old => {
            const tokens = [...document.querySelectorAll(".story .token")];
            return tokens.length && tokens.some((token, i) => token.innerText !== old[i]);
        }""",
        arg=old,
    )


def test_stop_button_ends_the_story(visitor: Visitor):
    page = visitor.page
    length = page.get_by_label("number input for Maximum length (tokens)")
    length.fill("400")
    length.press("Enter")
    page.get_by_role("button", name="Write").click()
    tokens = page.locator(".story .token")
    expect(tokens.first).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    page.wait_for_timeout(1 * SECONDS)
    n = tokens.count()
    page.wait_for_timeout(1 * SECONDS)
    assert tokens.count() == n
    page.get_by_role("button", name="Write").click()  # another can start
    expect(page.locator(".story .note")).to_be_visible()


def test_neighbours_and_analogies_follow_typing_and_report_errors(visitor: Visitor):
    page = visitor.page
    page.get_by_role("tab", name="Words").click()
    rows = page.locator("#neighbours tr")
    expect(rows).to_have_count(8)
    before = page.locator("#neighbours").inner_html()
    page.get_by_label("Words nearest to").fill("mom")
    page.wait_for_function(
        "before => document.querySelector('#neighbours').innerHTML !== before", arg=before
    )
    expect(rows).to_have_count(8)
    page.get_by_label("Words nearest to").press_sequentially("<i>")
    expect(page.locator("#neighbours .error")).to_contain_text("mom<i>")
    page.get_by_label("Analogy").fill("his - he")
    expect(page.locator("#answers .error")).to_contain_text("his - he")
    page.get_by_label("Analogy").press_sequentially(" + she")
    expect(page.locator("#answers tr")).to_have_count(8)


def test_map_shows_both_clusters(visitor: Visitor):
    page = visitor.page
    page.get_by_role("tab", name="Map").click()
    for text in ("family roles", "activities", "mom", "play"):
        expect(page.locator(".map svg text").get_by_text(text, exact=True)).to_be_visible()


def test_attention_follows_head_and_pointer(visitor: Visitor):
    page = visitor.page
    page.get_by_role("tab", name="Attention").click()
    page.get_by_label("Text").fill("The dog saw the cat!")
    tokens, cells = page.locator("#attention .token"), page.locator("#attention rect[x]")
    expect(tokens.last).to_have_text("!")
    n = tokens.count()
    assert page.locator("#attention rect title").count() == n * (n + 1) // 2
    before = cells.evaluate_all("cells => cells.map((cell) => cell.style.fillOpacity)")
    head = page.get_by_label("number input for Head")
    head.fill("3")
    head.press("Enter")
    page.wait_for_function(
        """before => document.querySelectorAll("#attention rect[x]").length === before.length &&
           [...document.querySelectorAll("#attention rect[x]")].some(
             (cell, i) => cell.style.fillOpacity !== before[i])""",
        arg=before,
    )
    tokens.nth(2).hover()
    assert "query" in (tokens.nth(2).get_attribute("class") or "")
    assert "future" in (tokens.nth(3).get_attribute("class") or "")
    assert "later" in (tokens.nth(3).get_attribute("title") or "")


def test_layers_follow_text_and_position(visitor: Visitor):
    page = visitor.page
    page.get_by_role("tab", name="Layers").click()
    page.locator("#layers-text textarea").fill("The dog saw the cat!")
    heads = page.locator("#lens thead th")
    expect(heads.last).to_have_text("!")
    n = heads.count() - 1
    expect(page.locator("#lens tbody td")).to_have_count(3 * n)  # the embeddings and two layers
    expect(page.locator("#activity tbody td")).to_have_count(7 * n)
    before = page.locator("#attribution .note").inner_text()
    position = page.get_by_label("number input for Position")
    position.fill("2")
    position.press("Enter")
    expect(page.locator("#attribution .note")).not_to_have_text(before)
    position.fill("24")
    position.press("Enter")
    expect(page.locator("#attribution .error")).to_contain_text(str(n))
    page.get_by_role("tab", name="Attention").click()
    expect(page.locator("#scores td")).to_have_count(2 * 2 * 4)  # two scores of eight heads


def test_space_tells_a_story_and_cannot_train(tiny_run: Path, tmp_path: Path):
    write_space(Run.load(tiny_run), tmp_path / "space")
    (tmp_path / "watch").mkdir()
    command, port = [str(tmp_path / "space/app.py")], {"GRADIO_SERVER_PORT": "0"}
    with page_of(command, tmp_path / "watch", **port) as served, visit(served, 1280) as visitor:
        page = visitor.page
        page.get_by_label("number input for Maximum length (tokens)").fill("20")
        page.get_by_role("button", name="Write").click()
        expect(page.locator(".story .note")).to_be_visible()
        assert page.locator(".story .token").count() > 0
        expect(page.get_by_role("tab", name="Layers")).to_be_visible()
        expect(page.get_by_role("tab", name="Train")).to_have_count(0)


def test_app_of_a_space_imports_only_its_own_code(tiny_run: Path, tmp_path: Path):
    out = tmp_path / "space"
    write_space(Run.load(tiny_run), out)
    program = """
import json, sys
from minigpt.playground.answers import Playground
from minigpt.playground.page import build_page
from minigpt.runs.folder import Run
page = Playground.load([Run.load("model")])
build_page(page)
print(json.dumps(sorted(m.__file__ for n, m in sys.modules.items() if n.startswith("minigpt"))))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=out, env=os.environ | {"PYTHONPATH": str(out)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for file in json.loads(result.stdout.splitlines()[-1]):
        assert Path(file).is_relative_to(out)


def test_two_models_write_side_by_side_after_login(phone: Visitor):
    page = phone.page
    expect(page.get_by_role("button", name="Write")).to_have_count(0)
    for word in ("guess", "secret"):
        page.get_by_label("username").fill("student")
        page.get_by_label("password").fill(word)
        page.get_by_role("button", name="Login").click()
        if word == "guess":
            expect(page.get_by_text("Incorrect Credentials")).to_be_visible()
            phone.errors.clear()  # the browser logs the status 400
    page.get_by_label("Prompt").fill("One day, Tom saw a dog")
    page.get_by_role("button", name="Write").click()
    stories = page.locator(".story")
    expect(stories.locator(".note")).to_have_count(2)  # how each ended
    for i in range(2):
        expect(stories.nth(i).locator(".prompt")).to_have_text("One day, Tom saw a dog")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing sticks out
