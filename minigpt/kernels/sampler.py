"""Settings and state of the sampling of tokens in decode.c."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_void_p

import torch
from torch import Tensor

PANEL = 32  # as in decode.c: number of elements by which scratch memory is padded


class SamplerStruct(ctypes.Structure):
    """The struct `sampler` of decode.c."""

    _fields_ = (
        *((name, c_int32) for name in ("steps", "vocab_size", "n_tokens", "end_of_text", "top_k")),
        *((name, c_float) for name in ("temperature", "top_p", "min_p", "penalty")),
        *((name, c_void_p) for name in ("points", "ids", "seen", "ended", "scratch")),
    )


class Sampler:
    """Sampler in decode.c that chooses the next tokens of a batch, as `sampling.sample` does.

    Args:
        n_sequences: number of sequences, B.
        n_tokens: number of tokens to choose among; ids from `n_tokens` on are never chosen.
        end_of_text: id that ends a sequence; an ended sequence gets this id in all further steps.
            -1 means that no id ends a sequence.
        temperature: divisor of the logits; 0 always chooses the most likely token.
        top_k: number of most likely tokens to choose among; None means all.
        top_p: total probability of the most likely tokens to choose among; None means 1.
        min_p: minimum probability relative to the most likely token; None means 0.
        penalty: repetition penalty of the tokens in `seen`.
        seen: mask (B, n_tokens), bool, of the tokens that get the penalty. The chosen tokens except
            `end_of_text` are added to it. None means no penalty.
    """

    def __init__(
        self, n_sequences: int, n_tokens: int, end_of_text: int, *,
        temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
        min_p: float | None = None, penalty: float = 1.0, seen: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.ended = torch.zeros(n_sequences, dtype=torch.bool, device="cpu")  # (B,)
        threads = torch.get_num_threads()
        self._scratch = torch.empty(threads, n_tokens + PANEL, dtype=torch.float32, device="cpu")
        self._seen = seen
        self.struct = SamplerStruct(
            0, 0, n_tokens, end_of_text, min(top_k or 0, n_tokens),
            temperature, top_p or 0.0, min_p or 0.0, penalty,
            None, None, None if seen is None else seen.data_ptr(), self.ended.data_ptr(),
            self._scratch.data_ptr(),
        )  # fmt: skip

    def prepare(self, points: Tensor, ids: Tensor, vocab_size: int) -> SamplerStruct:
        """Return the struct `sampler` of decode.c for the next steps.

        Args:
            points: uniform random numbers in [0, 1), (steps, B) float32.
            ids: memory for the chosen tokens (steps, B), int64.
            vocab_size: number of logits of each sequence, V.
        """
        self.struct.steps, self.struct.vocab_size = len(points), vocab_size
        self.struct.points, self.struct.ids = points.data_ptr(), ids.data_ptr()
        return self.struct
