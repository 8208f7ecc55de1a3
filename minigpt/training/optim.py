"""Optimizers (Muon, AdamW), their default learning rates and the learning-rate schedule."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from minigpt.kernels.cuda_graph import recorded
from minigpt.kernels.microbatch import thread_pool
from minigpt.training.config import LARGE_BATCH, OptimizerConfig


def default_lr(d_model: int, name: str = "muon") -> float:
    """Return the default peak learning rate of AdamW.

    For "muon", AdamW trains only the embedding, biases and norms. The default is then 8e-3 at width
    128 and proportional to 1 / sqrt(d_model), as measured in docs/LOG.md. For "adamw", AdamW trains
    all weights. The default is then 4e-3 at width 128 and proportional to 1 / d_model (Yang et al.
    2022, arXiv:2203.03466).

    Args:
        d_model: width of the model.
        name: "muon" or "adamw", as in `OptimizerConfig`.
    """
    return 8e-3 * (128 / d_model) ** 0.5 if name == "muon" else 4e-3 * 128 / d_model


def default_matrix_lr(d_model: int) -> float:
    """Return the default peak learning rate of Muon: 8e-3 at width 128.

    The elements of an update have the same size at any width, so the spectral norm of the update
    grows as sqrt(d_model). The default is therefore proportional to 1 / sqrt(d_model).

    Args:
        d_model: width of the model.
    """
    return 8e-3 * (128 / d_model) ** 0.5


def peak_lrs(config: OptimizerConfig, d_model: int, tokens_per_step: int = 0) -> dict[str, float]:
    """Return the peak learning rates by setting name, with defaults for those that are None.

    Args:
        config: settings of the optimizer.
        d_model: width of the model.
        tokens_per_step: number of training tokens in one update. If `config.follow_batch` is true
            and the number is above `LARGE_BATCH`, the defaults are multiplied by the square root
            of their ratio, as measured in docs/LOG.md.
    """
    ratio = max(1.0, tokens_per_step / LARGE_BATCH) if config.follow_batch else 1.0
    factor = ratio**0.5
    lrs = {"lr": config.lr or factor * default_lr(d_model, config.name)}
    if config.name == "muon":
        lrs["matrix_lr"] = config.matrix_lr or factor * default_matrix_lr(d_model)
    return lrs


def lr_factor(
    step: int, n_steps: int, warmup_steps: int, final_lr: float, schedule: str | None = "cosine",
    cycle_ends: Sequence[int] = (), cycle_lr: float = 1.0,
) -> float:  # fmt: skip
    """Return the learning rate of update `step` as a fraction of the peak learning rate.

    The fraction rises linearly to 1 at update `warmup_steps - 1`. Then, in the main decay, it falls
    along half a cosine or a straight line. It would reach `final_lr` at update `n_steps`, but the
    last update of the main decay is `n_steps - 1`. So no update has a learning rate of zero, even
    if `final_lr` is 0. The main decay may be followed by cycles. In each cycle, the fraction starts
    at `cycle_lr` and falls in the same way.

    Args:
        step: number of the update, from 0.
        n_steps: number of updates in the warm-up and the main decay.
        warmup_steps: number of updates in the warm-up.
        final_lr: fraction of the peak at the end of each decay, from 0 to 1.
        schedule: "cosine" or "linear".
        cycle_ends: for each cycle, the number of updates from the start of the run to the end of
            the cycle; each number is above `n_steps`.
        cycle_lr: fraction of the peak at the start of each cycle, from `final_lr` to 1.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    ends = [warmup_steps, n_steps, *cycle_ends]
    i = min(max(1, bisect_right(ends, step)), len(ends) - 1)  # the decay that contains `step`
    left = 1 - min(1.0, (step - ends[i - 1]) / max(1, ends[i] - ends[i - 1]))
    if schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return final_lr + ((1.0 if i == 1 else cycle_lr) - final_lr) * left


def set_weight_decay(
    optimizer: Optimizer, config: OptimizerConfig, step: int, n_steps: int
) -> None:
    """Set the weight decay of matrices and embeddings for one update.

    The weight decay changes linearly from `config.weight_decay` in the first update to
    `config.final_weight_decay` in the last one. If `config.final_weight_decay` is None, nothing is
    set.

    Args:
        optimizer: result of `make_optimizer`.
        config: settings of the optimizer.
        step: number of the update, from 0.
        n_steps: number of updates in the run.
    """
    if config.final_weight_decay is None:
        return
    change = config.final_weight_decay - config.weight_decay
    weight_decay = config.weight_decay + change * step / max(1, n_steps - 1)
    for group in optimizer.param_groups:
        if any(parameter.dim() > 1 for parameter in group["params"]):
            group["weight_decay"] = weight_decay


def make_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    lrs: Mapping[str, float],
    fused: bool = True,
    dtype: torch.dtype = torch.float32,
    graphed: bool = False,
) -> Optimizer:
    """Return the optimizer for the weights of `model`.

    Weight decay applies to matrices, including embeddings, but not to biases and norms. If `config`
    selects AdamW, AdamW trains all weights. If `config` selects Muon, Muon trains the matrices
    whose name does not contain "embedding", and AdamW trains all other weights: embeddings, biases,
    norms, and tensors with more than two dimensions.

    Args:
        model: the model.
        config: name and settings of the optimizer.
        lrs: peak learning rates by setting name, such as the result of `peak_lrs`.
        fused: whether AdamW runs as one kernel. If not, a GPU updates all weights with a few
            kernels, and a CPU one weight at a time.
        dtype: dtype of Muon's matrix products; bfloat16 is precise enough.
        graphed: whether Muon records and replays CUDA graphs.
    """
    matrices, embeddings, vectors = [], [], []  # vectors: biases and norms
    for name, parameter in model.named_parameters():
        # Muon is for matrices; AdamW trains the kernels of convolutions in custom classes.
        matrix = matrices if parameter.dim() == 2 and "embedding" not in name else embeddings
        (vectors if parameter.dim() < 2 else matrix).append(parameter)
    decayed = embeddings if config.name == "muon" else matrices + embeddings
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": vectors}]
    # None, because with False PyTorch would not select its `foreach` kernels on a GPU.
    how, betas = fused or None, (config.beta1, config.beta2)
    adamw = AdamW(groups, lrs["lr"], betas, weight_decay=0.0, fused=how)
    if config.name == "adamw":
        return adamw
    rates = lrs["matrix_lr"], config.momentum, config.weight_decay
    return CombinedOptimizer(adamw, Muon(matrices, *rates, dtype, config.normalize_rows, graphed))


class Muon(Optimizer):
    """Optimizer for matrices: SGD with Nesterov momentum and orthogonalised updates.

    The method is by Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/). Each update is
    scaled by 0.2 · sqrt(max(rows, columns)). The scaled update has the size of an AdamW update at
    the same learning rate (Liu et al. 2025, arXiv:2502.16982, section 2.2). Unlike
    torch.optim.Muon, this class orthogonalises several small matrices at a time, which is faster:
    all matrices of one shape form a batch, except in float32 on a CPU, where each thread updates
    whole matrices. This class can also compute in float32, for devices on which bfloat16 is not
    faster.

    Args:
        matrices: parameters with two dimensions.
        lr: learning rate.
        momentum: decay of the running mean of the gradients, from 0 to below 1.
        weight_decay: decoupled weight decay, multiplied by `lr` in each update.
        dtype: dtype of the matrix products.
        normalize_rows: when to scale the rows of each matrix to equal norms. "before" scales the
            rows of the momentum before orthogonalisation, as in MuonEq-R (Chang et al. 2026,
            arXiv:2603.28254). "after" scales the rows of the orthogonalised update, as in Muon+
            (arXiv:2602.21545), and keeps the norm of the whole update, as in NorMuon (Li et al.
            2025, arXiv:2510.05491). None means that rows are not scaled.
        graphed: whether to record CUDA graphs, one for each shape. A graph orthogonalises all
            matrices of its shape with about twenty kernels. It contains neither the learning rate
            nor the state. All matrices must be on the same device.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.float32,
        normalize_rows: str | None = None,
        graphed: bool = False,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype, self.normalize_rows, self.graphed = dtype, normalize_rows, graphed
        # For each shape (k, m, n): the momenta that its graph reads, and a function to replay it.
        self._graphs: dict[torch.Size, tuple[Tensor, Callable[[], Tensor]]] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix (m, n) that has a gradient."""
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            update = partial(self._update, group)
            on_cpu = all(matrix.device.type == "cpu" for matrix in matrices)
            if on_cpu and self.dtype == torch.float32 and not self.graphed:
                n_threads = torch.get_num_threads()
                run = map if n_threads == 1 else thread_pool(n_threads).map
                largest_first = sorted(matrices, key=torch.numel, reverse=True)  # for equal loads
                list(run(update, ([matrix] for matrix in largest_first)))
                continue
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for matrix in matrices:
                by_shape.setdefault(matrix.shape, []).append(matrix)
            for batch in by_shape.values():
                update(batch)

    @torch.no_grad()  # in each thread, because grad mode is per thread
    def _update(self, group: dict[str, Any], matrices: list[Tensor]) -> None:
        """Update matrices of one shape (m, n); on a GPU, each kernel processes all of them."""
        momenta = torch.stack(self._momenta(matrices, group["momentum"]))
        updates = self._replayed(momenta) if self.graphed else self._orthogonalised(momenta)
        size = 0.2 * math.sqrt(max(momenta.shape[1:]))
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])  # type: ignore[attr-defined]
        torch._foreach_add_(matrices, updates.unbind(), alpha=-group["lr"] * size)  # type: ignore[attr-defined]

    def _replayed(self, momenta: Tensor) -> Tensor:
        """Return the result of `_orthogonalised` from a CUDA graph; the next call overwrites it."""
        if momenta.shape not in self._graphs:
            own = momenta.clone()
            self._graphs[own.shape] = own, recorded(lambda: self._orthogonalised(own), own.device)
        own, replay = self._graphs[momenta.shape]
        own.copy_(momenta)
        return replay()

    def _orthogonalised(self, momenta: Tensor) -> Tensor:
        """Return the orthogonalised updates (k, m, n) for the momenta (k, m, n) of k matrices."""
        if self.normalize_rows == "before":
            momenta = F.normalize(momenta, dim=2)
        updates = newton_schulz(momenta.to(self.dtype)).to(momenta.dtype)
        if self.normalize_rows == "after":
            norms = updates.norm(dim=(1, 2), keepdim=True)
            updates = F.normalize(updates, dim=2) * (norms / math.sqrt(updates.shape[1]))
        return updates

    def _momenta(self, matrices: list[Tensor], momentum: float) -> tuple[Tensor, ...]:
        """Update the running means of the gradients, and return the Nesterov momenta.

        A Nesterov momentum is the running mean, averaged once more with the current gradient.
        """
        means, gradients = list[Tensor](), list[Tensor]()
        for matrix in matrices:
            assert matrix.grad is not None
            if not (state := self.state[matrix]):
                state["momentum"] = torch.zeros_like(matrix)
            means.append(state["momentum"])
            gradients.append(matrix.grad)
        torch._foreach_lerp_(means, gradients, 1 - momentum)  # type: ignore[attr-defined]
        return torch._foreach_lerp(gradients, means, momentum)  # type: ignore[attr-defined]


def newton_schulz(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return approximately U Vᵀ for each matrix, whose singular value decomposition is U S Vᵀ.

    This is the Newton-Schulz iteration X ← a X + (b A + c A²) X with A = X Xᵀ and the coefficients
    of Jordan et al. 2024. After five steps, all singular values except very small ones are between
    about 0.7 and 1.2, not exactly 1.

    Args:
        matrices: tensor (k, m, n) of k matrices.
        steps: number of iterations.

    Returns:
        A tensor of the same shape.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (k, m, m), where m is the smaller side
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class CombinedOptimizer(Optimizer):
    """Several optimizers as one, because Lightning expects a single optimizer.

    The parts share the parameter groups and the state of this object. Schedules, checkpoints and
    moves between devices therefore handle a single optimizer.

    Args:
        parts: the optimizers, with disjoint parameters.
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
        """Set the parameter groups and the state, also in the optimizers that are combined.

        `load_state_dict` calls this method with new groups and a new state.
        """
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Call `closure` once, take a step with each optimizer, and return the closure's value."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss
