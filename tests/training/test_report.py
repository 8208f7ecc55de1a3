import base64
import html
import json
import re
import shlex
from html.parser import HTMLParser

import pytest

from minigpt.cli.program import Program
from minigpt.core import settings
from minigpt.runs.names import SNAPSHOTS
from minigpt.training.report import OTHER, TRAIN, VAL, smooth, write_report
from tests.run_folder import HEADER, SUMMARY, write_run

pytestmark = pytest.mark.usefixtures("drawn_charts")

VERBS = ("study", "playground")  # for a run with snapshots
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Collect every tag with its attributes; fail on a tag that is closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def report(run) -> str:
    return write_report(run).read_text(encoding="utf-8")


def test_report_shows_numbers_charts_stories_config_and_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings, "_spell", settings.python_call)  # other tests run programs
    page = report(write_run(tmp_path / "runs" / "first"))
    for text in ("66.69", "1.578", "1.05M", "328k", "3 min 20 s", "21k", "4.200"):
        assert text in page
    for title in ("Loss", "Validation perplexity", "Throughput", "Learning rate"):
        assert f"<h3>{title}</h3><svg" in page
    assert re.search(r'class="status finished">[^<]*\b328k\b', page)
    for word in ("small", "cpu", "bf16-mixed"):
        assert re.search(rf"\b{word}\b", page.partition("<h3>")[0])
    assert re.search(r"<summary>\w+ 20 .*\b164k\b.*\b244\.69\b", page)
    assert "name: first\nseed: 1\n" in page
    assert "minigpt.evaluate('runs/first')<" in html.unescape(page)
    assert "minigpt.generate('runs/first')<" in html.unescape(page)
    assert not list((tmp_path / "runs/first").glob("*.tmp"))


def test_commands_of_the_report_name_the_program_and_the_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "runs" / "first")
    with (folder / "config.yaml").open("a") as file:
        file.write("model_class: mine.MyGPT\n")
    program = Program(str(tmp_path / "train.py"), (), "train.py")
    monkeypatch.setattr(settings, "_spell", program.command)
    page = report(folder)
    assert "evaluate.py ckpt=runs/first class_path=mine.MyGPT<" in page
    assert "generate runs/first --class-path mine.MyGPT<" in page


@pytest.mark.parametrize("own", [False, True])
def test_report_of_a_run_with_snapshots_counts_them_and_gives_the_commands(
    tmp_path, monkeypatch, own
):
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "runs" / "first")
    if own:
        with (folder / "config.yaml").open("a") as file:
            file.write("model_class: mine.MyGPT\n")
    assert "--over-time" not in report(folder)
    (folder / SNAPSHOTS).mkdir()
    for step in range(13):
        (folder / SNAPSHOTS / f"step-{step:06d}.safetensors").touch()
    program = Program(str(tmp_path / "train.py"), (), "train.py")
    for spell in (settings.python_call, program.command):
        monkeypatch.setattr(settings, "_spell", spell)
        page = html.unescape(report(folder))
        assert re.search(r"\b13 snapshots\b", page)
        commands = re.findall(r"<pre>(.*minigpt (?:study|playground) .*)</pre>", page)
        words = [shlex.split(command) for command in commands]
        ends = [words[words.index(verb) :] for words, verb in zip(words, VERBS, strict=True)]
        path = ["--class-path", "mine.MyGPT"] if own else []
        expected = [
            ["study", "runs/first", *path, "--out", "runs/first", "--over-time"],
            ["playground", "runs/first", *path],
        ]
        assert ends == expected


def test_report_shows_the_study_of_the_snapshots_that_lies_in_the_run_folder(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "over-time.md").write_text("# Measures <of> *run*\n")
    assert "<img" not in report(folder)
    (folder / "over-time.png").write_bytes(b"figure")
    page = report(folder)
    (source,) = [attrs["src"] for tag, attrs in Page(page).tags if tag == "img"]
    assert source is not None
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == b"figure"
    assert "# Measures <of> *run*" in html.unescape(page)
    assert "embeddings.html" not in page
    (folder / "embeddings.html").write_text("<p>the animation</p>")
    assert ("a", "embeddings.html") in [(t, a.get("href")) for t, a in Page(report(folder)).tags]


def test_page_is_well_formed_and_refers_to_nothing_outside(tmp_path):
    text = report(write_run(tmp_path / "run"))
    tags = Page(text).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    links = [attrs[k] for _, attrs in tags for k in ("src", "href", "xlink:href") if k in attrs]
    links += re.findall(r"url\(([^)]*)\)", text)
    assert links
    assert len(ids) == len(set(ids))
    assert {link for link in links if (link or "")[:1] != "#"} == set()
    assert {(link or "")[1:] for link in links} <= set(ids)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags}
    assert "@import" not in text


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb by WCAG 2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_charts_are_readable_in_light_and_dark_mode(tmp_path):
    text = report(write_run(tmp_path / "run"))
    charts = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "fill: currentColor" in charts
    colours = set(re.findall(r"#[0-9a-f]{6}\b", charts))
    assert colours == {TRAIN, VAL, OTHER}
    light, dark = re.findall(r"--card: (#\w{6})", text)
    assert "prefers-color-scheme: dark" in text
    assert luminance(light) > 0.9
    assert luminance(dark) < 0.02
    for colour in colours:
        assert (luminance(light) + 0.05) / (luminance(colour) + 0.05) >= 3
        assert (luminance(colour) + 0.05) / (luminance(dark) + 0.05) >= 3


def test_page_escapes_stories_and_settings(tmp_path):
    run = write_run(tmp_path / "<i>run", SUMMARY | {"device": "<script>d"})
    attack = "<script>alert(1)</script>"
    story = {"step": 40, "tokens": 1, "prompt": attack, "temperature": attack, "text": attack * 2}
    (run / "samples.jsonl").write_text(json.dumps(story) + "\n")
    (run / "config.yaml").write_text(f"name: {attack}\n")
    text = report(run)
    assert "<script" not in text
    assert "<i>" not in text
    assert "&lt;script&gt;alert(1)" in text


@pytest.mark.parametrize("text", ["Once upon a time", " upon a time"])
def test_prompt_is_highlighted_and_shown_once(tmp_path, text):
    run = write_run(tmp_path / "run")
    story = {"step": 40, "tokens": 1, "prompt": "Once", "temperature": 0.8, "text": text}
    (run / "samples.jsonl").write_text(json.dumps(story) + "\n")
    assert '<p dir="auto"><b>Once</b> upon a time</p>' in report(run)


def test_stages_include_the_first_and_the_last_among_the_open_ones(tmp_path):
    run = write_run(tmp_path / "run")
    story = {"tokens": 1, "prompt": "", "temperature": 1, "text": "x"}
    lines = [json.dumps(story | {"step": step}) + "\n" for step in range(20)]
    (run / "samples.jsonl").write_text("".join(lines))
    stages = [attrs for _, attrs in Page(report(run)).tags if attrs.get("class") == "stage"]
    opened = [i for i, attrs in enumerate(stages) if "open" in attrs]
    assert (len(stages), len(opened), opened[0], opened[-1]) == (20, 5, 0, 19)


@pytest.mark.parametrize(
    ("status", "tokens"), [("interrupted", "246k"), ("failed", "246k"), (None, "328k")]
)
def test_report_of_an_unfinished_run_shows_its_status_and_last_numbers(tmp_path, status, tokens):
    stopped = {"status": status, "tokens": 245_760, "val/perplexity": None}
    text = report(write_run(tmp_path / "run", stopped if status else None))
    (line,) = re.findall(r'<p class="status (.*?)</p>', text, re.DOTALL)
    assert re.match(rf'(?s){status or "unfinished"}">.*\b{tokens}\b', line)
    assert "<strong>66.69</strong>" in text
    assert "Finished" not in text


def test_report_of_a_run_without_measurements(tmp_path):
    text = report(tmp_path)
    assert '<p class="status unfinished">' in text
    assert not {"svg", "strong"} & {tag for tag, _ in Page(text).tags}


def test_report_shows_a_loss_that_is_not_finite(tmp_path):
    run = write_run(
        tmp_path / "run", SUMMARY | {"status": "failed", "val/perplexity": float("nan")}
    )
    (run / "metrics.csv").write_text(HEADER + "10,81920,nan,nan,nan,nan,20000,0.0005\n")
    text = report(run)
    assert "<strong>nan</strong>" in text
    assert '<p class="status failed">' in text


def test_smooth_uses_a_symmetric_window():
    assert smooth([1, 2, 3, 4, 5, 6], reach=2) == [1, 2, 3, 4, 5, 6]  # a straight line stays
    assert smooth([0, 0, 9, 0, 0], reach=1) == [0, 3, 3, 3, 0]
