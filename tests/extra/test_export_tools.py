"""Exports in the programs that they are for, which `make test-export` installs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import ctranslate2
import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from ctranslate2.converters import TransformersConverter
from gguf import GGUFReader
from transformers import AutoTokenizer

from minigpt.core.settings import build
from minigpt.evaluation import EvaluationConfig, evaluate
from minigpt.exporting import ExportConfig, export
from minigpt.generation.sampling import SamplingConfig, generate_stories
from minigpt.runs.folder import Run
from tests.conftest import tiny_overrides, trained_folder

CONTEXT = 16
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with stories and the run `runs/tiny`, whose embedding scale is √12."""
    folder = tmp_path_factory.mktemp("place")
    words = ["model.d_model=12", "trainer.precision=32-true", "name=tiny"]
    trained_folder([*tiny_overrides(folder), *words])
    return folder


def exported(place: Path, format: str) -> tuple[Run, Path]:
    run, out = Run.load(place / "runs" / "tiny"), place / format
    export(run, out, build(ExportConfig, {"format": format}, ""))
    return run, out


@pytest.mark.filterwarnings("ignore")  # warnings of other packages
def test_onnxruntime_computes_the_same_for_any_batch_and_length(place):
    run, out = exported(place, "onnx")
    net, session = run.load_model(), onnxruntime.InferenceSession(out / "model.onnx")
    for batch, length in ((1, 1), (1, CONTEXT), (5, 7), (2, CONTEXT)):
        ids = torch.randint(0, 300, (batch, length))
        (logits,) = session.run(None, {"ids": ids.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(logits, net(ids).numpy(), rtol=0, atol=1e-4)
    assert os.fsencode(ROOT) not in (out / "model.onnx").read_bytes()


@pytest.mark.filterwarnings("ignore")  # warnings of other packages
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_ctranslate2_writes_the_same_greedy_story(place, dtype):
    run, out = exported(place, "hf")
    converted = place / dtype
    TransformersConverter(str(out)).convert(str(converted), quantization=dtype)
    # With products in int8, the sums of CTranslate2 saturate on CPUs without VNNI.
    generator = ctranslate2.Generator(str(converted), device="cpu", compute_type="float32")
    net, prompt = run.load_model(), "Once upon a time, Tom"
    tokens = AutoTokenizer.from_pretrained(out)(prompt).tokens()
    logits = np.array(generator.forward_batch([tokens]))
    ids = torch.tensor([[0, *run.tokenizer.encode(prompt)]])
    tolerance = {"float32": 1e-4, "int8": 0.05}[dtype]
    np.testing.assert_allclose(logits, net(ids).numpy(), rtol=0, atol=tolerance)
    if dtype == "float32":
        greedy = SamplingConfig(temperature=0, max_tokens=6)
        ours = generate_stories(net, run.tokenizer, prompt, 1, greedy)[0]
        (result,) = generator.generate_batch([tokens], max_length=6, include_prompt_in_result=False)
        assert run.tokenizer.decode(result.sequences_ids[0]) == ours


def whole_windows(place: Path, run: Run) -> tuple[list[str], int, list[int]]:
    """Return validation stories whose predictions fill whole windows, their bytes and their ids."""
    stories = (place / "valid.txt").read_text(encoding="utf-8").split("\n<|endoftext|>\n")
    tokenizer = run.tokenizer
    for n in range(len(stories), 1, -1):
        ids = tokenizer.encode_stories(stories[:n]).tolist()
        if (len(ids) - 1) % CONTEXT == 0:
            return stories[:n], sum(len(story.encode()) for story in stories[:n]), ids
    raise AssertionError("no number of stories fills whole windows")


def lm_eval(folder: Path, model: Path, text: str, prefix: int) -> float:
    """Return the bits per byte of `text` after the token `prefix`, measured by lm_eval."""
    folder.mkdir()
    (folder / "stories.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    (task,) = yaml_blocks((ROOT / "docs" / "sharing.md").read_text(encoding="utf-8"))
    task["dataset_kwargs"]["data_files"]["test"] = str(folder / "stories.jsonl")
    (folder / "stories.yaml").write_text(yaml.safe_dump(task))
    arguments = f"pretrained={model},dtype=float32,add_bos_token=False,prefix_token_id={prefix}"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", arguments]
    command += ["--tasks", "stories", "--include_path", folder, "--device", "cpu"]
    command += ["--batch_size", "8", "--output_path", folder / "results.json"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    process = subprocess.run(
        command, env={**os.environ, **offline}, capture_output=True, text=True, encoding="utf-8"
    )
    assert process.returncode == 0, process.stderr
    (path,) = folder.glob("results*.json")
    return json.loads(path.read_text())["results"]["stories"]["bits_per_byte,none"]


def yaml_blocks(text: str) -> list[dict]:
    """Return the content of the YAML blocks of a Markdown file."""
    blocks = [block for block in text.split("```")[1::2] if block.startswith("yaml\n")]
    return [yaml.safe_load(block.removeprefix("yaml\n")) for block in blocks]


@pytest.mark.timeout(600)
def test_lm_eval_agrees_with_evaluate(place):
    run, out = exported(place, "hf")
    stories, n_bytes, ids = whole_windows(place, run)
    (place / "whole.txt").write_text(
        "\n<|endoftext|>\n".join(stories) + "\n<|endoftext|>\n", encoding="utf-8"
    )
    data = {"source": "text", "valid_files": [str(place / "whole.txt")]}
    data["cache_dir"] = str(place / "cache")
    settings = {"data": data, "stories": {"prompts": []}, "words": [], "analogies": []}
    ours = evaluate(run, build(EvaluationConfig, settings, ""))
    assert ours.n_tokens == len(ids) - 1

    # evaluate.py scores all tokens but the first, which is the prefix for lm_eval.
    first = run.tokenizer.decode(ids[:1])
    text = "".join(f"{story}<|endoftext|>" for story in stories).removeprefix(first)
    bits_per_byte = lm_eval(place / "task", out, text, prefix=ids[0])
    nats = bits_per_byte * math.log(2) * len(text.encode())
    assert math.exp(nats / ours.n_tokens) == pytest.approx(ours.perplexity, rel=1e-4)
    story_bits = nats / ours.n_tokens / math.log(2) / (n_bytes / len(ids))
    assert story_bits == pytest.approx(ours.bits_per_byte, rel=1e-4)


def test_gguf_has_the_tensor_names_of_llama_cpp(place):
    run, out = exported(place, "gguf")
    net, tokenizer, reader = run.load_model(), run.tokenizer, GGUFReader(out / "model.gguf")
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert len(tensors) == len(net.state_dict()) + 1  # the positions
    torch.testing.assert_close(tensors["token_embd.weight"], net.embedding.weight * 12**0.5)
    assert torch.equal(tensors["position_embd.weight"], net.positions)
    assert torch.equal(tensors["blk.1.attn_qkv.weight"], net.blocks[1].attention.qkv.weight)
    assert torch.equal(tensors["blk.0.ffn_down.bias"], net.blocks[0].feed_forward.down.bias)

    def value(name: str):
        return reader.fields[name].contents()

    assert value("general.architecture") == "gpt2"
    assert value("gpt2.attention.head_count") == net.config.n_heads
    assert value("tokenizer.ggml.eos_token_id") == value("tokenizer.ggml.bos_token_id") == 0
    assert value("tokenizer.ggml.tokens")[0] == "<|endoftext|>"
    assert len(value("tokenizer.ggml.tokens")) == net.config.vocab_size
    own = json.loads(tokenizer.to_json())["model"]["merges"]
    assert value("tokenizer.ggml.merges") == [" ".join(pair) for pair in own]
    modelfile = dict(
        line.removeprefix("PARAMETER ").split(" ", 1)
        for line in (out / "Modelfile").read_text(encoding="utf-8").splitlines()
    )
    assert (out / modelfile["FROM"]).is_file()
    assert modelfile["num_ctx"] == str(CONTEXT)
    assert modelfile["stop"] == '"<|endoftext|>"'


def test_llama_cpp_writes_the_same_greedy_story(place):
    """Skipped where llama_cpp is not installed: building it takes half an hour on one core."""
    llama_cpp = pytest.importorskip("llama_cpp")
    run, out = exported(place, "gguf")
    prompt = "Once upon a time, Tom"
    greedy = SamplingConfig(temperature=0, max_tokens=6)
    ours = generate_stories(run.load_model(), run.tokenizer, prompt, 1, greedy)[0]
    llama = llama_cpp.Llama(str(out / "model.gguf"), n_ctx=CONTEXT, verbose=False)
    theirs = llama(prompt, max_tokens=6, temperature=0, repeat_penalty=1.0)
    assert theirs["choices"][0]["text"] == ours
