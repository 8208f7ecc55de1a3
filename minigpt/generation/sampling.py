"""Stories out of a model: sampling one token at a time, with cached keys and values.

>>> for piece in stream_story("runs/my-run", "Once upon a time", SamplingConfig(temperature=0.5)):
...     print(piece, end="", flush=True)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from minigpt.core.fields import documented
from minigpt.core.settings import UserError
from minigpt.generation.decoder import Backend, Decoder, c_backend
from minigpt.model import GPT
from minigpt.runs.folder import Run
from minigpt.tokenizer import Tokenizer

MAX_BATCH = 64  # rows of `iterate_stories`: 170 MB of keys and values at the medium size
COLDEST = 1e-6  # below it all mass is on the likeliest token, and dividing by it overflows


@documented
@dataclass(frozen=True)
class SamplingConfig:
    """How text is generated. Of several filters, top_k comes first, then top_p, then min_p."""

    temperature: float = 0.8
    """What logits are divided by; 0 means that the most likely token is always chosen."""
    top_k: int | None = None
    """Choose among the k most likely tokens alone."""
    top_p: float | None = None
    """Choose among the fewest tokens that together have this probability."""
    max_tokens: int = 256
    """Largest number of new tokens."""
    seed: int | None = None
    """Seed of the random numbers; None means another text each time."""
    min_p: float | None = None
    """Leave out tokens less probable than this share of the most likely one."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of prompt and text become less likely."""
    backend: Backend = "auto"
    """What computes: `torch` is `GPT.forward`, `c` is decode.c; `auto` is `c` where possible."""

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
        if not 0.01 <= self.repetition_penalty <= 100:  # logits stay finite
            raise UserError(
                f"repetition_penalty {self.repetition_penalty} must be from 0.01 to 100: "
                "1 is none, 1.2 a strong one"
            )
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"seed {self.seed} must be between 0 and 2^63 − 1")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens {self.max_tokens} must be at least 1")
        if self.backend not in get_args(Backend):
            raise UserError("choose from auto, torch, c", "backend", self.backend)


class Step(NamedTuple):
    """One more token for each row, and what the model thought of all of them."""

    ids: Tensor  # (B,) int64
    logits: Tensor  # (B, V) float32: the model's own, before temperature and filters


def generate(
    net: GPT,
    prompt_ids: Tensor | Sequence[Sequence[int]],
    sampling: SamplingConfig,
    end_of_text: int,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
) -> Iterator[Step]:
    """Continue each row of `prompt_ids` by one token at each step.

    A row that has ended goes on with `end_of_text`; the iteration stops when all have, or after
    `max_tokens` steps. `Decoder` says what becomes of texts that outgrow the context. The caller's
    random state is left alone; the net is in evaluation mode until the iterator ends or is closed.

    Args:
        net: its weights must not change meanwhile; its dtype is what is stored (see `Decoder`).
        prompt_ids: (B, T), or B rows of different lengths. No row may be empty.
        sampling: how the next token is chosen.
        end_of_text: the id that ends a row; -1: none does.
        generator: random numbers in place of those of `sampling.seed`, on the device of the net.
        vocab_size: tokens of the tokenizer, where the net has room for more; the rest stays unsaid.

    Raises:
        UserError: the weights give logits that are no numbers, or the backend cannot decode them.
    """
    device = net.embedding.weight.device
    prompts = [torch.as_tensor(row, dtype=torch.long, device=device) for row in prompt_ids]
    generator = generator or seeded_generator(sampling.seed, device)
    penalised = sampling.repetition_penalty != 1.0
    was_training = net.training
    net.eval()
    try:
        # Not the whole generator: its caller is not in inference mode between two tokens.
        with torch.inference_mode():
            decoder = Decoder(net, [prompt[:-1] for prompt in prompts], sampling.backend)
            ids = torch.stack([prompt[-1] for prompt in prompts])  # (B,)
            ended, n_ended = torch.zeros_like(ids, dtype=torch.bool), 0
            n_tokens = vocab_size or net.config.vocab_size
            seen = _tokens_of(prompts, n_tokens, end_of_text) if penalised else None
        for step in range(sampling.max_tokens):
            with torch.inference_mode():
                logits = decoder.read(ids)
                if n_tokens < logits.shape[1]:
                    logits = logits[:, :n_tokens]
                if step == 0 and not logits.isfinite().all():
                    raise UserError(
                        "the weights of this model are broken: its logits are not finite"
                    )
                ids = sample(logits, sampling, generator, seen)
                if n_ended:
                    ids.masked_fill_(ended, end_of_text)
                n_ended = ids.tolist().count(end_of_text)
                if n_ended:
                    ended = ids == end_of_text
                if seen is not None:
                    seen.scatter_(1, ids[:, None], ids[:, None] != end_of_text)
            yield Step(ids, logits)
            if n_ended == len(ids):
                return
    finally:
        net.train(was_training)


def _tokens_of(prompts: list[Tensor], vocab_size: int, end_of_text: int) -> Tensor:
    """(B, V) bool: the tokens of each prompt, without `end_of_text`, which begins it."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=prompts[0].device)
    for row, prompt in zip(seen, prompts, strict=True):
        row[prompt[prompt != end_of_text]] = True
    return seen


def sample(
    logits: Tensor,
    sampling: SamplingConfig,
    generator: torch.Generator,
    seen: Tensor | None = None,
) -> Tensor:
    """One id (B,) for each row of `logits` (B, V). `seen` (B, V): tokens of the text so far."""
    if seen is not None:
        logits = penalise(logits, seen, sampling.repetition_penalty)
    if sampling.temperature < COLDEST:
        return logits.argmax(dim=-1)
    temperature, filters = sampling.temperature, (sampling.top_k, sampling.top_p, sampling.min_p)
    if filters != (None, None, None):
        logits, temperature = logits / temperature, 1.0
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    # One random number a row, where torch.multinomial draws one for each token of the vocabulary.
    points = torch.rand(len(logits), generator=generator, dtype=torch.float32, device=logits.device)
    c = c_backend() if sampling.backend != "torch" and logits.device.type == "cpu" else None
    if c is not None:
        return c.sample(logits, temperature, points)
    mass = (logits / temperature).softmax(dim=-1).cumsum(dim=-1)
    # Rounding must not take a point to the end of the last token.
    end = mass[:, -1].nextafter(torch.zeros_like(mass[:, -1]))
    points = torch.minimum(points * mass[:, -1], end)
    return torch.searchsorted(mass, points[:, None], right=True).squeeze(1)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """`logits` (B, V) of tokens in `seen` (B, V) made less likely by `penalty` > 1.

    Keskar et al. 2019 (arXiv 1909.05858), section 4.1, where it divides; like transformers, this
    multiplies the negative ones, which dividing would make more likely.
    """
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lowered, logits)


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


def stream_story(
    run: str | Path | Run, prompt: str = "Once upon a time", sampling: SamplingConfig | None = None
) -> Iterator[str]:
    """What the model of `run` writes after `prompt`, in pieces, as it is written.

    Raises:
        UserError: no run there, or a prompt that is not valid Unicode.
    """
    run = Run.load(run)
    yield from stream_text(run.load_model(), run.tokenizer, prompt, sampling or SamplingConfig())


def stream_text(
    net: GPT, tokenizer: Tokenizer, prompt: str, sampling: SamplingConfig
) -> Iterator[str]:
    """What the model writes after `prompt`, in pieces, as it is written.

    A token may hold part of a UTF-8 character: its bytes are held back until the character is
    whole, so that the pieces join to the text that `generate_stories` would give.
    """
    pending: list[int] = []  # ids whose last character is not whole yet
    shown = 0  # characters of `pending` that were given out
    end, size = tokenizer.end_of_text, tokenizer.vocab_size
    for ids, _ in generate(net, encode_prompt(tokenizer, prompt), sampling, end, vocab_size=size):
        if ids.item() == end:
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
    """`n` continuations of `prompt`, without it."""
    return list(iterate_stories(net, tokenizer, prompt, n, sampling))


def iterate_stories(
    net: GPT, tokenizer: Tokenizer, prompt: str, n: int, sampling: SamplingConfig
) -> Iterator[str]:
    """`n` continuations of `prompt`, without it, written MAX_BATCH at a time.

    Each is given out as soon as it and those before it have ended.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    generator = seeded_generator(sampling.seed, net.embedding.weight.device)
    end, size = tokenizer.end_of_text, tokenizer.vocab_size
    for first in range(0, n, MAX_BATCH):
        rows = prompt_ids.expand(min(MAX_BATCH, n - first), -1)
        written: deque[list[int]] = deque([] for _ in rows)  # of the stories not given out yet
        for ids, _ in generate(net, rows, sampling, end, generator, size):
            for story, token in zip(written, ids.tolist()[-len(written) :], strict=True):
                story.append(token)
            while written and written[0][-1] == end:
                yield tokenizer.decode(_until(written.popleft(), end))
        for story in written:
            yield tokenizer.decode(_until(story, end))


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """`prompt` as ids (1, T), behind an end-of-text: in training every story begins after one."""
    return torch.tensor([[tokenizer.end_of_text, *tokenizer.encode(prompt)]])


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def seeded_generator(seed: int | None, device: torch.device) -> torch.Generator:
    """Random numbers on `device`: the same for the same seed, new ones for None."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
