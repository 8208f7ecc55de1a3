"""The whole model: a pre-norm, weight-tied GPT with fixed sinusoidal positions.

Reads top to bottom: settings, positions, kernels, cache, attention, feed-forward, block, GPT. Pure
PyTorch. In the shape comments B is the batch, T the tokens given, S those they may look at, d the
width (`d_model`), nh the heads, dk = d / nh, V the vocabulary.

    >>> model = GPT(GPTConfig(d_model=128, n_heads=4, d_ff=256))
    >>> logits = model(torch.randint(0, 3000, (2, 256)))  # (2, 256, 3000)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = -100  # a target that is not scored: padding


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. The defaults are the small size, 1,046,656 parameters."""

    vocab_size: int = 3000
    """Number of token ids the model reads and predicts."""
    context_length: int = 256
    """Number of tokens the model sees at once."""
    d_model: int = 128
    """Width of the residual stream; even, and a multiple of `n_heads`."""
    n_layers: int = 5
    """Number of blocks."""
    n_heads: int = 4
    """Number of attention heads in each block, each of width d_model / n_heads."""
    d_ff: int = 256
    """Width inside the feed-forward layers."""
    dropout: float = 0.0
    """Dropout probability on the embedding sum and on what each sublayer adds."""
    embedding_scale: float | None = None
    """Factor on the embedding before positions are added; None means sqrt(d_model)."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "d_model", "n_layers", "n_heads", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        size = self.d_model * (self.vocab_size + self.context_length)
        size += self.n_layers * self.d_model * (4 * self.d_model + 2 * self.d_ff)
        if size > 10**9:  # weights and positions: one of these was mistyped
            raise ValueError(f"more than 1e9 weights: choose a smaller shape than {self}")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}")
        if self.d_model % 2:
            raise ValueError(f"d_model {self.d_model} is odd: sinusoids come in sine-cosine pairs")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")
        if self.embedding_scale is not None and self.embedding_scale <= 0:
            raise ValueError(f"embedding_scale {self.embedding_scale} must be positive")


def sinusoids(length: int, d_model: int) -> Tensor:
    """Return the position table (length, d_model): sine in even columns, cosine in odd ones.

    Column pair i turns with wavelength 2π · 10000^(2i / d_model) tokens (Vaswani et al. 2017,
    section 3.5). Computed in float64, so that every device has the same float32 table.
    """
    position = torch.arange(length, dtype=torch.float64)[:, None]
    frequency = 10000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    angle = position * frequency  # (length, d/2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


@dataclass(frozen=True)
class Kernels:
    """Faster ways to compute the two expensive parts of training; None means as written below."""

    name: str = "torch"
    """What a log calls them."""
    attention: Callable[[Tensor, int], Tensor] | None = None
    """Causal attention: queries, keys and values (B, T, 3 d) and n_heads to (B, T, d)."""
    linear_cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """Mean loss, in float32, of hidden (B, T, d), weight (V, d) and targets (B, T)."""


class KVCache:
    """Keys and values of the tokens read so far, so that a new token costs one token's work.

    `GPT.forward(ids, cache)` writes those of `ids` in place, behind what each sequence of the batch
    holds. There is room for `capacity` tokens in each. With `keep_weights`, each layer appends its
    attention weights (B, nh, T, S) to `weights`.
    """

    def __init__(self, capacity: int, keep_weights: bool = False) -> None:
        self.layers: list[Tensor] = []  # keys and values, (2, B, nh, capacity, dk), as they come
        self.capacity, self.length = capacity, 0  # tokens of the longest sequence
        self.lengths = torch.zeros(1, dtype=torch.long)  # (B,) of each, or (1,) of all
        self.weights: list[Tensor] | None = [] if keep_weights else None

    def truncate(self, lengths: Sequence[int]) -> None:
        """Keep the first `lengths[b]` tokens of each sequence b; what is behind was padding."""
        self.length = max(lengths)
        self.lengths = torch.tensor(lengths[:1] if min(lengths) == self.length else lengths)

    def extend(self, x: Tensor) -> Tensor:
        """Begin a pass over x (B, T, d), and return the positions of its tokens, (B, T) or (1, T).

        It also makes `mask`, (B or 1, 1, T, S): 0 where a token may look, -inf elsewhere.
        """
        new = torch.arange(x.shape[1], device=x.device)
        self.positions = self.lengths.to(x.device)[:, None] + new
        self.lengths, self.length = self.positions[:, -1] + 1, self.length + x.shape[1]
        self.layer = 0  # the one that comes next
        later = torch.arange(self.length, device=x.device) > self.positions[..., None]
        self.mask = torch.where(later, -math.inf, 0.0)[:, None]
        return self.positions

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, nh, T, dk) of the next layer, and return all it holds, (B, nh, S, dk)."""
        if self.layer == len(self.layers):  # zeros: what is masked is multiplied too
            self.layers.append(k.new_zeros(2, *k.shape[:2], self.capacity, k.shape[3]))
        held = self.layers[self.layer][:, :, :, : self.length]
        self.layer += 1
        at = self.positions[:, None, :, None].expand_as(k)
        return held[0].scatter_(2, at, k), held[1].scatter_(2, at, v)


class CausalSelfAttention(nn.Module):
    """Each token gathers from itself and the tokens before it."""

    kernels = Kernels()

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:  # (B, T, d) -> (B, T, d)
        qkv = self.qkv(x)  # (B, T, 3 d): queries, keys and values side by side
        if cache is None and self.kernels.attention is not None:
            return self.out(self.kernels.attention(qkv, self.n_heads))
        q, k, v = qkv.unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, nh, T, dk)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, nh, S, dk)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, nh, T, S)
        mask = torch.full_like(scores[0, 0], -math.inf).triu(1) if cache is None else cache.mask
        weights = (scores + mask).softmax(dim=-1)
        if cache is not None and cache.weights is not None:
            cache.weights.append(weights)
        y = weights.to(v.dtype) @ v  # (B, nh, T, dk)
        return self.out(y.transpose(1, 2).flatten(2))  # heads side by side: (B, T, d)


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

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.d_model)
        self.attention = CausalSelfAttention(config)
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

    A subclass overrides one of two methods. With `hidden` it keeps the fused loss, the
    cross-entropy of `hidden(ids) @ embedding.weight.T`. With `forward` its loss is the
    cross-entropy of the logits that `forward` returns. Either way `loss` is what training,
    validation and evaluation measure, and generation samples from `forward`. A method that takes no
    `cache` is decoded by a full pass for each token. `config_class` names a dataclass derived from
    GPTConfig, for parameters of the subclass's own.
    """

    config_class: ClassVar[type[GPTConfig]] = GPTConfig
    kernels = Kernels()
    positions: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.scale = config.embedding_scale or math.sqrt(config.d_model)
        table = sinusoids(config.context_length, config.d_model)
        self.register_buffer("positions", table, persistent=False)  # a formula, not a weight
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.d_model)
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

    def use(self, kernels: Kernels) -> Self:
        """Compute with `kernels` from now on, and return the model. They change no weight."""
        for module in self.modules():
            if isinstance(module, GPT | CausalSelfAttention):
                module.kernels = kernels
        return self

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the logits (B, T, V) of the token after each of `ids` (B, T).

        With a `cache`, `ids` continue the tokens it holds, and it then holds them too.

        Raises:
            ValueError: the tokens are more than the context.
        """
        hidden = self.hidden(ids) if cache is None else self.hidden(ids, cache)
        return F.linear(hidden, self.embedding.weight)

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the normalised residual stream (B, T, d) after the last block."""
        T = ids.shape[1]  # noqa: N806
        end = T if cache is None else cache.length + T
        if end > self.config.context_length:
            raise ValueError(f"{end} tokens do not fit the context of {self.config.context_length}")
        x = self.embedding(ids) * self.scale  # (B, T, d)
        at = slice(T) if cache is None else cache.extend(x)
        x = self.dropout(x + self.positions[at])
        for block in self.blocks:
            x = block(x, cache)
        return self.final_norm(x)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats (float32) of targets (B, T) not IGNORE_INDEX."""
        fused = self.kernels.linear_cross_entropy
        if fused is not None and type(self).forward is GPT.forward:
            return fused(self.hidden(ids), self.embedding.weight, targets)
        logits = self.forward(ids).float().flatten(0, 1)  # (B T, V)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX)

    @property
    def n_parameters(self) -> int:
        """Trainable parameters; the tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    @property
    def n_embedding_parameters(self) -> int:
        """Those of the token embedding, which is also the output projection."""
        return self.embedding.weight.numel()

    def flops_per_token(self) -> int:
        """Return the FLOPs of a training step, forward and backward, per token: 6 N + 12 L T d.

        N counts the parameters that multiply (every matrix, the tied one once, as the output);
        attention is counted as if it were not causal (PaLM, Chowdhery et al. 2022, appendix B).
        """
        matrices = sum(p.numel() for p in self.parameters() if p.dim() == 2)
        c = self.config
        return 6 * matrices + 12 * c.n_layers * c.context_length * c.d_model


def perplexity(nats_per_token: float) -> float:
    """Return exp of the mean cross-entropy; infinity where a float cannot hold it."""
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf
