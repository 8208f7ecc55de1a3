"""The whole model: a pre-norm, weight-tied GPT with fixed sinusoidal positions.

Reads top to bottom: settings, positions, attention, feed-forward, block, GPT. Pure PyTorch; no
Lightning, no Hydra. In the shape comments B is the batch, T the tokens of a window, d the width
(`d_model`), nh the heads, dk = d / nh, V the vocabulary.

    >>> net = GPT(GPTConfig(d_model=128, n_heads=4, d_ff=256))
    >>> logits = net(torch.randint(0, 3000, (2, 256)))  # (2, 256, 3000)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = -100  # a target that is not scored: padding
LARGEST = 10**9  # weights and positions: beyond, a size was mistyped


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. The defaults are the small size, 1,046,656 parameters."""

    vocab_size: int = 3000
    context_length: int = 256  # tokens the model sees at once
    d_model: int = 128  # width of the residual stream
    n_layers: int = 5
    n_heads: int = 4  # each of width d_model / n_heads
    d_ff: int = 256  # width inside the feed-forward
    dropout: float = 0.0  # on the embedding sum and on what each sublayer adds
    embedding_scale: float | None = None  # on the embedding before positions; None: sqrt(d_model)
    attention: Literal["auto", "sdpa", "matmul"] = "auto"  # how it is computed, not what

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "d_model", "n_layers", "n_heads", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        size = self.d_model * (self.vocab_size + self.context_length)
        size += self.n_layers * self.d_model * (4 * self.d_model + 2 * self.d_ff)
        if size > LARGEST:
            raise ValueError(
                f"{size:.0e} weights are more than {LARGEST:.0e}: take a smaller d_model, d_ff, "
                "n_layers, vocab_size or context_length"
            )
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}")
        if self.d_model % 2:
            raise ValueError(f"d_model {self.d_model} is odd: sinusoids come in sine-cosine pairs")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")
        if self.embedding_scale is not None and self.embedding_scale <= 0:
            raise ValueError(f"embedding_scale {self.embedding_scale} must be positive")


def sinusoids(length: int, d_model: int) -> Tensor:
    """Position table (length, d_model): sine in the even columns, cosine in the odd ones.

    Column pair i turns with wavelength 2π · 10000^(2i / d_model) tokens (Vaswani et al. 2017,
    section 3.5). Computed in float64, so that every device has the same float32 table.
    """
    position = torch.arange(length, dtype=torch.float64)[:, None]
    frequency = 10000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    angle = position * frequency  # (length, d/2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


class KVCache:
    """Keys and values of the tokens seen so far, so that a new token costs one token's work.

    `GPT.forward(ids, cache)` appends to it, as many tokens to each row.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []  # keys and values, each (B, nh, T, dk)

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k, v (B, nh, T, dk) behind what `layer` holds; return all it holds then."""
        if layer < len(self.layers):
            held_k, held_v = self.layers[layer]
            k, v = torch.cat([held_k, k], dim=2), torch.cat([held_v, v], dim=2)
        self.layers[layer : layer + 1] = [(k, v)]
        return k, v


class CausalSelfAttention(nn.Module):
    """Each token gathers from itself and the tokens before it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_heads = layer, config.n_heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)
        # fast.py may put another in its place.
        self.attend: Callable[[Tensor, int], Tensor] = partial(attention, how=config.attention)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:  # (B, T, d) -> (B, T, d)
        qkv = self.qkv(x)  # (B, T, 3 d)
        if cache is None:
            return self.out(self.attend(qkv, self.n_heads))
        q, k, v = split_heads(qkv, self.n_heads)
        return self.out(merge_heads(attend(q, *cache.append(self.layer, k, v))))


def attention(qkv: Tensor, n_heads: int, how: str = "auto") -> Tensor:
    """Causal self-attention of (B, T, 3 d), queries, keys and values side by side: (B, T, d)."""
    return merge_heads(attend(*split_heads(qkv, n_heads), how))


def split_heads(qkv: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3 d) as queries, keys and values, each (B, nh, T, dk); views, nothing is copied."""
    q, k, v = qkv.unflatten(-1, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def merge_heads(y: Tensor) -> Tensor:
    """(B, nh, T, dk) as (B, T, d)."""
    return y.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, how: str = "auto") -> Tensor:
    """Causal attention of queries (B, nh, T, dk) over keys and values (B, nh, S, dk), S >= T.

    The queries are the last T of the S positions. `how` picks the kernel and not the result:
    `sdpa` is PyTorch's fused one; `matmul` spells it out, which is faster on CPUs at this head
    size; `auto` takes matmul on CPU and sdpa elsewhere.
    """
    T, S, dk = q.shape[2], k.shape[2], q.shape[3]  # noqa: N806
    if how == "sdpa" or (how == "auto" and q.device.type != "cpu"):
        if T == S:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(T, S, q))
    scores = (q * dk**-0.5) @ k.transpose(-2, -1)  # (B, nh, T, S)
    return (scores + causal_mask(T, S, scores)).softmax(dim=-1).to(v.dtype) @ v


def causal_mask(T: int, S: int, like: Tensor) -> Tensor:  # noqa: N803
    """(T, S): 0 where query t may look at key s (s <= t + S - T), -inf elsewhere."""
    return torch.full((T, S), -math.inf, dtype=like.dtype, device=like.device).triu(S - T + 1)


class FeedForward(nn.Module):
    """Two linear layers with a GELU between, on each token by itself."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm: each sublayer reads a normalised stream and adds to the plain one."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.d_model)
        self.attention = CausalSelfAttention(config, layer)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:  # (B, T, d) -> (B, T, d)
        x = x + self.dropout(self.attention(self.norm1(x), cache))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class GPT(nn.Module):
    """Token ids in, logits of the next token out.

    Initial weights:

    | what                             | how                                                  |
    |----------------------------------|------------------------------------------------------|
    | token embedding (and output)     | normal, std 0.3 / sqrt(d_model): logits of std 0.3   |
    |                                  | at any width, so the first loss is ln V + 0.05       |
    | linear weights                   | normal, std 0.02                                     |
    | `attention.out`, `down` weights  | normal, std 0.02 / sqrt(2 n_layers) (GPT-2): what    |
    |                                  | the residual stream gathers does not grow with depth |
    | biases; LayerNorm weight, bias   | 0; 1, 0                                              |

    The output projection is the embedding matrix itself. The embedding is multiplied by
    `embedding_scale` before the positions are added: so small, it would drown in sinusoids of
    amplitude 1 (Vaswani et al. 2017, section 3.4, scale by sqrt(d_model) as well).
    """

    positions: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.scale = config.embedding_scale or math.sqrt(config.d_model)
        table = sinusoids(config.context_length, config.d_model)
        self.register_buffer("positions", table, persistent=False)  # a formula, not a weight
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.d_model)
        self.cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor] = linear_cross_entropy
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
                std = 0.02 / math.sqrt(2 * self.config.n_layers) if residual else 0.02
                nn.init.normal_(parameter, std=std)
        nn.init.normal_(self.embedding.weight, std=0.3 / math.sqrt(self.config.d_model))

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) of the token after each of `ids` (B, T).

        With a `cache`, `ids` continue the tokens it holds, and it then holds them too. Raises
        ValueError when the tokens are more than the context.
        """
        return F.linear(self.hidden(ids, cache), self.embedding.weight)

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """The normalised residual stream (B, T, d) after the last block."""
        start = cache.length if cache is not None else 0
        end = start + ids.shape[1]
        if end > self.config.context_length:
            raise ValueError(f"{end} tokens do not fit the context of {self.config.context_length}")
        x = self.dropout(self.embedding(ids) * self.scale + self.positions[start:end])  # (B, T, d)
        for block in self.blocks:
            x = block(x, cache)
        return self.final_norm(x)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats (float32) of targets (B, T) that are not IGNORE_INDEX."""
        return self.cross_entropy(self.hidden(ids), self.embedding.weight, targets)

    @property
    def n_parameters(self) -> int:
        """Trainable parameters; the tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    @property
    def n_embedding_parameters(self) -> int:
        """Those of the token embedding, which is also the output projection."""
        return self.embedding.weight.numel()

    def flops_per_token(self) -> int:
        """FLOPs of a training step, forward and backward, for each token: 6 N + 12 L T d.

        N counts the parameters that multiply (every matrix, the tied one once, as the output);
        attention is counted as if it were not causal (PaLM, Chowdhery et al. 2022, appendix B).
        """
        matrices = sum(p.numel() for p in self.parameters() if p.dim() == 2)
        c = self.config
        return 6 * matrices + 12 * c.n_layers * c.context_length * c.d_model


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats and float32, of the logits `hidden` (B, T, d) @ `weight` (V, d).

    Targets (B, T) that are IGNORE_INDEX do not count.
    """
    logits = F.linear(hidden, weight).float()  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)


def perplexity(nats_per_token: float) -> float:
    """exp of the mean cross-entropy; infinity where a float cannot hold it."""
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf
