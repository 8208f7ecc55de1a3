"""Sampling of tokens and streaming of text.

>>> for piece in stream_story("runs/my-run", "Once upon a time", SamplingConfig(temperature=0.5)):
...     print(piece, end="", flush=True)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from minigpt.core.fields import documented
from minigpt.core.hardware import gpu_memory_for, model_device, to_device
from minigpt.core.settings import UserError, check
from minigpt.generation.decoder import Backend, Decoder
from minigpt.kernels.choice import sequences_at_once
from minigpt.kernels.sampler import Sampler
from minigpt.model import GPT
from minigpt.runs.folder import Run
from minigpt.tokenizer import Tokenizer

GROUP = 64  # sequences that share one random generator; on a CPU, also the size of a batch
LOOK_EVERY = 16  # on a GPU, the host reads the new tokens once in this number of steps
# Steps per call of decode.c for a single sequence, and for many: few enough that text streams, and
# enough that the time between the calls does not matter. The first call has one step.
CHUNK, MIN_CHUNK = 64, 16
MIN_TEMPERATURE = 1e-6  # below this, sampling is greedy, because the division would overflow


@documented
@dataclass(frozen=True)
class SamplingConfig:
    """Settings of the sampling. Filters are applied in the order top_k, top_p, min_p.

    Raises:
        UserError: a value is out of range.
    """

    temperature: float = 0.8
    """Divisor of the logits, at least 0; 0 always chooses the most likely token."""
    top_k: int | None = None
    """Number of most likely tokens to choose among, at least 1; None means all tokens."""
    top_p: float | None = None
    """Minimum total probability, in (0, 1], of the tokens to choose among. These are the most
    likely tokens, as few as possible; None means all tokens."""
    max_tokens: int = 256
    """Maximum number of new tokens, at least 1."""
    seed: int | None = None
    """Seed of the random numbers, in [0, 2^63); None means a new seed each time."""
    min_p: float | None = None
    """Minimum probability of a token, as a fraction of the highest, in [0, 1]; None means 0."""
    repetition_penalty: float = 1.0
    """Repetition penalty, in [0.01, 100]; values above 1 make tokens less likely if they are
    already in the prompt or in the story."""
    backend: Backend = "auto"
    """Backend for decoding: torch uses `GPT.forward`, c uses decode.c; auto selects one of them."""

    def __post_init__(self) -> None:
        greedy = "must be finite and at least 0; 0 always chooses the most likely token"
        check(self, greedy, lambda t: math.isfinite(t) and t >= 0, "temperature")
        check(self, "must be at least 1", lambda n: n >= 1, "top_k", "max_tokens")
        check(self, "must be above 0 and at most 1", lambda p: 0 < p <= 1, "top_p")
        check(self, "must be from 0 to 1", lambda p: 0 <= p <= 1, "min_p")
        penalty = "must be from 0.01 to 100; 1 means no penalty, and 1.2 is strong"
        check(self, penalty, lambda x: 0.01 <= x <= 100, "repetition_penalty")  # logits stay finite
        check(self, "must be from 0 to 2^63 − 1", lambda seed: 0 <= seed < 2**63, "seed")
        backends = get_args(Backend)
        check(self, f"must be one of {', '.join(backends)}", backends.__contains__, "backend")


# Function that takes n and returns random numbers (n, B) in [0, 1) for the next n steps.
Draw = Callable[[int], Tensor]


class Step(NamedTuple):
    """One new token per sequence.

    Attributes:
        ids: the tokens (B,), int64.
        logits: logits (B, V) of the model, float32, before penalty, temperature and filters.
    """

    ids: Tensor
    logits: Tensor


def generate(
    model: GPT,
    prompt_ids: Tensor | Sequence[Sequence[int]],
    sampling: SamplingConfig,
    end_of_text: int,
    generators: Sequence[torch.Generator] | None = None,
    vocab_size: int | None = None,
) -> Iterator[Step]:
    """Generate continuations of a batch of prompts. Each step adds one token to each sequence.

    A sequence that has ended is padded with `end_of_text`. Iteration stops when all sequences have
    ended, or after `max_tokens` steps. On a GPU, the host checks for the end only in every
    LOOK_EVERY-th step, so up to LOOK_EVERY - 1 steps of padding may follow the end. `Decoder`
    describes the context shift of long sequences. The global random state is not used. The model is
    in evaluation mode until the iterator ends or is closed.

    Args:
        model: the model. Its weights must not change during the iteration.
        prompt_ids: token ids (B, T), or B sequences of different lengths, none of them empty.
        sampling: settings of the sampling.
        end_of_text: id that ends a sequence; -1 means that no id ends a sequence.
        generators: random generators on the CPU, one for each group of GROUP sequences. Because
            they are on the CPU, the random numbers do not depend on the device of the model. None
            means `seeded_generators`.
        vocab_size: vocabulary size of the tokenizer. If the model has more ids, the additional ids
            are never chosen. None means the vocabulary size of the model.

    Yields:
        The new token of each sequence, and the logits of the model at that step.

    Raises:
        UserError: the logits of the first step are not finite, or the backend cannot decode the
            model.
    """
    device = model.embedding.weight.device
    if isinstance(prompt_ids, Tensor):
        prompts = list(prompt_ids.to(device, torch.long))
    else:
        prompts = [torch.as_tensor(row, dtype=torch.long, device=device) for row in prompt_ids]
    generators = generators or seeded_generators(sampling.seed, len(prompts))
    draw = partial(_draw, generators, len(prompts))
    was_training = model.training
    model.eval()
    try:
        # `yield` is outside these blocks, because inference mode must not extend to the caller.
        with torch.inference_mode():
            decoder = Decoder(model, [prompt[:-1] for prompt in prompts], sampling.backend)
            ids = torch.stack([prompt[-1] for prompt in prompts])  # (B,)
            n_tokens = vocab_size or model.config.vocab_size
            penalised = sampling.repetition_penalty != 1.0
            seen = _tokens_of(prompts, n_tokens, end_of_text) if penalised else None
        steps = _steps_in_c if decoder.uses_c else _steps
        yield from steps(decoder, ids, sampling, draw, end_of_text, n_tokens, seen)
    finally:
        model.train(was_training)


def _steps(
    decoder: Decoder, ids: Tensor, sampling: SamplingConfig, draw: Draw, end_of_text: int,
    n_tokens: int, seen: Tensor | None,
) -> Iterator[Step]:  # fmt: skip
    """Yield the new tokens and their logits, step by step; PyTorch samples the tokens.

    `ids` (B,) are the last tokens of the prompts. `decoder` has read all tokens before them.
    """
    every, points = look_interval(ids.device), torch.empty(0)
    ended = torch.zeros_like(ids, dtype=torch.bool)
    for step in range(sampling.max_tokens):
        looks = step % every == 0
        with torch.inference_mode():
            if looks:  # random numbers for the steps until the next look
                points = to_device(draw(min(every, sampling.max_tokens - step)), ids.device)
            logits = decoder.read(ids)[:, :n_tokens]
            if step == 0:
                _check_finite(logits)
            ids = _choose(logits, sampling, points[step % every], seen)
            ids.masked_fill_(ended, end_of_text)
            ended = ids == end_of_text
            if seen is not None:
                seen.scatter_(1, ids[:, None], ~ended[:, None])
            finished = looks and bool(ended.all())
        yield Step(ids, logits)
        if finished:
            return


def _steps_in_c(
    decoder: Decoder, ids: Tensor, sampling: SamplingConfig, draw: Draw, end_of_text: int,
    n_tokens: int, seen: Tensor | None,
) -> Iterator[Step]:  # fmt: skip
    """Yield the new tokens and their logits, step by step; decode.c samples the tokens.

    Each call of decode.c samples the tokens of several steps. The arguments are those of `_steps`.
    """
    greedy = sampling.temperature < MIN_TEMPERATURE
    sampler = Sampler(
        len(ids), n_tokens, end_of_text,
        temperature=0.0 if greedy else sampling.temperature, top_k=sampling.top_k,
        top_p=sampling.top_p, min_p=sampling.min_p, penalty=sampling.repetition_penalty, seen=seen,
    )  # fmt: skip
    n_left, size = sampling.max_tokens, 1
    while n_left and not sampler.ended.all():
        with torch.inference_mode():
            n = min(size, n_left, decoder.capacity())
            chunk, logits = decoder.generate(ids, sampler, draw(n))
            logits = logits[..., :n_tokens]
            if n_left == sampling.max_tokens:
                _check_finite(logits)
        for step in zip(chunk, logits, strict=True):
            yield Step(*step)
        ids, n_left, size = chunk[-1], n_left - n, max(CHUNK // len(ids), MIN_CHUNK)


def _check_finite(logits: Tensor) -> None:
    if not logits.isfinite().all():
        problem = "the logits of this model are not finite, so its weights are damaged"
        raise UserError(f"{problem}: choose another checkpoint")


def look_interval(device: torch.device) -> int:
    """Return after how many steps the host reads the new tokens: 1 on a CPU, else LOOK_EVERY."""
    return 1 if device.type == "cpu" else LOOK_EVERY


def _draw(generators: Sequence[torch.Generator], n_sequences: int, n_steps: int) -> Tensor:
    """Return the random numbers (n_steps, n_sequences) of the next steps, float32 in [0, 1).

    The numbers of a sequence do not depend on how its steps are divided among several calls.
    """
    sizes = [min(GROUP, n_sequences - first) for first in range(0, n_sequences, GROUP)]
    groups = zip(sizes, generators, strict=True)
    options = {"dtype": torch.float32, "device": "cpu"}
    return torch.cat([torch.rand(n_steps, n, generator=g, **options) for n, g in groups], dim=1)


def _tokens_of(prompts: list[Tensor], vocab_size: int, end_of_text: int) -> Tensor:
    """Return a mask (B, V), bool, of the tokens in each prompt, except `end_of_text`."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=prompts[0].device)
    for row, prompt in zip(seen, prompts, strict=True):
        row.index_fill_(0, prompt, True)
    if end_of_text >= 0:
        seen[:, end_of_text] = False
    return seen


def sample(
    logits: Tensor, sampling: SamplingConfig, generator: torch.Generator, seen: Tensor | None = None
) -> Tensor:
    """Sample one id for each row of logits.

    Args:
        logits: logits of the model (B, V).
        sampling: settings of the sampling.
        generator: random generator, on any device.
        seen: mask (B, V), bool, of the tokens that get the repetition penalty; None means no token.

    Returns:
        Ids (B,), int64.
    """
    points = torch.rand(len(logits), generator=generator, device=generator.device)
    return _choose(logits, sampling, points.to(logits.device), seen)


def _choose(
    logits: Tensor, sampling: SamplingConfig, points: Tensor, seen: Tensor | None
) -> Tensor:
    """Return an id for each row of logits (B, V); `points` (B,) are uniform in [0, 1).

    One random number per row suffices; torch.multinomial would need one for each of the V tokens.
    """
    if seen is not None:
        logits = penalise(logits, seen, sampling.repetition_penalty)
    if sampling.temperature < MIN_TEMPERATURE:
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
    mass = (logits / temperature).softmax(dim=-1).cumsum(dim=-1)
    # Rounding must not move a point beyond the last token.
    end = mass[:, -1].nextafter(torch.zeros_like(mass[:, -1]))
    points = torch.minimum(points * mass[:, -1], end)
    return torch.searchsorted(mass, points[:, None], right=True).squeeze(1)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits (B, V) with a repetition penalty on the tokens marked in `seen` (B, V), bool.

    Keskar et al. (2019, arXiv 1909.05858, section 4.1) divide logits by the penalty. Here, as in
    the library transformers, negative logits are multiplied by the penalty, because division would
    increase them.
    """
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lowered, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Return logits (B, V) with -inf for all but the k largest logits of each row."""
    values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -math.inf).scatter(-1, ids, values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Return logits (B, V) with -inf outside the nucleus.

    The nucleus is the smallest set of most likely tokens with a total probability of at least p
    (Holtzman et al., 2020, arXiv 1904.09751, section 3.1). It contains at least one token.
    """
    ordered, ids = logits.sort(dim=-1, descending=True)
    mass = ordered.softmax(dim=-1)
    before = mass.cumsum(dim=-1) - mass  # total probability of all tokens that are more likely
    before[:, 0] = 0.0  # exactly, so that rounding cannot mask the most likely token
    ordered = ordered.masked_fill(before >= p, -math.inf)
    return torch.full_like(logits, -math.inf).scatter(-1, ids, ordered)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Return logits (B, V) with -inf for each token whose probability is too low.

    The limit is p times the highest probability in the same row (Nguyen et al. 2024, arXiv
    2407.01082).
    """
    if p == 0:
        return logits
    floor = logits.max(dim=-1, keepdim=True).values + math.log(p)
    return logits.masked_fill(logits < floor, -math.inf)


def stream_story(
    run: str | Path | Run, prompt: str = "Once upon a time", sampling: SamplingConfig | None = None
) -> Iterator[str]:
    """Stream a continuation of a prompt, generated by the model of a run.

    Args:
        run: a `Run`, or the path of a run folder, a checkpoint or an exported model.
        prompt: beginning of the story.
        sampling: settings of the sampling; None means the defaults, with a new seed each time.

    Yields:
        Pieces of the continuation, without the prompt, as soon as they are sampled.

    Raises:
        UserError: `run` is not a run or cannot be read, the prompt is not valid Unicode, or the
            logits of the model are not finite.
    """
    run = Run.load(run)
    yield from stream_text(run.load_model(), run.tokenizer, prompt, sampling or SamplingConfig())


def stream_text(
    model: GPT, tokenizer: Tokenizer, prompt: str, sampling: SamplingConfig
) -> Iterator[str]:
    """Stream a continuation of a prompt, generated by a model.

    A token may end within a UTF-8 character. The bytes of an incomplete character are withheld
    until the character is complete or the story ends. So the concatenated pieces equal the
    continuation that `generate_stories` returns for `n` = 1 and the same seed.

    Args:
        model: the model.
        tokenizer: the tokenizer that the model was trained with.
        prompt: beginning of the story.
        sampling: settings of the sampling.

    Yields:
        Pieces of the continuation, without the prompt.
    """
    pending: list[int] = []  # ids since the last complete character
    n_yielded = 0  # number of characters of `pending` that were yielded
    end, size = tokenizer.end_of_text, tokenizer.vocab_size
    for ids, _ in generate(model, encode_prompt(tokenizer, prompt), sampling, end, vocab_size=size):
        if ids.item() == end:
            break
        pending.append(int(ids.item()))
        text = tokenizer.decode(pending)
        complete = text.removesuffix("\N{REPLACEMENT CHARACTER}")  # an incomplete character
        if len(complete) > n_yielded:
            yield complete[n_yielded:]
        pending, n_yielded = ([], 0) if complete == text else (pending, len(complete))
    if pending:
        yield tokenizer.decode(pending)[n_yielded:]


def device_for(n: int) -> str:
    """Return the device to generate `n` stories on.

    It is "cuda" if there is a CUDA GPU and `n` is above GROUP, else "cpu". Starting CUDA takes
    seconds, which is not worthwhile for fewer stories.
    """
    return model_device() if n > GROUP else "cpu"


def generate_stories(
    model: GPT, tokenizer: Tokenizer, prompt: str, n: int, sampling: SamplingConfig
) -> list[str]:
    """Return `n` continuations of `prompt`, without the prompt; see `iterate_stories`."""
    return list(iterate_stories(model, tokenizer, prompt, n, sampling))


def iterate_stories(
    model: GPT, tokenizer: Tokenizer, prompt: str, n: int, sampling: SamplingConfig
) -> Iterator[str]:
    """Yield `n` continuations of `prompt`, without the prompt.

    A story is yielded when it and all stories before it have ended. On a GPU, the host
    checks only once every LOOK_EVERY steps which stories have ended. The same seed gives the same
    stories on every device, except for rounding.

    Args:
        model: the model.
        tokenizer: the tokenizer that the model was trained with.
        prompt: beginning of each story.
        n: number of stories, at least 1.
        sampling: settings of the sampling.

    Yields:
        The next continuation.

    Raises:
        UserError: the logits of the model are not finite, or the GPU does not have enough memory.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    generators = seeded_generators(sampling.seed, n)
    end, size = tokenizer.end_of_text, tokenizer.vocab_size
    batch = sequences_at_once(model, on_cpu=GROUP)
    every = look_interval(model.embedding.weight.device)
    for first in range(0, n, batch):
        prompts = prompt_ids.expand(min(batch, n - first), -1)
        own = generators[first // GROUP : -(-(first + len(prompts)) // GROUP)]
        stories: deque[list[int]] = deque([] for _ in prompts)  # ids of stories not yet yielded
        steps = (ids for ids, _ in generate(model, prompts, sampling, end, own, size))
        while stories:
            with gpu_memory_for("n", n, batch):
                block = list(islice(steps, every))
            if not block:
                break
            rows = torch.stack(block, dim=1).tolist()  # (B, every)
            for story, tokens in zip(stories, rows[-len(stories) :], strict=True):
                story += tokens
            while stories and stories[0][-1] == end:
                yield tokenizer.decode(_until(stories.popleft(), end))
        for story in stories:
            yield tokenizer.decode(_until(story, end))


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """Return the ids (1, T) of the prompt, preceded by the id of END_OF_TEXT.

    In the training data, END_OF_TEXT precedes every story but the first.
    """
    return torch.tensor([[tokenizer.end_of_text, *tokenizer.encode(prompt)]])


def _until(ids: list[int], end: int) -> list[int]:
    """Return the ids before the first `end`; all ids if there is no `end`."""
    return ids[: ids.index(end)] if end in ids else ids


def seeded_generators(seed: int | None, n_sequences: int) -> list[torch.Generator]:
    """Return random generators on the CPU, one for each group of GROUP sequences.

    So the random numbers of a sequence do not depend on the size of the batch. If `seed` is None,
    each call returns generators with a new seed.
    """
    seed = torch.Generator().seed() if seed is None else seed
    seeds = [seed]  # later groups use a hash: seed + 1 would repeat the stories of that seed
    for group in range(1, -(-n_sequences // GROUP)):
        (state,) = np.random.SeedSequence([seed, group]).generate_state(1, np.uint64)
        seeds.append(int(state >> np.uint64(1)))
    return [torch.Generator().manual_seed(each) for each in seeds]
