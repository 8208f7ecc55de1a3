import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minigpt.cli.compose import load_config
from minigpt.core.settings import UserError
from minigpt.data.config import DataConfig
from minigpt.data.corpus import Corpus
from minigpt.evaluation import (
    EvaluationConfig,
    StoriesConfig,
    corpora,
    evaluate,
    evaluate_loss,
    hugging_face,
)
from minigpt.evaluation.hugging_face import evaluate_hf, evaluation_hf_name
from minigpt.exporting.formats import write_hf
from minigpt.model import GPT, GPTConfig
from minigpt.runs.folder import Run
from minigpt.tokenizer import Tokenizer
from tests.conftest import naming, write_stories


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with stories, and a random model in the format of transformers in `hf`."""
    folder = tmp_path_factory.mktemp("place")
    text = write_stories(folder / "valid.txt", 30, seed=1).read_text(encoding="utf-8")
    tokenizer = Tokenizer.train([text], 300)
    torch.manual_seed(0)
    net = GPT(GPTConfig(tokenizer.vocab_size, 16, d_model=16, n_layers=2, n_heads=2, d_ff=16))
    (folder / "hf").mkdir()
    write_hf(net.eval().requires_grad_(False), tokenizer, folder / "hf")
    tokenizer.save(folder / "ours.json")
    torch.save(net.state_dict(), folder / "ours.pt")
    return folder


def settings(place: Path, *more: str) -> EvaluationConfig:
    data = ["data=text", f"data.valid_files=[{place / 'valid.txt'}]"]
    return load_config("evaluate", [f"hf={place / 'hf'}", *data, *more])


def test_gpu_that_is_too_small_for_the_model_is_an_error_of_hf():
    def full(_: str) -> None:
        raise RuntimeError("CUDA error: out of memory")

    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES") as error:
        hugging_face._moved(SimpleNamespace(to=full), "cuda", Path("model"))
    assert error.value.argument == "hf"


@pytest.mark.parametrize("stride", [None, 5])
@pytest.mark.parametrize("chunk", [1024, 7])
def test_loss_of_our_export_equals_that_of_our_model(place, tmp_path, monkeypatch, stride, chunk):
    monkeypatch.setattr(hugging_face, "_CHUNK", chunk)  # 7: a window takes three passes
    tokenizer = Tokenizer.load(place / "ours.json")
    net = GPT(GPTConfig(tokenizer.vocab_size, 16, d_model=16, n_layers=2, n_heads=2, d_ff=16))
    net.load_state_dict(torch.load(place / "ours.pt"))
    stories = (place / "valid.txt").read_text(encoding="utf-8").split("\n<|endoftext|>\n")
    ids = np.array(tokenizer.encode_stories(stories))
    ours = evaluate_loss(net, ids, stride=stride)
    n_bytes = sum(len(story.encode()) for story in stories)
    typed = [] if stride is None else [f"stride={stride}"]
    config = settings(place, *typed)
    result = evaluate_hf(place / "hf", config, out=tmp_path)
    assert (result.n_stories, result.n_tokens) == (30, ours.n_tokens)
    assert result.nats_per_token == pytest.approx(ours.nats_per_token, abs=1e-5)
    expected = ours.bits_per_byte(n_bytes / len(ids))
    assert result.bits_per_byte == pytest.approx(expected, abs=1e-5)
    assert (result.context, result.vocabulary) == (16, tokenizer.vocab_size)
    path = tmp_path / evaluation_hf_name(place / "hf", config)
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["bits_per_byte"] == result.bits_per_byte


def test_both_texts_of_the_sample_are_scored(place, tmp_path, monkeypatch):
    texts = {name: tmp_path / f"{name}.txt" for name in ("v1", "v2")}
    for seed, path in enumerate(texts.values()):
        write_stories(path, 10 + seed, seed)
    monkeypatch.setattr(corpora, "bundled_sample", lambda name: Corpus((), (texts[name],)))
    result = evaluate_hf(place / "hf", out=tmp_path)
    assert (result.valid, result.n_stories) == ("both", 11)
    assert result.valid_v1 is not None
    assert result.valid_v1.n_stories == 10
    assert result.valid_v1.bits_per_byte != result.bits_per_byte


def test_settings_of_stories_and_folders_without_a_model_are_errors(place, tmp_path, monkeypatch):
    stories = EvaluationConfig(stories=StoriesConfig(n=1))
    for folder, config, names in (
        (place, None, ("hf", str(place))),
        (place / "hf", stories, ("stories",)),
        (place / "hf", EvaluationConfig(stride=17), ("stride", "17", "16")),
    ):
        with pytest.raises(UserError, match=naming(*names)):
            evaluate_hf(folder, config, out=tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=naming("pip install transformers")):
        evaluate_hf(place / "hf", out=tmp_path)


def test_each_kind_of_result_has_its_own_file(place):
    tuning = EvaluationConfig(data=DataConfig(valid="tuning"))
    other = settings(place, "data.valid_files=[other.txt]")
    kinds = (
        EvaluationConfig(),
        settings(place),
        settings(place, "stride=5"),
        settings(place, "context=5"),
        tuning,
        other,
    )
    kinds += (dataclasses.replace(tuning, valid="v2"),)
    names = [
        evaluation_hf_name(place / "hf", kind) for kind in (*kinds, EvaluationConfig(valid="v1"))
    ]
    assert names[0] == "evaluation-hf-hf.json"
    assert len(set(names)) == len(names)


def test_split_without_stories_is_an_error_of_the_data(place, tmp_path):
    (tmp_path / "five.txt").write_text("\n<|endoftext|>\n".join("abcde"), encoding="utf-8")
    data = [f"data.train_files=[{tmp_path / 'five.txt'}]", "data.valid=tuning"]
    config = settings(place, *data)
    with pytest.raises(UserError, match=naming("data.valid")):
        evaluate_hf(place / "hf", config, out=tmp_path)


def test_tokenizer_without_an_end_and_damaged_weights_are_errors(place, tmp_path):
    write_hf(GPT(GPTConfig(300, 4, 4, 1, 1, 4)), Tokenizer.load(place / "ours.json"), tmp_path)
    config = tmp_path / "tokenizer_config.json"
    without = json.loads(config.read_text(encoding="utf-8"))
    del without["eos_token"]
    config.write_text(json.dumps(without))
    with pytest.raises(UserError, match=naming("hf", str(tmp_path))):
        evaluate_hf(tmp_path, out=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=naming("hf", str(tmp_path))):
        evaluate_hf(tmp_path, out=tmp_path)


def other_model(folder: Path, kind: str, text: str) -> tuple[Any, Any]:
    """Write a random model whose config has no context length, with a tokenizer of whole words."""
    import transformers
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import models, pre_tokenizers, trainers

    words = HFTokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    words.train_from_iterator([text], trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"]))
    ends = {"unk_token": "<unk>", "eos_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **ends)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 8}
    config = {
        "bloom": lambda: transformers.BloomConfig(n_layer=1, n_head=2, **sizes),
        "mamba": lambda: transformers.MambaConfig(num_hidden_layers=1, state_size=2, **sizes),
    }[kind]()
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for part in (tokenizer, model):
        part.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
@torch.inference_mode()
def test_model_without_a_context_length_is_scored_in_windows_of_the_setting(
    place, tmp_path, monkeypatch, kind
):
    stories = (place / "valid.txt").read_text(encoding="utf-8").split("\n<|endoftext|>\n")
    model, tokenizer = other_model(tmp_path / "hf", kind, " ".join(stories))
    ids = [i for story in stories for i in [*tokenizer.encode(story), tokenizer.eos_token_id]]
    nats = 0.0
    for start in range(0, len(ids) - 1, 12):
        window = torch.tensor([ids[start : start + 13]])
        logits = model(window[:, :-1]).logits[0]
        nats += float(F.cross_entropy(logits, window[0, 1:], reduction="sum"))
    monkeypatch.setattr(hugging_face, "_CHUNK", 5)
    result = evaluate_hf(tmp_path / "hf", settings(place, "context=12"), out=tmp_path)
    assert (result.context, result.n_tokens) == (12, len(ids) - 1)
    assert result.nats_per_token == pytest.approx(nats / (len(ids) - 1), abs=1e-5)


@pytest.mark.parametrize(
    ("values", "typed", "expected"),
    [
        ({"n_positions": 1024}, None, 1024), ({"n_positions": 1024}, 100, 100),
        ({"max_position_embeddings": 131_072}, None, 2048),
        ({"max_position_embeddings": 131_072}, 4096, 4096),
        ({"max_position_embeddings": -1}, None, 2048), ({}, None, 2048), ({}, 4096, 4096),
        ({"max_position_embeddings": None, "max_seq_len": 512}, None, 512),
    ],
)  # fmt: skip
def test_context_is_limited_by_the_model_and_by_default(values, typed, expected):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**values))
    assert hugging_face._context(config, typed) == expected


def test_context_that_is_too_long_or_of_a_run_is_an_error(place, tmp_path):
    for context in (17, 0):
        with pytest.raises(UserError) as error:
            evaluate_hf(place / "hf", settings(place, f"context={context}"), out=tmp_path)
        assert error.value.argument == "context"
    with pytest.raises(UserError) as error:
        evaluate(Run.load("releases/w64"), EvaluationConfig(context=16), out=tmp_path)
    assert error.value.argument == "context"
