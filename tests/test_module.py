import math
from itertools import pairwise

import pytest
import torch
from torchmetrics.text import Perplexity

from minigpt.model import IGNORE_INDEX, GPTConfig
from minigpt.module import GPTModule, OptimizerConfig, default_lr, lr_factor

TINY = GPTConfig(vocab_size=50, context_length=16, d_model=16, n_layers=1, n_heads=2, d_ff=32)


def module(**optimizer) -> GPTModule:
    torch.manual_seed(0)
    settings = OptimizerConfig(**{"warmup_steps": 2, **optimizer})
    return GPTModule(TINY, settings, n_steps=10, tokens_per_step=64, bytes_per_token=3.5)


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine_to_zero():
    curve = [lr_factor(step, 110, 10, 0.0) for step in range(110)]
    assert curve[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert curve[10] == 1.0
    assert curve[60] == pytest.approx(0.5)
    assert all(a > b for a, b in pairwise(curve[10:]))
    assert 0 < curve[-1] < 1e-3
    assert lr_factor(110, 110, 10, 0.0) == pytest.approx(0.0)


def test_the_cosine_ends_at_the_floor_that_is_asked_for():
    assert lr_factor(110, 110, 10, 0.1) == pytest.approx(0.1)
    assert lr_factor(60, 110, 10, 0.1) == pytest.approx(0.55)


def test_the_default_learning_rate_falls_with_width():
    assert default_lr(128) == pytest.approx(4e-3)
    assert default_lr(384) == pytest.approx(4e-3 / 3)


def test_weight_decay_is_on_matrices_alone():
    made = module()
    made._trainer = type("T", (), {"precision_plugin": None})()  # type: ignore[assignment]
    groups = made.configure_optimizers()["optimizer"].param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.dim() == 2 for p in groups[0]["params"])
    assert all(p.dim() == 1 for p in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(made.net.parameters()))


def test_validation_perplexity_is_that_of_the_whole_split_whatever_the_batches(monkeypatch):
    made = module()
    ids = torch.randint(0, 50, (7, 16))
    targets = torch.randint(0, 50, (7, 16))
    targets[6, 5:] = IGNORE_INDEX  # a short last window
    logged: dict[str, float] = {}
    monkeypatch.setattr(made, "log_dict", lambda metrics, **_: logged.update(metrics))
    made._trainer = type("T", (), {"global_step": 3})()  # type: ignore[assignment]
    for rows in ([0, 1, 2], [3, 4], [5, 6]):
        made.validation_step((ids[rows], targets[rows]), 0)
    made.on_validation_epoch_end()
    logits = made(ids).detach().float()
    expected = Perplexity(ignore_index=IGNORE_INDEX)(logits, targets)
    assert logged["val/perplexity"] == pytest.approx(float(expected), rel=1e-5)
    bits = logged["val/loss"] / math.log(2) / 3.5
    assert logged["val/bits_per_byte"] == pytest.approx(bits)
    assert logged["tokens"] == 3 * 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr 0.0 must be positive"),
        ({"beta2": 1.0}, r"beta2 1.0 is not in \[0, 1\)"),
        ({"weight_decay": -0.1}, "weight_decay -0.1 must not be negative"),
        ({"final_lr": 2.0}, "final_lr 2.0 is a share of the peak"),
    ],
)
def test_optimizer_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)
