"""Many visitors at once, over HTTP, as browsers ask."""

import http.client
import json
import re
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest

from tests.conftest import naming
from tests.extra.conftest import Served

pytestmark = pytest.mark.timeout(300)


def write(url: str, prompt: str, n: float, top_k: float = 0) -> str:
    """The page's last look at a story of n tokens."""
    typed = [prompt, 1.0, top_k, 1.0, 0.0, n]
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        asked = client.post("/gradio_api/call/write", json={"data": typed})
        asked.raise_for_status()
        event = asked.json()["event_id"]
        events = client.get(f"/gradio_api/call/write/{event}").text.split("\n\n")
    (last,) = [text for text in events if text.startswith("event: complete")]
    return json.loads(last.partition("data: ")[2])[0]


def test_ten_visitors_at_once_all_get_a_story(served: Served):
    prompts = [f"Tom had {i} dogs" for i in range(10)]
    with ThreadPoolExecutor(10) as pool:
        told = list(pool.map(lambda prompt: write(served.url, prompt, 60), prompts))
    for prompt, story in zip(prompts, told, strict=True):
        assert f'<span class="prompt">{prompt}</span>' in story
        # Nobody has a seed: a story may end soon, and then says so.
        ended = re.search(r'class="note">[^<]*\bended\b', story)
        assert story.count('class="token') > 5 or ended
        assert 'class="note"' in story
    assert sum(story.count('class="token') for story in told) > 100
    assert served.reached_out() == ""


def test_what_a_page_would_not_send_is_answered_and_crashes_nothing(served: Served):
    assert re.search(naming("5000", "1000"), write(served.url, "x" * 5000, 10))
    for typed in ([], ["dog", 99, 0, 1, 0, 10**9], [None] * 6, ["dog", None, 0, 1, 0, 9]):
        with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as client:
            asked = client.post("/gradio_api/call/write", json={"data": typed})
            if asked.is_success:
                event = asked.json()["event_id"]
                assert "event: " in client.get(f"/gradio_api/call/write/{event}").text
    assert 'class="note"' in write(served.url, "Tom", 10)
    assert 'class="note"' in write(served.url, "Tom", 10.4, top_k=2.6)  # counts are rounded


def test_strangers_are_sent_away_everywhere_when_there_is_a_password(guarded: Served):
    with httpx.Client(base_url=guarded.url, timeout=60, trust_env=False) as client:
        asked = client.post("/gradio_api/call/write", json={"data": ["Tom", 1.0, 0, 1.0, 0.0, 5]})
        queued = client.post("/gradio_api/queue/join", json={"data": [], "fn_index": 0})
        config = client.get("/config")
    assert [answer.status_code for answer in (asked, queued, config)] == [401] * 3


def test_the_page_loads_nothing_from_elsewhere(served: Served):
    page = httpx.get(served.url, trust_env=False)
    for outside in ("googleapis", "cdnjs", "jsdelivr", "unpkg"):
        assert outside not in page.text


def test_it_listens_on_loopback_alone(served: Served):
    connection = http.client.HTTPConnection("127.0.0.2", urlsplit(served.url).port or 0, timeout=5)
    with pytest.raises(OSError, match="refused|timed out"):
        connection.request("GET", "/")
