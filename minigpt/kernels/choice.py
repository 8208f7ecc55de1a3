"""Choice of kernels by device, by the setting `trainer.kernels` and by model; batch sizes."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.core.settings import UserError
from minigpt.kernels.cpu import CPU
from minigpt.kernels.cross_entropy import chunked_cross_entropy
from minigpt.model import GPT, Block, CausalSelfAttention, FeedForward, GPTConfig, Kernels

Choice = Literal["auto", "torch", "cpu"]


def kernels_for(device: str, choice: Choice = "auto") -> Kernels:
    """Return the implementations of attention and loss for a device.

    Args:
        device: type of the model's device, such as "cpu" or "cuda".
        choice: "cpu" selects the kernels in cpu.py, which run only on CPUs. "torch" selects the
            code of model.py on a CPU, and fused attention with a chunked loss on other devices.
            "auto" is the same as "cpu" on a CPU, and the same as "torch" on other devices.

    Returns:
        The kernels, to be passed to `GPT.use`.

    Raises:
        UserError: `choice` is "cpu", but `device` is not.
    """
    if choice == "cpu" and device != "cpu":
        problem = f"these kernels run on a CPU, but the device is {device}"
        raise UserError(problem, "kernels", choice, fix={"kernels": "auto"})
    if device != "cpu":
        return Kernels("torch", fused_attention, chunked_cross_entropy)
    return Kernels() if choice == "torch" else CPU


_FORWARDS = {cls: cls.forward for cls in (GPT, Block, CausalSelfAttention, FeedForward)}
_HIDDEN = GPT.hidden


def is_plain(model: GPT) -> bool:
    """Return whether `model` is exactly a `GPT`: no subclass, no hooks, no replaced parts."""
    return (
        type(model) is GPT
        and type(model.config) is GPTConfig
        and all(cls.forward is forward for cls, forward in _FORWARDS.items())
        and GPT.hidden is _HIDDEN
        and not any(
            m._forward_hooks or m._forward_pre_hooks or {"forward", "hidden"} & vars(m).keys()
            for m in model.modules()
        )
        and _parts(model) == _parts_of(model.config)
    )


def _parts(model: GPT) -> list[tuple[Any, ...]]:
    modules = [(name, type(m), getattr(m, "eps", None)) for name, m in model.named_modules()]
    return [*modules, *((name, weight.shape) for name, weight in model.named_parameters())]


@functools.cache
def _parts_of(config: GPTConfig) -> list[tuple[Any, ...]]:
    with torch.device("meta"):
        return _parts(GPT(config))


_MAX_SEQUENCES = 1024  # more do not make a GPU faster


def sequences_at_once(model: GPT, on_cpu: int) -> int:
    """Return the number of sequences to generate or to score in one batch.

    On a CUDA GPU, the keys, values and logits of the batch should fit into a quarter of the memory.

    Args:
        model: the model, on its device.
        on_cpu: the number of sequences on a CPU, and on other devices without CUDA.

    Returns:
        On a CUDA GPU, a multiple of `on_cpu` that does not exceed 1,024, but at least `on_cpu`. On
        other devices, `on_cpu`.
    """
    weight, c = model.embedding.weight, model.config
    if weight.device.type != "cuda":
        return on_cpu
    numbers = c.context_length * (2 * c.n_layers * c.d_model + 2 * c.vocab_size)
    memory = torch.cuda.get_device_properties(weight.device).total_memory // 4
    fitting = min(_MAX_SEQUENCES, memory // (numbers * weight.element_size()))
    return max(1, fitting // on_cpu) * on_cpu


def fused_attention(qkv: Tensor, n_heads: int) -> Tensor:
    """Return causal self-attention, computed by PyTorch's fused operator.

    With heads of width 32, separate matrix products are faster than this operator on CPUs.

    Args:
        qkv: queries, keys and values (B, T, 3 d), concatenated.
        n_heads: number of heads, a divisor of d.

    Returns:
        The attention output of all heads, concatenated (B, T, d).
    """
    q, k, v = qkv.unflatten(-1, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, nh, T, hs)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
