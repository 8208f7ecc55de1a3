"""Stories out of a model: sampling one token at a time, with cached keys and values.

>>> sampling = SamplingConfig(temperature=0.8, seed=1)
>>> for piece in stream_text(net, tokenizer, "Once upon a time", sampling):
...     print(piece, end="", flush=True)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minigpt.config import UserError
from minigpt.model import GPT, KVCache
from minigpt.tokenizer import Tokenizer

COLDEST = 1e-6  # below it all mass is on the likeliest token, and dividing by it overflows


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen. Of several filters, top_k comes first, then top_p, min_p."""

    temperature: float = 0.8  # 0: always the likeliest token; 1: as the model believes
    top_k: int | None = None  # choose among the k likeliest alone
    top_p: float | None = None  # choose among the fewest that hold this much probability
    max_tokens: int = 256  # new tokens at most
    seed: int | None = None  # None: another story each time
    min_p: float | None = None  # only those at least this share as probable as the likeliest

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(
                f"temperature {self.temperature} must be 0 (always the likeliest token) or more; "
                "0.8 is a good one"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k {self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must be above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min_p {self.min_p} must be between 0 and 1")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens {self.max_tokens} must be at least 1")


class Step(NamedTuple):
    """One more token for each row, and what the model thought of all of them."""

    ids: Tensor  # (B,) int64
    logits: Tensor  # (B, V) float32: the model's own, before temperature and filters


@torch.inference_mode()
def generate(
    net: GPT, prompt_ids: Tensor, sampling: SamplingConfig, end_of_text: int
) -> Iterator[Step]:
    """Continue `prompt_ids` (B, T), T >= 1, by one token for each row and step.

    A row that has ended goes on with `end_of_text`; the iteration stops when all have, or after
    `max_tokens` steps. Positions are absolute and the context is finite, so text that outgrows it
    slides: the last half of the context is read again from position 0, and generation goes on
    from there. A prompt longer than the context is cut down by the same rule. The caller's random
    state is left alone; the net is in evaluation mode until the iterator ends or is closed.
    """
    context, device = net.config.context_length, net.embedding.weight.device
    generator = _generator(sampling.seed, device)
    window = new = prompt_ids.to(device)  # what the model looks back on; what it has yet to read
    cache = KVCache(net.config, len(window), like=net.embedding.weight)
    ended = torch.zeros(len(window), dtype=torch.bool, device=device)
    was_training = net.training
    net.eval()
    try:
        for _ in range(sampling.max_tokens):
            if cache.length + new.shape[1] > context:
                window = new = window[:, -max(1, context // 2) :]
                cache.length = 0
            logits = net(new, cache)[:, -1].float()  # (B, V)
            ids = sample(logits, sampling, generator).masked_fill(ended, end_of_text)
            ended |= ids == end_of_text
            yield Step(ids, logits)
            if ended.all():
                return
            new = ids[:, None]
            window = torch.cat([window, new], dim=1)
    finally:
        net.train(was_training)


def sample(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> Tensor:
    """One id (B,) for each row of `logits` (B, V)."""
    if sampling.temperature < COLDEST:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """`logits` (B, V) with -inf for all but the k largest of each row."""
    values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -math.inf).scatter(-1, ids, values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """`logits` (B, V) with -inf outside the nucleus: the fewest likeliest that hold mass p.

    Holtzman et al. 2020, section 3.1. The likeliest token always stays.
    """
    ordered, ids = logits.sort(dim=-1, descending=True)
    mass = ordered.softmax(dim=-1)
    before = mass.cumsum(dim=-1) - mass  # what the likelier ones hold already
    before[:, 0] = 0.0  # exactly: rounding must not cost a row its last token
    return torch.full_like(logits, -math.inf).scatter(
        -1, ids, ordered.masked_fill(before >= p, -math.inf)
    )


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """`logits` (B, V) with -inf where the probability is below `p` times that of the likeliest.

    Nguyen et al. 2024 (arXiv 2407.01082).
    """
    if p == 0:
        return logits
    floor = logits.max(dim=-1, keepdim=True).values + math.log(p)
    return logits.masked_fill(logits < floor, -math.inf)


def stream_text(
    net: GPT, tokenizer: Tokenizer, prompt: str, sampling: SamplingConfig
) -> Iterator[str]:
    """What the model writes after `prompt`, in pieces, as it is written.

    A token may hold part of a UTF-8 character: its bytes are held back until the character is
    whole, so that the pieces join to the text that `generate_stories` would give.
    """
    pending: list[int] = []  # ids whose last character is not whole yet
    shown = 0  # characters of `pending` that were given out
    for ids, _ in generate(net, encode_prompt(tokenizer, prompt), sampling, tokenizer.end_of_text):
        if ids.item() == tokenizer.end_of_text:
            break
        pending.append(int(ids.item()))
        text = tokenizer.decode(pending)
        whole = text.removesuffix("\N{REPLACEMENT CHARACTER}")  # an unfinished one reads as this
        if len(whole) > shown:
            yield whole[shown:]
        pending, shown = ([], 0) if whole == text else (pending, len(whole))
    if pending:
        yield tokenizer.decode(pending)[shown:]


def generate_stories(
    net: GPT, tokenizer: Tokenizer, prompt: str, n: int, sampling: SamplingConfig
) -> list[str]:
    """`n` continuations of `prompt`, without it: together in one batch of n rows."""
    prompt_ids = encode_prompt(tokenizer, prompt).expand(n, -1)
    steps = [ids for ids, _ in generate(net, prompt_ids, sampling, tokenizer.end_of_text)]
    rows = torch.stack(steps, dim=1).tolist()  # n lists of ids
    return [tokenizer.decode(_until(row, tokenizer.end_of_text)) for row in rows]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """`prompt` as ids (1, T), behind an end-of-text: in training every story begins after one."""
    return torch.tensor([[tokenizer.end_of_text, *tokenizer.encode(prompt)]])


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def _generator(seed: int | None, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
