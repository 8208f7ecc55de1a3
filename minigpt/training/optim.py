"""What moves the weights: settings, the optimizer they make, and the learning rate's course."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from minigpt.training.config import OptimizerConfig


def default_lr(d_model: int, name: str = "muon") -> float:
    """AdamW's peak learning rate.

    At width 128 it is 8e-3 beside Muon, where AdamW moves the embedding alone, and falls as
    1 / sqrt(d_model): measured, docs/LOG.md. By itself it is 4e-3 and falls as 1 / d_model (Yang
    et al. 2022, https://arxiv.org/abs/2203.03466).
    """
    return 8e-3 * (128 / d_model) ** 0.5 if name == "muon" else 4e-3 * 128 / d_model


def default_matrix_lr(d_model: int) -> float:
    """Muon's peak learning rate, in units of an AdamW update: 8e-3 at width 128.

    It falls as 1 / sqrt(d_model): an update's elements are of equal size at any width, so that
    what it does to a vector, its spectral norm, grows as sqrt(d_model).
    """
    return 8e-3 * (128 / d_model) ** 0.5


def peak_lrs(config: OptimizerConfig, d_model: int) -> dict[str, float]:
    """The peak learning rates that hold for this width, by the name of their setting."""
    peaks = {"lr": config.lr or default_lr(d_model, config.name)}
    if config.name == "muon":
        peaks["matrix_lr"] = config.matrix_lr or default_matrix_lr(d_model)
    return peaks


def lr_factor(
    step: int, n_steps: int, warmup_steps: int, final_lr: float, schedule: str | None = "cosine"
) -> float:
    """Share of the peak learning rate for update `step` (from 0) of `n_steps`.

    Rises linearly to 1 at update `warmup_steps - 1`, then follows half a cosine, or a line, that
    would reach `final_lr` at update `n_steps`, so that the last update still moves the weights.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    left = 1 - min(1.0, (step - warmup_steps) / max(1, n_steps - warmup_steps))
    if schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return final_lr + (1 - final_lr) * left


def make_optimizer(
    net: nn.Module,
    config: OptimizerConfig,
    d_model: int,
    fused: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Optimizer:
    """The optimizer of `net`'s weights. Decay is on its matrices, the embedding among them.

    Args:
        d_model: the width, which default learning rates depend on.
        fused: run AdamW as one kernel.
        dtype: of Muon's matrix products, for which bfloat16 is precise enough.
    """
    peaks = peak_lrs(config, d_model)
    inside, rest, vectors = [], [], []  # matrices of the blocks, other matrices, biases and norms
    for name, parameter in net.named_parameters():
        into = vectors if parameter.dim() < 2 else inside if "embedding" not in name else rest
        into.append(parameter)
    rest = rest if config.name == "muon" else inside + rest
    groups = [{"params": rest, "weight_decay": config.weight_decay}, {"params": vectors}]
    betas = config.beta1, config.beta2
    adamw = AdamW(groups, peaks["lr"], betas, weight_decay=0.0, fused=fused)
    if config.name == "adamw":
        return adamw
    muon = Muon(inside, peaks["matrix_lr"], config.momentum, config.weight_decay, dtype)
    return CombinedOptimizer(adamw, muon)


class Muon(Optimizer):
    """Momentum whose updates are made orthogonal (Jordan et al. 2024), for matrices alone.

    Each update is scaled by 0.2 · sqrt(rows or columns, the larger), which makes it as large as
    one of AdamW's at the same learning rate (Liu et al. 2025, arXiv 2502.16982, section 2.2).
    Unlike torch.optim.Muon it takes matrices of one shape through the iteration together, which is
    faster while they are small, and in float32 where bfloat16 is no gain.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix (m, n) that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in by_shape.items():
                momenta = torch.stack([self._momentum(p, group["momentum"]) for p in matrices])
                updates = newton_schulz(momenta.to(self.dtype)).to(matrices[0].dtype)
                size = 0.2 * math.sqrt(max(shape))
                for matrix, update in zip(matrices, updates, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(update, alpha=-group["lr"] * size)

    def _momentum(self, matrix: Tensor, momentum: float) -> Tensor:
        """Nesterov's: the running mean of the gradients, one step ahead."""
        assert matrix.grad is not None
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        state["momentum"].lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(state["momentum"], momentum)


def newton_schulz(matrices: Tensor, steps: int = 5) -> Tensor:
    """For each of (k, m, n) about U Vᵀ, where its singular value decomposition is U S Vᵀ.

    A Newton-Schulz iteration, X ← a X + (b A + c A²) X with A = X Xᵀ, whose coefficients (Jordan
    et al. 2024) take singular values to between 0.7 and 1.2 in five steps rather than to 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (k, m, m), m the smaller side
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class CombinedOptimizer(Optimizer):
    """Several optimizers, each with parameters of its own, as the one that Lightning expects.

    Their groups and their state are this one's, so that schedules, checkpoints and moves between
    devices see a single optimizer.
    """

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = list(islice(groups, len(part.param_groups)))
            part.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called when a state dict is loaded, which replaces groups and state."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step of each. The closure, if any, is called once; returns what it returned."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss
