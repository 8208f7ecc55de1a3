"""Distillation: a student learns from the targets and from the predictions of its teachers.

The objective is (1 − w) CE + w τ² KL(q ‖ p), where CE is the cross-entropy of the targets, q is the
mean of the teachers' probabilities, p are the student's probabilities, and both q and p have
temperature τ (Hinton et al. 2015, arXiv:1503.02531). The objective and its gradient are computed in
chunks of tokens. So the logits (B · T, V) of a whole batch are never in memory at the same time,
unless the class of a model overrides `forward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minigpt.kernels.cross_entropy import (
    TINY,
    chunk_size,
    log_likelihood,
    may_have_padding,
    softmax,
)
from minigpt.model import GPT, IGNORE_INDEX

# Hidden states (B · T, d) and the output projection (V, d); or logits (B · T, V) and None.
Rows = tuple[Tensor, Tensor | None]
Cell = tuple[Tensor, Tensor]  # row numbers (n,) and column numbers (n,) of one logit in each row


@dataclass(frozen=True)
class Distillation:
    """Loss function of a student. It is called with token ids (B, T) and targets (B, T)."""

    student: GPT
    """The model in training."""

    teachers: Sequence[GPT]
    """Frozen models with the same vocabulary, in evaluation mode, on the student's device."""

    weight: float = 0.5
    """Weight w of the divergence, from 0 to 1; the cross-entropy has the weight 1 − w."""

    temperature: float = 1.0
    """Temperature τ of the teachers' and of the student's probabilities when the divergence between
    them is computed; above 0."""

    dtype: torch.dtype = torch.float32
    """Dtype of the teachers' matrix products."""

    def __call__(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return objective, cross-entropy and divergence in one tensor, (3,) float32.

        All three are means over the targets except IGNORE_INDEX, in nats. Only the objective has a
        gradient.
        """
        mixed = self.dtype != torch.float32
        with torch.no_grad(), torch.autocast(ids.device.type, self.dtype, mixed):
            teachers = [_rows(teacher, ids) for teacher in self.teachers]
        rows, weight = _rows(self.student, ids)
        settings = teachers, self.weight, self.temperature
        return _Distillation.apply(rows, weight, targets.flatten(), *settings)  # type: ignore[no-any-return]


def _rows(model: GPT, ids: Tensor) -> Rows:
    """Return hidden states and output projection for `ids`; their product is the logits.

    If the class of the model overrides `forward`, return logits and None instead. Under autocast,
    the tensors have the dtype of autocast.
    """
    factored = type(model).forward is GPT.forward
    rows = (model.hidden(ids) if factored else model(ids)).flatten(0, 1)
    weight = model.embedding.weight if factored else None
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight = rows.to(dtype), None if weight is None else weight.to(dtype)
    return rows, weight


class _Distillation(torch.autograd.Function):
    """Autograd function for the objective of a student; `forward` also computes the gradients.

    The gradient with respect to the student's logits is ((1 − w) (P₁ − Y) + w τ (P − Q)) / n. P₁ is
    the softmax of the student's logits. P and Q are the distributions of the student and of the
    teachers at temperature τ. Y are the one-hot targets, n is the number of scored targets, and w
    is the weight of the divergence.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor | None, targets: Tensor,
        teachers: list[Rows], share: float, temperature: float,
    ) -> Tensor:  # fmt: skip
        ce, kl = torch.zeros((2,), device=rows.device)
        drows = torch.empty_like(rows)
        # float32, because it sums over all chunks
        dweight = None if weight is None else torch.zeros(weight.shape, device=rows.device)
        scored = targets != IGNORE_INDEX
        n = scored.sum()
        size = chunk_size(rows.device)
        for s in range(0, len(rows), size):
            part = slice(s, s + size)
            h, mask = rows[part], scored[part]
            target = torch.arange(len(h), device=h.device), targets[part].clamp_min(0)
            logits = _logits(h, weight, 1.0)
            p = softmax(logits)
            log_p = log_likelihood(logits, p, target)
            ce -= torch.where(mask, log_p, 0.0).sum()
            tempered, cell = p, target
            if temperature != 1:
                logits = logits / temperature
                tempered, cell = softmax(logits), _likeliest(logits)
                log_p = log_likelihood(logits, tempered, cell)
            log_partition = logits[cell].float() - log_p
            teachers_logits = [_logits(r[part], w, temperature) for r, w in teachers]
            given = target if temperature == 1 else None
            q, entropy_term = _meansoftmax(teachers_logits, given, logits)
            kl += torch.where(mask, entropy_term + log_partition, 0.0).sum()
            if temperature == 1:
                p.sub_(q, alpha=share)
            else:
                p.mul_(1 - share).add_(tempered.sub_(q), alpha=share * temperature)
            p.index_put_(target, p[target] - (1 - share))
            if may_have_padding(mask):
                p *= mask[:, None]
            if weight is None or dweight is None:
                drows[part] = p
            else:
                torch.mm(p, weight, out=drows[part])
                dweight += p.t() @ h
        ctx.save_for_backward(drows, dweight, n)
        objective = (1 - share) * ce + share * temperature**2 * kl
        return torch.stack([objective, ce, kl]) / n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        drows, dweight, n = ctx.saved_tensors
        factor = grads[0][0] / n
        return drows * factor, None if dweight is None else dweight * factor, *[None] * 4


def _meansoftmax(
    teachers: list[Tensor], target: Cell | None, student: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the teachers' mean probabilities q (n, V), and Σ q (log q − s) for each token, (n,).

    The sum is over the vocabulary; its result is float32.

    Args:
        teachers: logits (n, V) of each teacher. They may be overwritten.
        target: one logit in each row. If there is only one teacher, the log partition of each row
            is computed from this logit and its probability, which must be above 0. None selects the
            largest logit of each row, whose probability cannot underflow. With several teachers,
            `target` is not used.
        student: logits s (n, V) of the student.
    """
    if len(teachers) == 1:  # log q is logits − log partition, without a log of (n, V)
        (logits,) = teachers
        q, cell = softmax(logits), target or _likeliest(logits)
        log_partition = logits[cell].float() - log_likelihood(logits, q, cell)
        cross = torch.linalg.vecdot(q, logits.sub_(student)).float()
        return q, cross - log_partition
    q = torch.stack([softmax(logits) for logits in teachers]).mean(0)
    difference = _log(q) - student  # the student may have another dtype than the teachers
    return q, torch.linalg.vecdot(q.to(difference.dtype), difference).float()


def _likeliest(logits: Tensor) -> Cell:
    """Return row and column numbers (n,) of the largest logit in each row."""
    return torch.arange(len(logits), device=logits.device), logits.argmax(1)


def _logits(rows: Tensor, weight: Tensor | None, temperature: float) -> Tensor:
    """Return new logits (n, V), divided by the temperature. The caller may overwrite them."""
    logits = rows.clone() if weight is None else rows @ weight.t()
    return logits if temperature == 1 else logits.div_(temperature)


def _log(probabilities: Tensor) -> Tensor:
    """Return the logarithm of probabilities. The result is finite even for a probability of 0."""
    least = 2**-24 if probabilities.dtype == torch.float16 else TINY
    return probabilities.clamp_min(least).log()
