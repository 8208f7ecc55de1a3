"""The html export in Chromium: greedy stories equal ours, and the page sends nothing."""

import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from minigpt.data.sources import bundled_sample
from minigpt.exporting import ExportConfig, export
from minigpt.generation.sampling import SamplingConfig, generate_stories
from minigpt.runs.folder import Run
from tests.conftest import ROOT

pytestmark = pytest.mark.timeout(300)
LONG = "Once upon a time, Tom had a dog. " * 40  # longer than the context


@pytest.fixture
def page() -> Iterator[Page]:
    """A page on a small screen, without a network; it fails for any request or script error."""
    chromium = shutil.which("chromium")
    assert chromium, "chromium is not installed: make test-browser does it as root"
    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda m: m.type == "error" and problems.append(m.text))
        page.on("request", lambda r: r.url.startswith(("file:", "data:")) or problems.append(r.url))
        yield page
        browser.close()
    assert problems == []


def opened(page: Page, size: str, folder: Path) -> Run:
    """Export a release as html, open the page, and return the release."""
    run = Run.load(ROOT / "releases" / size)
    export(run, folder / size, ExportConfig("html"))
    page.goto((folder / size / "story.html").as_uri())
    return run


def story(page: Page, prompt: str, temperature: float, length: int) -> str:
    """Write a story on the page, and return it with its prompt."""
    page.get_by_label("Prompt").fill(prompt)
    for name, value in (("temperature", temperature), ("length", length)):
        page.locator(f"#{name}").fill(str(value))
    page.get_by_role("button", name="Write").click()
    expect(page.locator("#note")).to_contain_text("tokens.")
    return page.locator("#story").evaluate("element => element.textContent")


@pytest.mark.parametrize(
    ("size", "prompt", "length"),
    [
        ("small", "Once upon a time", 400),  # longer than the context, which is shifted
        ("small", LONG, 20),
        ("medium", "One day, a girl named Zoë saw a 🐉 and", 100),
        ("large", "Tom's mom said, \"Let's", 100),
    ],
)
def test_greedy_story_of_the_page_equals_ours(page, tmp_path, size, prompt, length):
    run = opened(page, size, tmp_path)
    greedy = SamplingConfig(temperature=0, max_tokens=length)
    ours = generate_stories(run.load_model(), run.tokenizer, prompt, 1, greedy)[0]
    page.evaluate("element('prompt').maxLength = 1e6")
    assert story(page, prompt, 0, length) == prompt + ours


def test_tokenizer_of_the_page_gives_our_ids(page, tmp_path):
    tokenizer = opened(page, "small", tmp_path).tokenizer
    texts = list(islice(bundled_sample().stories("valid"), 40))
    texts += [
        "",
        " ",
        "  naïve 😀☃ 你好\n\n\ttab  end ",
        "don't\r\n\u2028I'LL we'll",
        "e\u0301 \x00\ufeff",
    ]
    texts += ["The <|endoftext|>", "a\u0085b \u00a0c 12,345½"]
    for text, ids in zip(texts, page.evaluate("texts => texts.map(encode)", texts), strict=True):
        assert ids == tokenizer.encode(text), text


def test_stories_differ_stop_and_fit_a_small_screen(page, tmp_path):
    opened(page, "small", tmp_path)
    assert len({story(page, "Once upon a time", 1, 40) for _ in range(3)}) == 3
    page.locator("#length").fill("400")
    page.locator("#temperature").fill("2")  # so random that the story hardly ever ends
    # In one call, so that the story cannot end before the second click.
    page.evaluate("() => ['write', 'stop'].forEach((id) => document.getElementById(id).click())")
    expect(page.get_by_role("button", name="Write")).to_be_enabled()
    expect(page.locator("#note")).to_contain_text("Stopped:")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
