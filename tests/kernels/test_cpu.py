"""Kernels for CPUs give the results of model.py."""

import copy
from itertools import islice
from statistics import fmean

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from minigpt.data.config import DataConfig
from minigpt.data.datamodule import DataModule
from minigpt.data.sources import bundled_sample
from minigpt.kernels.cpu import BLOCK, CPU, block_attention
from minigpt.model import GPT, GPTConfig
from minigpt.training.config import OptimizerConfig
from minigpt.training.optim import lr_factor, make_optimizer, peak_lrs


def attention(qkv: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Causal attention of (B, T, 3 d) as the paper writes it."""
    q, k, v = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-2, -1) / q.shape[3] ** 0.5).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((a.detach().float() - b.detach().float()).norm() / b.detach().float().norm())


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 5, 256])
@pytest.mark.parametrize("n_heads", [1, 3])
def test_block_attention_and_its_gradient_are_those_of_attention(dtype, close, length, n_heads):
    torch.manual_seed(0)
    plain = torch.randn(2, length, 3 * n_heads * 16, requires_grad=True)
    fast = plain.detach().to(dtype).requires_grad_()
    expected, result = attention(plain, n_heads), block_attention(fast, n_heads)
    downstream = torch.randn(expected.shape)
    expected.backward(downstream)
    result.backward(downstream.to(dtype))
    assert result.dtype == dtype
    assert result.shape == expected.shape
    assert apart(result, expected) < close
    assert apart(fast.grad, plain.grad) < close


@pytest.mark.long
def test_training_loss_with_cpu_kernels_equals_that_of_pytorch(tmp_path):
    stories = "\n<|endoftext|>\n".join(islice(bundled_sample().stories("train"), 600))
    (tmp_path / "stories.txt").write_text(stories, encoding="utf-8")
    settings = DataConfig(
        "text", (str(tmp_path / "stories.txt"),), vocab_size=500, batch_size=4,
        cache_dir=str(tmp_path),
    )  # fmt: skip
    data = DataModule(settings, 96, n_steps=200, seed=1)
    data.setup("fit")
    torch.manual_seed(0)
    plain = GPT(GPTConfig(500, 96, d_model=32, n_layers=2, n_heads=2, d_ff=64))
    fast = copy.deepcopy(plain).use(CPU)
    assert fast.blocks[0].attention.kernels.attention is block_attention
    expected = _final_loss(plain, data, torch.float32)
    result = _final_loss(fast, data, torch.bfloat16)
    assert expected < 4.0  # from 6.2: something was learned
    assert result == pytest.approx(expected, rel=0.005)


def _final_loss(model, data, dtype):
    """Of the last 20 steps, with the schedule of train.py: at a constant rate even the order of
    additions decides where 200 steps end."""
    config = OptimizerConfig()
    optimizer = make_optimizer(model, config, peak_lrs(config, 32), dtype=dtype)
    schedule = LambdaLR(optimizer, lambda step: lr_factor(step, data.n_steps, 20, 0.0, "linear"))
    losses = []
    for ids, targets in data.train_dataloader():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model.loss(ids, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return fmean(losses[-20:])
