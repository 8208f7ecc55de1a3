"""The page of an export to HTML."""

import base64
import json
import re

import pytest
import torch

from minigpt.exporting import ExportConfig, export
from minigpt.runs.folder import Run


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_html_is_one_page_with_weights_and_tokenizer(run, tmp_path, dtype):
    out = tmp_path / "out"
    export(Run.load(run), out, ExportConfig("html", dtype), name="<b> & co")
    page = (out / "story.html").read_text(encoding="utf-8")
    assert "<b> & co" not in page
    assert "<title>&lt;b&gt; &amp; co</title>" in page
    assert not re.search(r"https?://|//[a-z]+\.[a-z]", page.split("</head>")[0])

    def part(name: str) -> str:
        return page.split(f'id="{name}">')[1].split("</script>")[0]

    content, loaded = json.loads(part("model")), Run.load(run)
    model, tokenizer = loaded.load_model(), loaded.tokenizer
    ours = torch.cat([w.flatten() for w in model.state_dict().values()]).to(getattr(torch, dtype))
    flat = torch.frombuffer(bytearray(base64.b64decode(part("weights"))), dtype=ours.dtype)
    assert torch.equal(flat, ours)
    assert content["dtype"] == dtype
    assert content["parameters"] == [[n, w.numel()] for n, w in model.state_dict().items()]
    assert content["shape"]["scale"] == model.scale
    assert len(content["tokenizer"]["tokens"]) == tokenizer.vocab_size
    assert content["tokenizer"]["tokens"][tokenizer.encode("T")[0]] == "T"
