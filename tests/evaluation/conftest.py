"""A small model with random weights, its run folder, and a call that runs out of memory."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from minigpt.evaluation import EvaluationConfig, StoriesConfig
from minigpt.model import GPT, GPTConfig
from minigpt.tokenizer import Tokenizer

TINY = GPTConfig(vocab_size=290, context_length=16, d_model=16, n_layers=2, n_heads=2, d_ff=16)
STORIES = [f"The {a} saw a {b}. [{a}]" for a in ("dog", "cat") for b in ("fox", "hen", "pig")] * 5
SHORT = EvaluationConfig(
    stories=StoriesConfig(("The",), (0.5, 1.2), n=2, max_tokens=12),
    words=("dog", "[crocodile]"),
    analogies=(("dog", "cat", "hen"), ("dog", "cat", "crocodile")),
)


def make_net() -> GPT:
    torch.manual_seed(0)
    net = GPT(TINY)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return net


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def write_text_corpus(path: Path, stories: list[str]) -> str:
    path.write_text("".join(f"{story}\n<|endoftext|>\n" for story in stories), encoding="utf-8")
    return str(path)


def untrained_run(tmp_path: Path) -> Path:
    """Write a run folder as train.py does, of an untrained model."""
    folder = tmp_path / "runs" / "tiny"
    (folder / "checkpoints").mkdir(parents=True)
    net = make_net()
    torch.save(
        {
            "state_dict": {f"net.{name}": weight for name, weight in net.state_dict().items()},
            "hyper_parameters": {"model": asdict(TINY)},
        },
        folder / "checkpoints" / "best.ckpt",
    )
    Tokenizer.train(STORIES, 290).save(folder / "tokenizer.json")
    data = {
        "source": "text",
        "train_files": [write_text_corpus(tmp_path / "train.txt", STORIES)],
        "valid_files": [write_text_corpus(tmp_path / "valid.txt", STORIES[::7])],
        "cache_dir": str(tmp_path / "cache"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data, "model": asdict(TINY)}))
    (folder / "summary.json").write_text('{"precision": "32-true"}')
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder of an untrained model."""
    return untrained_run(tmp_path)


def written(run: Path, name: str = "evaluation.json") -> dict:
    return json.loads((run / name).read_text(encoding="utf-8"))
