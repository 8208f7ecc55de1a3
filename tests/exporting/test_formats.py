import logging
import sys
from itertools import islice
from types import ModuleType

import pytest
import torch

from minigpt.core.settings import UserError
from minigpt.data.sources import bundled_sample
from minigpt.generation.sampling import SamplingConfig, generate_stories
from minigpt.runs.folder import Run
from tests.conftest import naming
from tests.exporting.conftest import exported

PROMPT = "Once upon a time, Tom"


def test_transformers_computes_the_logits_and_stories_of_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    out = exported(run, tmp_path / "out")
    model, tokenizer = Run.load(run).load_model(), Run.load(run).tokenizer
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.randint(0, 300, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0, atol=1e-4)
    assert theirs.num_parameters() == model.n_parameters + model.positions.numel()
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == tokenizer.end_of_text
    assert theirs.generation_config.temperature == SamplingConfig().temperature

    words = AutoTokenizer.from_pretrained(out)
    assert words.eos_token == words.bos_token == "<|endoftext|>"
    generate = pipeline("text-generation", model=theirs, tokenizer=words)
    (result,) = generate(PROMPT, do_sample=False)
    greedy = SamplingConfig(temperature=0, max_tokens=16 - 1 - len(tokenizer.encode(PROMPT)))
    assert greedy.max_tokens >= 3
    ours = generate_stories(model, tokenizer, PROMPT, 1, greedy)[0]
    assert result["generated_text"] == PROMPT + ours


def test_transformers_tokenizer_gives_our_ids(run, tmp_path):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(exported(run, tmp_path / "out"), model_max_length=10**6)
    ours = Run.load(run).tokenizer
    stories = list(islice(bundled_sample().stories("valid"), 50))
    odd = ["", " ", "  naïve 😀☃ 你好\n\n\ttab  end ", "don't\r\n\u2028I'LL", "e\u0301 \x00"]
    for text in stories + odd:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.encode(text) == [0, *ids]  # as `minigpt generate` does
        assert theirs.decode(ids) == text
    spelled = "The <|endoftext|>"
    assert 0 in theirs.encode(spelled, add_special_tokens=False)  # unlike ours
    assert theirs.encode(
        spelled, add_special_tokens=False, split_special_tokens=True
    ) == ours.encode(spelled)


def test_damaged_safetensors_are_refused(run, tmp_path):
    out = exported(run, tmp_path / "out", format="safetensors")
    weights = out / "model.safetensors"
    whole = weights.read_bytes()
    for part in (whole[: len(whole) // 2], b"", b"Once upon a time"):
        weights.write_bytes(part)
        with pytest.raises(UserError, match=naming("model.safetensors")):
            Run.load(out).load_model()
    hf = exported(run, tmp_path / "hf")
    with pytest.raises(UserError, match=naming("config.yaml")):
        Run.load(hf).load_model()


@pytest.mark.parametrize(("format", "module"), [("onnx", "onnx"), ("gguf", "gguf")])
def test_missing_package_is_named(format, module, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=naming(f"pip install {module}")):
        exported(run, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_onnx_export_restores_the_level_of_the_logger(run, tmp_path, monkeypatch):
    for module in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    logger, levels = logging.getLogger("torch.onnx"), []

    def failed(*_, **__) -> None:
        levels.append(logger.level)
        raise RuntimeError("a bug")

    monkeypatch.setattr(torch.onnx, "export", failed)
    before = logger.level
    with pytest.raises(RuntimeError, match="a bug"):
        exported(run, tmp_path / "out", format="onnx")
    assert levels == [logging.ERROR]
    assert logger.level == before
