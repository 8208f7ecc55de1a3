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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from minigpt.analysis.embeddings import EmbeddingProbe, Tokens, tokens_or_reason
from minigpt.analysis.repetition import NOVELTY_STORIES, Repetition, measure
from minigpt.core.files import write_json
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
T = TypeVar("T")


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
            raise ValueError(f"n {self.n} must be at least 1; stories.prompts=[] asks for none")
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
            raise ValueError(f"batch_size {self.batch_size} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} must not be negative")
        for words in self.analogies:
            if len(words) != 3:
                raise ValueError(
                    f"analogies: [{','.join(words)}] is not three words, such as "
                    "analogies=[[princess,girl,boy]]"
                )


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
        raise UserError(
            f"stride={stride}: choose from 1 to {context}, the context of this model, such as "
            f"stride={max(1, context // 2)}"
        )
    n_windows = 1 + max(0, math.ceil((len(tokens) - 1 - context) / stride))
    batches = [
        range(first, min(first + batch_size, n_windows))
        for first in range(0, n_windows, batch_size)
    ]
    nats, n_tokens = 0.0, 0
    with torch.inference_mode(), _autocast(precision, device), _evaluation_mode(net):
        for batch in _progress(batches, "validation split", console):
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


@contextlib.contextmanager
def _evaluation_mode(net: GPT) -> Iterator[None]:
    was_training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(was_training)


def _autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if not precision.endswith("-mixed"):
        return contextlib.nullcontext()
    half = torch.float16 if precision == "16-mixed" else torch.bfloat16
    return torch.autocast(device.type, dtype=half)


def _progress(items: list[T], title: str, console: Console | None) -> Iterable[T]:
    if console is None or not console.is_terminal:
        return items
    return track(items, title, console=console, transient=True)


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
    told = []
    for temperature in config.temperatures:
        stories = []
        for i, prompt in enumerate(config.prompts):
            sampling = SamplingConfig(temperature, max_tokens=config.max_tokens, seed=seed + i)
            texts = generate_stories(net, tokenizer, prompt, config.n, sampling)
            stories += [{"prompt": prompt, "text": text} for text in texts]
        told.append(stories)
    return told


def compare_temperatures(
    temperatures: Sequence[float],
    stories: list[list[dict[str, str]]],
    trained_on: DataConfig | None,
) -> tuple[list[Temperature], int]:
    """A row for each temperature, and how many training stories novelty was measured against.

    That is 0 when the run's own training files are not there any more, which the log says.
    """
    texts = [[story["text"] for story in told] for told in stories]
    try:
        measured, n_training = measure(texts, training_stories(trained_on))
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


def training_stories(settings: DataConfig | None) -> Iterator[str]:
    """The first training stories of a run; for any TinyStories run those of the bundled sample.

    Raises:
        UserError: nobody knows where they are, or they cannot be read.
    """
    if settings is None:
        raise UserError("an export does not say where they are")
    corpus = open_corpus(settings) if settings.source == "text" else bundled_sample()
    return itertools.islice(corpus.stories("train"), NOVELTY_STORIES)


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
    out = out or run.output_dir
    _check_writable(out)  # now, and not after all was measured
    net = run.load_model()
    own = run.config
    trained_on = own_data(own)
    settings = config.data or trained_on
    if settings is None:
        raise UserError(
            f"{run.folder} does not say where its stories lie: give data=text "
            "'data.valid_files=[stories.txt]'"
        )
    # A run that was killed left no summary, but what it asked for is the same on this machine.
    asked = own.get("trainer", {}).get("precision", "auto")
    precision = read_summary(run.folder).get("precision", asked)
    hardware = Hardware.detect("auto", "1", 1, precision)
    if hardware.emulated:
        log.info("computed in 32-true, not %s: this CPU has no native bfloat16", precision)
        hardware = Hardware.detect("auto", "1", 1, "32-true")
    device, tokenizer = hardware.accelerator, run.tokenizer
    net = net.to(device).use(kernels_for(device))

    split = prepare_split(
        open_corpus(settings, valid_only=True), "valid", tokenizer, settings.cache_dir
    )
    loss = evaluate_loss(
        net, split.array(), config.batch_size, config.stride, hardware.precision, console
    )
    stories = write_stories(net, tokenizer, config.stories, config.seed)
    rows, n_training = compare_temperatures(config.stories.temperatures, stories, trained_on)
    probe = EmbeddingProbe(net, tokenizer)
    evaluation = Evaluation(
        checkpoint=run.checkpoint.name,
        weights=weights_fingerprint(net),
        parameters=net.n_parameters,
        device=hardware.accelerator,
        precision=hardware.precision,
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
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write evaluation.json into {folder} ({error.strerror}): give another folder, "
            "out=..."
        ) from None


def evaluation_name(config: EvaluationConfig) -> str:
    """evaluation.json is the run's own; other corpora and strides get a name of their own."""
    other = f"-{config.data.source}" if config.data else ""
    stride = f"-stride{config.stride}" if config.stride else ""
    return EVALUATION.replace(".json", f"{other}{stride}.json")
