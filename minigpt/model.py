"""The whole model: a pre-norm, weight-tied GPT with fixed sinusoidal positions, in pure PyTorch.

The module reads from top to bottom: config, positions, kernels, cache, attention, feed-forward,
block, GPT. Shape comments use these letters:

    B   batch size (number of sequences)
    T   number of input tokens in each sequence
    S   number of tokens attended to: T, plus those in the cache
    d   width of the residual stream (`d_model`)
    nh  number of attention heads
    hs  head size, d / nh
    V   vocabulary size

    >>> model = GPT(GPTConfig(d_model=128, n_heads=4, d_ff=256))
    >>> logits = model(torch.randint(0, 3000, (2, 256)))  # (2, 256, 3000)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = -100  # target id of padding, which the loss ignores


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT; the defaults give the small size, with 1,046,656 parameters.

    Raises:
        ValueError: a value is out of range, or the values do not fit each other.
    """

    vocab_size: int = 3000
    """Number of token ids of the model; at least the vocabulary size of the tokenizer."""
    context_length: int = 256
    """Maximum number of tokens that the model can attend to."""
    d_model: int = 128
    """Width of the residual stream; an even number and a multiple of `n_heads`."""
    n_layers: int = 5
    """Number of transformer blocks, each with an attention and a feed-forward layer."""
    n_heads: int = 4
    """Number of attention heads in each block; each head has width d_model / n_heads."""
    d_ff: int = 256
    """Width of the hidden layer of each feed-forward layer."""
    dropout: float = 0.0
    """Dropout probability, in [0, 1), after the embeddings and after each sublayer."""
    embedding_scale: float | None = None
    """Factor on the token embeddings before positions are added; None means sqrt(d_model)."""
    residual_init: Literal["scaled", "wide", "zero"] = "scaled"
    """Initial standard deviation of the weights of `attention.out` and `down`, the two layers that
    add to the residual stream: `scaled` means 0.02 / sqrt(2 n_layers), `wide` means
    1 / sqrt(d_model), and `zero` means 0."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "d_model", "n_layers", "n_heads", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        size = self.d_model * (self.vocab_size + self.context_length)
        size += self.n_layers * self.d_model * (4 * self.d_model + 2 * self.d_ff)
        if size > 10**9:  # probably a typing error; fail before any memory is allocated
            raise ValueError(f"at most 1e9 weights are allowed, but {self} has more")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} must be a multiple of n_heads {self.n_heads}")
        if self.d_model % 2:
            raise ValueError(f"d_model {self.d_model} must be even, for pairs of sine and cosine")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must be at least 0 and below 1")
        if self.embedding_scale is not None and self.embedding_scale <= 0:
            problem = f"embedding_scale {self.embedding_scale} must be above 0"
            raise ValueError(f"{problem}; leave it out to use sqrt(d_model)")


def sinusoids(length: int, d_model: int) -> Tensor:
    """Return the table of position encodings, with sines in even and cosines in odd columns.

    The wavelength of column pair i is 2π · 10000^(2i / d_model) tokens (Vaswani et al. 2017,
    arXiv 1706.03762, section 3.5). The table is computed in float64, so that its float32 values are
    the same on every device.

    Args:
        length: number of positions.
        d_model: width of the table; even.

    Returns:
        The table (length, d_model), float32.
    """
    position = torch.arange(length, dtype=torch.float64)[:, None]
    frequency = 10000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    angle = position * frequency  # (length, d / 2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


@dataclass(frozen=True)
class Kernels:
    """Faster implementations of attention and loss.

    If a function is None, the model computes attention or loss with its own code.
    """

    name: str = "torch"
    """Name of these kernels in the log."""
    attention: Callable[[Tensor, int], Tensor] | None = None
    """Function to call with qkv (B, T, 3 d) and n_heads. It returns the output of causal attention,
    (B, T, d)."""
    linear_cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """Function to call with hidden states (B, T, d), weights (V, d) and targets (B, T). It returns
    the mean loss, a float32 scalar."""


class KVCache:
    """Keys and values of past tokens, so that decoding does not compute them again for each token.

    `GPT.forward(ids, cache)` appends the keys and values of `ids` to the cache, in place. The
    sequences of a batch may differ in length.

    Args:
        capacity: maximum number of tokens per sequence.
        keep_weights: whether each layer appends its attention weights (B, nh, T, S) to `weights`.
    """

    def __init__(self, capacity: int, keep_weights: bool = False) -> None:
        self.layers: list[Tensor] = []  # keys and values (2, B, nh, capacity, hs) of each layer
        self.capacity, self.length = capacity, 0  # length: that of the longest sequence
        self.lengths = torch.zeros(1, dtype=torch.long)  # (B,), or (1,) if all are equal
        self.weights: list[Tensor] | None = [] if keep_weights else None

    def truncate(self, lengths: Sequence[int]) -> None:
        """Keep only the first tokens of each sequence, so that padding at the end is removed.

        Args:
            lengths: number of tokens to keep, for each of the B sequences.
        """
        self.length = max(lengths)
        self.lengths = torch.tensor(lengths[:1] if min(lengths) == self.length else lengths)

    def extend(self, x: Tensor) -> Tensor:
        """Prepare a forward pass over new tokens, and return their positions.

        This also sets `mask`, which is 0 at the positions that a token may attend to, and -inf at
        all others. The shape of the mask is (B, 1, T, S), or (1, 1, T, S) if all sequences have the
        same length.

        Args:
            x: embeddings (B, T, d) of the new tokens; only the shape and the device are used.

        Returns:
            Positions (B, T), or (1, T) if all sequences have the same length.
        """
        new = torch.arange(x.shape[1], device=x.device)
        self.positions = self.lengths.to(x.device)[:, None] + new  # (B or 1, T)
        self.lengths, self.length = self.positions[:, -1] + 1, self.length + x.shape[1]
        self.layer = 0  # index of the layer whose keys and values `append` expects next
        later = torch.arange(self.length, device=x.device) > self.positions[..., None]
        self.mask = torch.where(later, -math.inf, 0.0)[:, None]  # (B or 1, 1, T, S)
        return self.positions

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of the new tokens for one layer.

        In a forward pass, `extend` is called first. Then each layer calls this method once, in the
        order of the layers.

        Args:
            k: keys (B, nh, T, hs).
            v: values (B, nh, T, hs).

        Returns:
            Keys and values (B, nh, S, hs) of that layer, for the earlier and the new tokens.
        """
        if self.layer == len(self.layers):  # zeros, because masked values are multiplied by 0
            self.layers.append(k.new_zeros(2, *k.shape[:2], self.capacity, k.shape[3]))
        stored = self.layers[self.layer][:, :, :, : self.length]  # (2, B, nh, S, hs)
        self.layer += 1
        positions = self.positions[:, None, :, None].expand_as(k)
        return stored[0].scatter_(2, positions, k), stored[1].scatter_(2, positions, v)


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which a token attends to itself and to the tokens before it."""

    kernels = Kernels()

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the attention output (B, T, d) for x (B, T, d).

        The T tokens follow those in `cache`. If `cache` is None, they begin at position 0.
        """
        qkv = self.qkv(x)  # (B, T, 3 d): queries, keys and values, concatenated
        if cache is None and self.kernels.attention is not None:
            return self.out(self.kernels.attention(qkv, self.n_heads))
        q, k, v = qkv.unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, nh, S, hs)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, nh, T, S)
        mask = torch.full_like(scores[0, 0], -math.inf).triu(1) if cache is None else cache.mask
        weights = (scores + mask).softmax(dim=-1)
        if cache is not None and cache.weights is not None:
            cache.weights.append(weights)
        y = weights.to(v.dtype) @ v  # (B, nh, T, hs)
        return self.out(y.transpose(1, 2).flatten(2))  # heads concatenated: (B, T, d)


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, applied to each token separately."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (B, T, d) for x (B, T, d)."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then feed-forward, each as x + f(LayerNorm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.d_model)
        self.attention = CausalSelfAttention(config)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the residual stream (B, T, d) after this block; x (B, T, d) is its input."""
        x = x + self.dropout(self.attention(self.norm1(x), cache))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class GPT(nn.Module):
    """Decoder-only transformer: token ids in, logits of the next token out.

    Initial weights:

    | parameters                       | initial values                                          |
    |----------------------------------|---------------------------------------------------------|
    | token embedding (tied to output) | normal, std 0.3 / sqrt(d_model): logits have std 0.3 at |
    |                                  | any width, so the initial loss is ln V + 0.05           |
    | linear weights                   | normal, std 0.02                                        |
    | `attention.out`, `down` weights  | normal, std 0.02 / sqrt(2 n_layers), as in GPT-2, so    |
    |                                  | the sum of all sublayers does not grow with depth;      |
    |                                  | `residual_init` selects another std                     |
    | biases                           | 0                                                       |
    | LayerNorm                        | weight 1, bias 0                                        |

    The output projection is the embedding matrix itself (Press and Wolf 2017, arXiv 1608.05859).
    Token embeddings are multiplied by `embedding_scale` before positions are added. Without the
    scale, the embeddings would be small compared with the sinusoids, which have amplitude 1.
    Vaswani et al. 2017 (arXiv 1706.03762, section 3.4) also scale embeddings by sqrt(d_model).

    Subclasses override one of two methods:

    - `hidden`: the loss is the cross-entropy of `hidden(ids) @ embedding.weight.T`; fused kernels
      still apply.
    - `forward`: the loss is the cross-entropy of the logits that `forward` returns.

    Validation and evaluation call the method `loss`; training does too, if there are no teachers.
    Generation calls `forward`. If the overriding method has no `cache` parameter, generation runs a
    full forward pass for each token.

    Args:
        config: shape of the model.

    Attributes:
        config_class: class of `config`; a subclass with settings of its own sets `config_class` to
            a dataclass derived from `GPTConfig`.
        kernels: implementations of attention and loss; set by `use`.
        positions: table of position encodings (context_length, d_model), a buffer.
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
        self.register_buffer("positions", table, persistent=False)  # computed, so not saved
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.d_model)
        self._initialise()

    def _initialise(self) -> None:
        c = self.config
        scaled, wide = 0.02 / math.sqrt(2 * c.n_layers), c.d_model**-0.5
        residual_std = {"scaled": scaled, "wide": wide, "zero": 0.0}[c.residual_init]
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
                nn.init.normal_(parameter, std=residual_std if residual else 0.02)
        nn.init.normal_(self.embedding.weight, std=0.3 / math.sqrt(c.d_model))

    def use(self, kernels: Kernels) -> Self:
        """Compute attention and loss with `kernels` from now on; the weights do not change.

        Args:
            kernels: implementations that give the same results up to rounding.

        Returns:
            The model itself.
        """
        for module in self.modules():
            if isinstance(module, GPT | CausalSelfAttention):
                module.kernels = kernels
        return self

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the logits of the next token at every position.

        Args:
            ids: token ids (B, T), int64, in [0, V).
            cache: keys and values of the tokens before `ids`; those of `ids` are appended. None
                means that `ids` begin at position 0.

        Returns:
            Logits (B, T, V).

        Raises:
            ValueError: the sequences would be longer than `config.context_length`.
        """
        hidden = self.hidden(ids) if cache is None else self.hidden(ids, cache)
        return F.linear(hidden, self.embedding.weight)

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the residual stream after the last block and the final LayerNorm.

        Args:
            ids: token ids (B, T), int64, in [0, V).
            cache: as in `forward`.

        Returns:
            Hidden states (B, T, d). Their product with the transposed embedding matrix is the
            logits.

        Raises:
            ValueError: the sequences would be longer than `config.context_length`.
        """
        T = ids.shape[1]  # noqa: N806
        end = T if cache is None else cache.length + T
        if end > self.config.context_length:
            raise ValueError(f"{end} tokens exceed context_length {self.config.context_length}")
        x = self.embedding(ids) * self.scale  # (B, T, d)
        positions = slice(T) if cache is None else cache.extend(x)
        x = self.dropout(x + self.positions[positions])
        for block in self.blocks:
            x = block(x, cache)
        return self.final_norm(x)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of the targets.

        Args:
            ids: token ids (B, T), int64, in [0, V).
            targets: ids (B, T) of the next token at each position; a position with IGNORE_INDEX is
                not scored.

        Returns:
            Nats per scored token, a float32 scalar.

        Raises:
            ValueError: the sequences are longer than `config.context_length`.
        """
        fused = self.kernels.linear_cross_entropy
        if fused is not None and type(self).forward is GPT.forward:
            return fused(self.hidden(ids), self.embedding.weight, targets)
        logits = self.forward(ids).float().flatten(0, 1)  # (B · T, V)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX)

    @property
    def n_parameters(self) -> int:
        """Number of parameters; the tied embedding matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Return the FLOPs per token of a forward and backward pass, 6 N + 12 L T d.

        N is the number of weights in matrices; the tied matrix counts once, as the output
        projection. L is `n_layers`, T is `context_length` and d is `d_model`. Attention is counted
        as if it were not causal (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).

        Returns:
            Floating-point operations per trained token, where a multiply-add counts as two.
        """
        matrices = sum(p.numel() for p in self.parameters() if p.dim() == 2)
        c = self.config
        return 6 * matrices + 12 * c.n_layers * c.context_length * c.d_model


def perplexity(nats_per_token: float) -> float:
    """Return the perplexity of a mean cross-entropy.

    Args:
        nats_per_token: mean cross-entropy in nats.

    Returns:
        exp(nats_per_token), or infinity for 700 nats or more, because exp overflows near 710 nats.
    """
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf
