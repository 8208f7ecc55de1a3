"""Training steps of other implementations of the same model, for benchmarks/gpu.py.

Each has this project's shape, batch and number of tokens, and the settings that make it fast on a
GPU: AdamW as one kernel, bfloat16 autocast, batches in pinned memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.model import GPTConfig

Step = Callable[[], Any]
Compile = Callable[[Any], Any]  # from a function or module to a faster one


def transformers_step(
    shape: GPTConfig, tokens: np.ndarray, batch: int, device: torch.device,
    compile: Compile | None = None,
) -> Step:  # fmt: skip
    """Return a training step of `GPT2LMHeadModel`, eager or compiled."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.GPT2Config(
        vocab_size=shape.vocab_size, n_positions=shape.context_length, n_embd=shape.d_model,
        n_layer=shape.n_layers, n_head=shape.n_heads, n_inner=shape.d_ff,
        activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    net: Any = transformers.GPT2LMHeadModel(config)
    net = net.to(device)

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        logits = net(ids, use_cache=False).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return _step(net, compile(loss) if compile else loss, tokens, shape, batch, device)


def nanogpt_step(
    shape: GPTConfig, tokens: np.ndarray, batch: int, device: torch.device, compile: Compile
) -> Step:
    """Return a step of the training loop of nanoGPT (https://github.com/karpathy/nanoGPT)."""
    net = NanoGPT(shape).to(device)
    return _step(net, compile(net), tokens, shape, batch, device)


def _step(
    net: nn.Module, loss_of: Callable[..., Tensor], tokens: np.ndarray, shape: GPTConfig,
    batch: int, device: torch.device,
) -> Step:  # fmt: skip
    """Return nanoGPT's step: it prefetches the next batch while the device computes."""
    on_gpu = device.type == "cuda"
    decayed = [p for p in net.parameters() if p.dim() >= 2]
    others = [p for p in net.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    random = np.random.default_rng(0)

    def next_batch() -> tuple[Tensor, Tensor]:
        starts = random.integers(len(tokens) - shape.context_length - 1, size=batch)
        rows = np.stack([tokens[s : s + shape.context_length + 1] for s in starts]).astype(np.int64)
        pair = torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())
        if not on_gpu:
            return pair
        ids, targets = (x.pin_memory().to(device, non_blocking=True) for x in pair)
        return ids, targets

    following = [next_batch()]

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = loss_of(*following.pop())
        following.append(next_batch())
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


class NanoGPT(nn.Module):
    """The model of nanoGPT, with biases, without dropout; `forward` returns the mean loss."""

    def __init__(self, shape: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_size, shape.d_model)
        self.wpe = nn.Embedding(shape.context_length, shape.d_model)
        self.blocks = nn.ModuleList(_NanoBlock(shape) for _ in range(shape.n_layers))
        self.ln_f = nn.LayerNorm(shape.d_model)
        self.lm_head = nn.Linear(shape.d_model, shape.vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class _NanoBlock(nn.Module):
    def __init__(self, shape: GPTConfig) -> None:
        super().__init__()
        d, self.n_heads = shape.d_model, shape.n_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.c_attn, self.c_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.c_fc, self.c_out = nn.Linear(d, shape.d_ff), nn.Linear(shape.d_ff, d)

    def forward(self, x: Tensor) -> Tensor:
        heads = (
            part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for part in self.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).flatten(2))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))
