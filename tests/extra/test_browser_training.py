"""Tests of training from the page, in Chromium."""

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from minigpt.data.sources import bundled_sample
from tests.extra.conftest import Served, playground
from tests.extra.test_browser import SECONDS, visit

pytestmark = pytest.mark.timeout(900)
TEXT = "\n<|endoftext|>\n".join(islice(bundled_sample().stories("train"), 300))


@pytest.fixture
def training(tiny_run: Path, tmp_path: Path) -> Iterator[Served]:
    with playground([str(tiny_run)], tmp_path) as served:
        yield served


def open_tab(page: Page, phone: bool = False) -> None:
    if phone:  # the last tabs are in a menu
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown button", has_text="Train").click()
    else:
        page.get_by_role("tab", name="Train").click()
    expect(page.locator("#start-training")).to_be_visible()


def fill(page: Page, text: str, minutes: str) -> None:
    page.get_by_label("Text of the stories").fill(text)
    page.get_by_label("Size").click()
    page.get_by_role("option", name=re.compile("w64")).click()
    page.get_by_label("Minutes").fill(minutes)
    page.locator("#start-training").click()


def test_text_is_trained_stopped_continued_and_writes_a_story(training: Served, tmp_path: Path):
    with visit(training, width=1280, url=training.token_url) as visitor:
        page, view = visitor.page, visitor.page.locator("#training")
        assert "token" not in page.url
        open_tab(page)
        fill(page, TEXT, "1.5")
        expect(view).to_contain_text("tokens/s", timeout=240 * SECONDS)
        page.reload()
        visitor.errors.clear()  # the reload ends requests that were running
        open_tab(page)
        expect(view).to_contain_text("tokens/s")
        assert page.context.browser is not None
        second = page.context.browser.new_page()  # another visitor sees the same training
        second.goto(training.token_url)
        open_tab(second)
        expect(second.locator("#training")).to_contain_text("tokens/s")
        second.close()
        browser = page.context.browser
        page.close()  # the visitor closes the tab, and later opens the page again
        page = browser.new_page()
        page.goto(training.token_url)
        view = page.locator("#training")
        open_tab(page)
        expect(view).to_contain_text("tokens/s")
        page.locator("#stop-training").click()
        expect(view.locator(".note").first).to_have_text("stopped", timeout=120 * SECONDS)
        page.locator("#continue-training").click()
        expect(view.locator(".command")).to_contain_text("minigpt train", timeout=400 * SECONDS)
        page.get_by_role("tab", name="Story").click()
        models = page.get_by_label("Models")
        expect(models).to_be_visible()
        models.click()
        page.get_by_role("option", name=re.compile("w64-")).click()
        page.get_by_role("button", name="Write").click()
        expect(page.locator(".story .note")).to_have_count(2)
        slider = page.locator("#age input[type=range]")  # the new model has snapshots
        expect(slider).to_be_visible()
        assert int(slider.get_attribute("max") or 0) > 1
        expect(slider).to_have_value(slider.get_attribute("max") or "")
    (job,) = (tmp_path / ".cache/playground").glob("2*")
    assert not (job / "uploads").exists()
    assert training.reached_out() == ""  # neither the server nor the training


def test_error_of_the_data_is_shown_at_its_field(training: Served):
    with visit(training, width=390, url=training.token_url) as visitor:
        page = visitor.page
        open_tab(page, phone=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        fill(page, " ", "1")
        expect(page.locator("#error-text .error")).to_be_visible()
        fill(page, "x", "99999")
        expect(page.locator("#error-minutes .error")).to_be_visible()
        image = {"name": "photo.png", "mimeType": "image/png", "buffer": b"\x89PNG\r\n\x1a\n"}
        page.locator("input[type=file]").set_input_files([image])  # type: ignore[list-item]
        expect(page.get_by_text("photo")).to_be_visible()
        fill(page, "", "1")
        expect(page.locator("#error-files .error")).to_contain_text(
            "photo.png", timeout=240 * SECONDS
        )


def test_files_above_the_limit_are_refused_at_their_field_and_nothing_is_lost(
    training: Served, tmp_path: Path
):
    large, small = tmp_path / "large.txt", tmp_path / "novella.txt"
    with large.open("wb") as file:
        file.truncate(2_000_000_000)  # it takes no space on the disk
    small.write_text("a story")
    with visit(training, width=1280, url=training.token_url) as visitor:
        page, error = visitor.page, visitor.page.locator("#error-files .error")
        open_tab(page)
        page.get_by_label("Text of the stories").fill("the text")
        uploads: list[str] = []
        page.on("request", lambda request: uploads.append(request.url))
        page.locator("input[type=file]").set_input_files(large)
        expect(error).to_have_count(1)
        expect(error).to_contain_text("2000")
        expect(error).to_contain_text("data.train_files")
        expect(page.get_by_label("Text of the stories")).to_have_value("the text")
        assert not any("/upload" in url for url in uploads)
        transfer = page.evaluate_handle(
            """() => {
                const transfer = new DataTransfer();
                const parts = Array(201).fill(new Uint8Array(1e6));
                transfer.items.add(new File(parts, "dropped.txt"));
                return transfer;
            }"""
        )
        page.locator("input[type=file]").set_input_files(small)
        expect(page.get_by_text("novella")).to_be_visible()
        expect(error).to_have_count(0)
        # The field now shows the file; another one is added by its button.
        page.locator("#training-form").dispatch_event("drop", {"dataTransfer": transfer})
        expect(error).to_contain_text("201")
        expect(page.get_by_text("novella")).to_be_visible()
    assert list((tmp_path / ".cache/playground").glob("2*")) == []


def test_nothing_starts_without_the_token(training: Served, tmp_path: Path):
    with visit(training, width=1280) as visitor:
        page = visitor.page
        page.get_by_role("tab", name="Train").click()
        expect(page.locator("#no-token .error")).to_be_visible()
        expect(page.locator("#start-training")).to_be_hidden()
    with httpx.Client(base_url=training.url, timeout=60, trust_env=False) as client:
        upload = client.post("/gradio_api/upload", files={"files": ("a.txt", b"text")})
        assert upload.status_code == 403
        client.get("/?token=wrong")
        answers = []
        for event in client.get("/config").json()["dependencies"]:
            if len(event["inputs"]) != 5:  # the start of a training has five fields
                continue
            session = f"session{event['id']}"
            data = [TEXT, None, "w64", "random weights", 0.1]
            join = {"data": data, "fn_index": event["id"], "session_hash": session}
            client.post("/gradio_api/queue/join", json=join).raise_for_status()
            stream = client.get("/gradio_api/queue/data", params={"session_hash": session})
            answers += [json.loads(line[6:]) for line in stream.text.splitlines() if line[6:]]
        assert "token" in json.dumps([a for a in answers if a["msg"] == "process_completed"])
    assert list((tmp_path / ".cache/playground").glob("2*")) == []
