"""Many visitors of the playground at once, over HTTP."""

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
    """Return the last update of a story of `n` tokens."""
    inputs = [prompt, 1.0, top_k, 1.0, 0.0, n, [], 4]  # all models, at their last age
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        response = client.post("/gradio_api/call/write", json={"data": inputs})
        response.raise_for_status()
        event = response.json()["event_id"]
        events = client.get(f"/gradio_api/call/write/{event}").text.split("\n\n")
    (last,) = [text for text in events if text.startswith("event: complete")]
    return json.loads(last.partition("data: ")[2])[0]


def test_ten_visitors_at_once_each_get_a_story(served: Served):
    prompts = [f"Tom had {i} dogs" for i in range(10)]
    with ThreadPoolExecutor(10) as pool:
        stories = list(pool.map(lambda prompt: write(served.url, prompt, 60), prompts))
    for prompt, story in zip(prompts, stories, strict=True):
        assert f'<span class="prompt">{prompt}</span>' in story
        # The seed is random: a story may end soon, and its note reports that.
        ended = re.search(r'class="note">[^<]*\bended\b', story)
        assert story.count('class="token') > 5 or ended
        assert 'class="note"' in story
    assert sum(story.count('class="token') for story in stories) > 100
    assert served.reached_out() == ""


def test_invalid_requests_are_answered_and_the_server_survives(served: Served):
    assert re.search(naming("5000", "1000"), write(served.url, "x" * 5000, 10))
    cases = ([], ["dog", 99, 0, 1, 0, 10**9, [], 0], [None] * 8, ["dog", None, 0, 1, 0, 9, 5, "x"])
    for inputs in cases:
        with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as client:
            response = client.post("/gradio_api/call/write", json={"data": inputs})
            if response.is_success:
                event = response.json()["event_id"]
                assert "event: " in client.get(f"/gradio_api/call/write/{event}").text
    assert 'class="note"' in write(served.url, "Tom", 10)
    assert 'class="note"' in write(served.url, "Tom", 10.4, top_k=2.6)  # counts are rounded


def test_requests_without_login_are_refused(guarded: Served):
    with httpx.Client(base_url=guarded.url, timeout=60, trust_env=False) as client:
        call = client.post("/gradio_api/call/write", json={"data": ["Tom", 1.0, 0, 1.0, 0.0, 5]})
        queue = client.post("/gradio_api/queue/join", json={"data": [], "fn_index": 0})
        config = client.get("/config")
    assert [answer.status_code for answer in (call, queue, config)] == [401] * 3


def test_page_loads_nothing_from_other_hosts(served: Served):
    page = httpx.get(served.url, trust_env=False)
    for outside in ("googleapis", "cdnjs", "jsdelivr", "unpkg"):
        assert outside not in page.text


def test_server_listens_on_loopback_alone(served: Served):
    connection = http.client.HTTPConnection("127.0.0.2", urlsplit(served.url).port or 0, timeout=5)
    with pytest.raises(OSError, match="refused|timed out"):
        connection.request("GET", "/")
