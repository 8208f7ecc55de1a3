"""A small model with random weights, and a call that runs out of memory."""

import torch

from minigpt.model import GPT, GPTConfig

TINY = GPTConfig(vocab_size=290, context_length=16, d_model=16, n_layers=2, n_heads=2, d_ff=16)


def make_net() -> GPT:
    torch.manual_seed(0)
    net = GPT(TINY)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return net


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
