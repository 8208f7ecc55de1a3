"""The choice of kernels: by device, or by the name that is typed as `trainer.kernels`."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from minigpt.core.settings import UserError
from minigpt.kernels.cpu import CPU
from minigpt.model import Kernels

Choice = Literal["auto", "torch", "cpu"]


def kernels_for(device: str, choice: Choice = "auto") -> Kernels:
    """Return what computes attention and loss on `device`, such as "cpu" or "cuda".

    Args:
        device: the type of device that the model is on.
        choice: "cpu" means the kernels of this package for CPUs, "torch" those of PyTorch; "auto"
            takes the first on a CPU and the second elsewhere.

    Raises:
        UserError: "cpu" was chosen for another device.
    """
    if choice == "cpu" and device != "cpu":
        raise UserError(f"the device is {device}", "kernels", choice, fix={"kernels": "auto"})
    if device != "cpu":
        return Kernels(attention=fused_attention)
    return Kernels() if choice == "torch" else CPU


def fused_attention(qkv: Tensor, n_heads: int) -> Tensor:
    """Compute causal self-attention of (B, T, 3 d) by PyTorch's fused operator: (B, T, d).

    On CPUs it is slower, at heads of width 32, than products that are spelled out.
    """
    q, k, v = qkv.unflatten(-1, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, nh, T, dk)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).flatten(2)
