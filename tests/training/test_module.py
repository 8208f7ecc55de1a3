import math

import pytest
import torch
from torchmetrics.text import Perplexity

from minigpt.model import IGNORE_INDEX, GPTConfig
from minigpt.training.config import OptimizerConfig
from minigpt.training.module import GPTModule

TINY = GPTConfig(vocab_size=50, context_length=16, d_model=16, n_layers=1, n_heads=2, d_ff=32)


def module(**optimizer) -> GPTModule:
    torch.manual_seed(0)
    settings = OptimizerConfig(**{"warmup_steps": 2, **optimizer})
    return GPTModule(TINY, settings, n_steps=10, tokens_per_step=64, bytes_per_token=3.5)


def test_validation_perplexity_does_not_depend_on_the_batches(monkeypatch):
    gpt_module = module()
    ids = torch.randint(0, 50, (7, 16))
    targets = torch.randint(0, 50, (7, 16))
    targets[6, 5:] = IGNORE_INDEX  # a short last window
    logged: dict[str, float] = {}
    monkeypatch.setattr(gpt_module, "log_dict", lambda metrics, **_: logged.update(metrics))
    gpt_module._trainer = type("T", (), {"global_step": 3})()  # type: ignore[assignment]
    for rows in ([0, 1, 2], [3, 4], [5, 6]):
        gpt_module.validation_step((ids[rows], targets[rows]), 0)
    gpt_module.on_validation_epoch_end()
    logits = gpt_module(ids).detach().float()
    expected = Perplexity(ignore_index=IGNORE_INDEX)(logits, targets)
    assert logged["val/perplexity"] == pytest.approx(float(expected), rel=1e-5)
    bits = logged["val/loss"] / math.log(2) / 3.5
    assert logged["val/bits_per_byte"] == pytest.approx(bits)
    assert logged["tokens"] == 3 * 64
