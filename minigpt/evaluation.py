"""What evaluate.py runs: a trained model in, numbers over the whole validation split, stories and
embedding probes out.

    >>> evaluation = evaluate(Run.load("runs/my-run"), EvaluationConfig(stride=128))
    >>> evaluation.perplexity
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from minigpt.analysis.embeddings import EmbeddingProbe, Tokens, tokens_or_reason
from minigpt.analysis.repetition import NOVELTY_STORIES, Repetition, measure
from minigpt.core.files import user_path, write_json
from minigpt.core.hardware import Hardware
from minigpt.core.settings import UserError, build
from minigpt.data.config import DataConfig, with_cache_here
from minigpt.data.preparation import prepare_split
from minigpt.data.sources import bundled_sample, open_corpus
from minigpt.data.windows import TokenWindows
from minigpt.generation.sampling import SamplingConfig, generate_stories
from minigpt.kernels.choice import kernels_for
from minigpt.model import GPT, IGNORE_INDEX, perplexity
from minigpt.runs.checkpoint import weights_fingerprint
from minigpt.runs.folder import Run
from minigpt.runs.names import EVALUATION
from minigpt.runs.records import read_summary
from minigpt.tokenizer import Tokenizer

log = logging.getLogger("minigpt")


# ---------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class StoriesConfig:
    """The stories that are written at each temperature."""

    prompts: tuple[str, ...] = ("Once upon a time", "One day, a little girl named Lily")
    temperatures: tuple[float, ...] = (0.5, 0.8, 1.0, 1.2)
    n: int = 4  # of each prompt at each temperature
    max_tokens: int = 200

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError("must be at least 1", "n", self.n, fix={"prompts": []})
        for temperature in self.temperatures:
            SamplingConfig(temperature=temperature, max_tokens=self.max_tokens)


@dataclass(frozen=True)
class EvaluationConfig:
    """What to measure."""

    stride: int | None = None  # None: windows side by side; else tokens from window to window
    batch_size: int = 32  # windows at a time
    seed: int = 1  # of the stories, the same at each temperature
    stories: StoriesConfig = field(default_factory=StoriesConfig)
    words: tuple[str, ...] = ("dad", "mom", "king", "dog", "happy", "ran", "red", "house")
    analogies: tuple[tuple[str, ...], ...] = (  # a − b + c
        ("princess", "girl", "boy"),
        ("mom", "girl", "boy"),
        ("queen", "woman", "man"),
    )
    data: DataConfig | None = None  # another corpus; None: the one the run was trained on

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError("must be at least 1", "batch_size", self.batch_size)
        if self.seed < 0:
            raise UserError("must not be negative", "seed", self.seed)
        for words in self.analogies:
            if len(words) != 3:
                example = {"analogies": [["princess", "girl", "boy"]]}
                raise UserError("are not three words", "analogies", list(words), fix=example)


# ---------------------------------------------------------------------------- loss of a split


@dataclass(frozen=True)
class Loss:
    """Cross-entropy summed over `n_tokens` predictions."""

    nats: float
    n_tokens: int

    @property
    def nats_per_token(self) -> float:
        """The mean, each token weighing the same."""
        return self.nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean."""
        return perplexity(self.nats_per_token)

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """Does not depend on the tokenizer: `bytes_per_token` is that of the split."""
        return self.nats_per_token / math.log(2) / bytes_per_token


def evaluate_loss(
    net: GPT,
    tokens: np.ndarray,
    batch_size: int = 32,
    stride: int | None = None,
    precision: str = "32-true",
    console: Console | None = None,
) -> Loss:
    """Score every token of a split but the first, once.

    Args:
        net: its context is the window, T.
        tokens: ids, [n_tokens] uint16, usually a memory map.
        batch_size: windows at a time.
        stride: None: windows side by side, the ones that training validates on. Else each window
            begins `stride` tokens after the one before and scores what that did not reach, so
            that all but the first T tokens see at least T - stride before them.
        precision: as in Lightning; `*-mixed` is autocast, all else float32.
        console: where to show progress; None: nowhere.

    Raises:
        UserError: the stride is not between 1 and the context.
    """
    context, device = net.config.context_length, net.embedding.weight.device
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        problem = f"choose from 1 to {context}, the context of this model"
        raise UserError(problem, "stride", stride, fix={"stride": max(1, context // 2)})
    n_windows = 1 + max(0, math.ceil((len(tokens) - 1 - context) / stride))
    batches = [range(n_windows)[i : i + batch_size] for i in range(0, n_windows, batch_size)]
    half = torch.float16 if precision == "16-mixed" else torch.bfloat16
    mixed = torch.autocast(device.type, half, enabled=precision.endswith("-mixed"))
    hidden = console is None or not console.is_terminal
    nats, n_tokens = 0.0, 0
    with torch.inference_mode(), mixed, contextlib.ExitStack() as at_exit:
        at_exit.callback(net.train, net.training)
        net.eval()
        for batch in track(
            batches, "validation split", console=console, transient=True, disable=hidden
        ):
            ids, targets = windows(tokens, batch, context, stride)
            n = int((targets != IGNORE_INDEX).sum())
            nats += n * net.loss(ids.to(device), targets.to(device)).item()
            n_tokens += n
    return Loss(nats, n_tokens)


def windows(
    tokens: np.ndarray, indices: Iterable[int], context: int, stride: int
) -> tuple[Tensor, Tensor]:
    """The windows that begin at `index * stride`: (ids, targets), both (B, T) int64.

    Targets that an earlier window has scored are IGNORE_INDEX, as are places behind the end.
    """
    starts = [index * stride for index in indices]
    ids, targets = TokenWindows(tokens, context).__getitems__(starts)
    later = torch.tensor(starts) > 0
    targets[later, : context - stride] = IGNORE_INDEX
    return ids, targets


# ---------------------------------------------------------------------------- stories


@dataclass(frozen=True)
class Temperature:
    """The stories of one temperature, and how much they repeat themselves and copy."""

    temperature: float
    stories: list[dict[str, str]]  # prompt, and the text that continues it
    repetition: Repetition  # of the texts, without their prompts


def write_stories(
    net: GPT, tokenizer: Tokenizer, config: StoriesConfig, seed: int
) -> list[list[dict[str, str]]]:
    """For each temperature its stories: dicts of `prompt` and the `text` that continues it.

    A prompt has the same random numbers at each temperature, and no two prompts have the same:
    stories would otherwise repeat one another.
    """
    groups = []
    for temperature in config.temperatures:
        stories = []
        for i, prompt in enumerate(config.prompts):
            sampling = SamplingConfig(temperature, max_tokens=config.max_tokens, seed=seed + i)
            texts = generate_stories(net, tokenizer, prompt, config.n, sampling)
            stories += [{"prompt": prompt, "text": text} for text in texts]
        groups.append(stories)
    return groups


def compare_temperatures(
    temperatures: Sequence[float],
    stories: list[list[dict[str, str]]],
    trained_on: DataConfig | None,
) -> tuple[list[Temperature], int]:
    """A row for each temperature, and how many training stories novelty was measured against.

    It is measured against the first training stories of the run; for any TinyStories run against
    those of the bundled sample. If they cannot be read any more the log says so, and it is 0.
    """
    texts = [[story["text"] for story in group] for group in stories]
    try:
        if trained_on is None:
            raise UserError("an export does not say where they are")
        corpus = (
            open_corpus(trained_on) if trained_on.source in ("text", "hf") else bundled_sample()
        )
        training = itertools.islice(corpus.stories("train"), NOVELTY_STORIES)
        measured, n_training = measure(texts, training)
    except UserError as error:
        log.warning("novelty is left out, as the training stories cannot be read: %s", error)
        measured, n_training = measure(texts, [])
    return list(map(Temperature, temperatures, stories, measured)), n_training


def own_data(run_config: dict[str, Any]) -> DataConfig | None:
    """What a run was trained on; None for an export of a model of somebody's own files."""
    data = run_config["data"]
    if data.get("source") == "text" and "train_files" not in data:
        return None
    return with_cache_here(build(DataConfig, data, "data"))


# ---------------------------------------------------------------------------- all of it


@dataclass(frozen=True)
class Evaluation:
    """All that evaluation.json holds."""

    checkpoint: str  # name of the file
    weights: str  # fingerprint of what was in it
    parameters: int
    device: str
    precision: str
    data: dict[str, Any]  # settings of the corpus
    stride: int | None
    seed: int
    n_stories: int
    n_tokens: int  # scored
    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    temperatures: list[Temperature]
    novelty_stories: int  # training stories that novelty was measured against
    neighbours: dict[str, Tokens | str]  # or why there are none
    analogies: dict[str, Tokens | str]


def evaluate(
    run: Run | str | Path,
    config: EvaluationConfig | None = None,
    console: Console | None = None,
    out: Path | None = None,
) -> Evaluation:
    """Measure a run's checkpoint, write evaluation.json, and return what is in it.

    Device: the best here. Precision: the one it was trained in, so that the loss is the one that
    training logged; float32 where this machine would only emulate that.

    Args:
        run: a run, or where it is.
        config: what to measure; None: the defaults.
        console: where to show progress; None: nowhere.
        out: folder of evaluation.json; None: the run's, and for an export the current one.

    Raises:
        UserError: no run, a damaged checkpoint, a corpus that cannot be read, a wrong setting, or
            a folder that cannot be written to.
    """
    run, config = Run.load(run), config or EvaluationConfig()
    out = run.output_dir if out is None else user_path(out, "out")
    _check_writable(out)  # now, and not after all was measured
    net = run.load_model()
    own = run.config
    trained_on = own_data(own)
    settings = config.data or trained_on
    if settings is None:
        files = {"data": "text", "data.valid_files": ["stories.txt"]}
        raise UserError(f"{run.folder} does not say where its stories lie", fix=files)
    # A run that was killed left no summary, but what it asked for is the same on this machine.
    asked = own.get("trainer", {}).get("precision", "auto")
    precision = read_summary(run.folder).get("precision", asked)
    hardware = Hardware.detect("auto", "1", 1, precision)
    if hardware.emulated:
        log.info("computed in 32-true, not %s: this CPU has no native bfloat16", precision)
        hardware = Hardware.detect("auto", "1", 1, "32-true")
    device, precision, tokenizer = hardware.accelerator, hardware.precision, run.tokenizer
    net = net.to(device).use(kernels_for(device))
    corpus = open_corpus(settings, valid_only=True)
    split = prepare_split(corpus, "valid", tokenizer, settings.cache_dir)
    batching = config.batch_size, config.stride
    loss = evaluate_loss(net, split.array(), *batching, precision, console)
    stories = write_stories(net, tokenizer, config.stories, config.seed)
    rows, n_training = compare_temperatures(config.stories.temperatures, stories, trained_on)
    probe = EmbeddingProbe(net, tokenizer)
    evaluation = Evaluation(
        checkpoint=run.checkpoint.name,
        weights=weights_fingerprint(net),
        parameters=net.n_parameters,
        device=device,
        precision=precision,
        data=dataclasses.asdict(settings),
        stride=config.stride,
        seed=config.seed,
        n_stories=split.n_stories,
        n_tokens=loss.n_tokens,
        nats_per_token=loss.nats_per_token,
        perplexity=loss.perplexity,
        bits_per_byte=loss.bits_per_byte(split.bytes_per_token),
        temperatures=rows,
        novelty_stories=n_training,
        neighbours={word: tokens_or_reason(probe.neighbours, word) for word in config.words},
        analogies={
            f"{a} − {b} + {c}": tokens_or_reason(probe.analogy, a, b, c)
            for a, b, c in config.analogies
        },
    )
    write_json(out / evaluation_name(config), dataclasses.asdict(evaluation))
    return evaluation


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = f"cannot write evaluation.json there ({error.strerror}); give another folder"
        raise UserError(problem, "out", str(folder)) from None


def evaluation_name(config: EvaluationConfig) -> str:
    """evaluation.json is the run's own; other corpora and strides get a name of their own."""
    other = f"-{config.data.source}" if config.data else ""
    stride = f"-stride{config.stride}" if config.stride else ""
    return EVALUATION.replace(".json", f"{other}{stride}.json")
