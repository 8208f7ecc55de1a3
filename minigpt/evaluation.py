"""Measure a trained model: loss on the whole validation split, stories, and embedding probes.

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
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from minigpt.analysis.embeddings import EmbeddingProbe, Tokens, tokens_or_reason
from minigpt.analysis.repetition import NOVELTY_STORIES, Repetition, measure
from minigpt.core.fields import documented
from minigpt.core.files import user_path, write_json
from minigpt.core.hardware import Hardware
from minigpt.core.progress import track
from minigpt.core.settings import UserError, build
from minigpt.data.config import DataConfig, with_cache_here
from minigpt.data.preparation import prepare_split
from minigpt.data.sources import Corpus, bundled_sample, open_corpus
from minigpt.data.windows import TokenWindows
from minigpt.generation.sampling import SamplingConfig, generate_stories
from minigpt.kernels.choice import kernels_for
from minigpt.model import GPT, IGNORE_INDEX, perplexity
from minigpt.runs.checkpoint import weights_fingerprint
from minigpt.runs.folder import Run
from minigpt.runs.records import read_summary
from minigpt.tokenizer import Tokenizer

log = logging.getLogger("minigpt")


# ---------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class StoriesConfig:
    """Settings of the stories that are generated at each temperature."""

    prompts: tuple[str, ...] = ("Once upon a time", "One day, a little girl named Lily")
    """Each story continues one of these texts; with none, no story is generated."""

    temperatures: tuple[float, ...] = (0.5, 0.8, 1.0, 1.2)
    """Stories are generated at each of these temperatures, which are compared; 0 is greedy."""

    n: int = 4
    """This many stories are generated for each prompt at each temperature, at least 1."""

    max_tokens: int = 200
    """A story ends after this many new tokens, unless it ends before."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError("must be at least 1", "n", self.n, fix={"prompts": []})
        for temperature in self.temperatures:
            SamplingConfig(temperature=temperature, max_tokens=self.max_tokens)


@documented
@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of an evaluation: the text to score, the stories to generate, the words to probe."""

    stride: int | None = None
    """Tokens from the start of one window to the next, from 1 to the context of the model; None
    means adjacent windows, as in training."""

    batch_size: int = 32
    """This many windows are scored at a time."""

    seed: int = 1
    """Seed of the stories, the same at each temperature; not negative."""

    stories: StoriesConfig = field(default_factory=StoriesConfig)
    """The stories that are generated at each temperature."""

    words: tuple[str, ...] = ("dad", "mom", "king", "dog", "happy", "ran", "red", "house")
    """The nearest neighbours of these words are listed, by cosine of the token embeddings."""

    analogies: tuple[tuple[str, ...], ...] = (
        ("princess", "girl", "boy"),
        ("mom", "girl", "boy"),
        ("queen", "woman", "man"),
    )
    """Three words a, b and c each, whose a − b + c is completed by the nearest tokens."""

    data: DataConfig | None = None
    """Another corpus, read with the tokenizer of the run; None means the one it was trained on."""

    valid: Literal["v1", "v2", "both"] | None = None
    """Which validation text of the bundled sample to score: V2's, the harder V1's, or both; None
    means both on the sample, and the validation split on any other corpus."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError("must be at least 1", "batch_size", self.batch_size)
        if self.seed < 0:
            raise UserError("must not be negative", "seed", self.seed)
        for words in self.analogies:
            if len(words) != 3:
                example = {"analogies": [["princess", "girl", "boy"]]}
                raise UserError("must each be three words", "analogies", list(words), fix=example)


# ---------------------------------------------------------------------------- loss of a split


@dataclass(frozen=True)
class Loss:
    """Cross-entropy in nats, summed over `n_tokens` predictions."""

    nats: float
    n_tokens: int

    @property
    def nats_per_token(self) -> float:
        """Mean over tokens, each with the same weight."""
        return self.nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        """Exponential of the mean."""
        return perplexity(self.nats_per_token)

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """Return the loss per UTF-8 byte, which does not depend on the tokenizer.

        Args:
            bytes_per_token: of the split that was scored.
        """
        return self.nats_per_token / math.log(2) / bytes_per_token


def evaluate_loss(
    model: GPT,
    tokens: np.ndarray,
    batch_size: int = 32,
    stride: int | None = None,
    precision: str = "32-true",
    console: Console | None = None,
) -> Loss:
    """Return the loss of `model` over every token of a split but the first, each scored once.

    Args:
        model: its context is the window, T.
        tokens: ids, [n_tokens] uint16, usually a memory map.
        batch_size: windows scored at a time.
        stride: None: adjacent windows, on which training validates. Else each window begins
            `stride` tokens after the previous one and scores only tokens past its end, so that all
            but the first T tokens have at least T - stride tokens of context.
        precision: as in Lightning; `*-mixed` is autocast, all else float32.
        console: where to show progress; None: nowhere.

    Raises:
        UserError: the stride is not between 1 and the context.
    """
    context, device = model.config.context_length, model.embedding.weight.device
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        problem = f"choose from 1 to {context}, the context of this model"
        raise UserError(problem, "stride", stride, fix={"stride": max(1, context // 2)})
    n_windows = 1 + max(0, math.ceil((len(tokens) - 1 - context) / stride))
    batches = [range(n_windows)[i : i + batch_size] for i in range(0, n_windows, batch_size)]
    half = torch.float16 if precision == "16-mixed" else torch.bfloat16
    mixed = torch.autocast(device.type, half, enabled=precision.endswith("-mixed"))
    nats, n_tokens = 0.0, 0
    with torch.inference_mode(), mixed, contextlib.ExitStack() as at_exit:
        at_exit.callback(model.train, model.training)
        model.eval()
        for batch in track(batches, "validation split", console):
            ids, targets = windows(tokens, batch, context, stride)
            n = int((targets != IGNORE_INDEX).sum())
            nats += n * model.loss(ids.to(device), targets.to(device)).item()
            n_tokens += n
    return Loss(nats, n_tokens)


def windows(
    tokens: np.ndarray, indices: Iterable[int], context: int, stride: int
) -> tuple[Tensor, Tensor]:
    """Return the windows that begin at `index * stride`: inputs and targets, [B, T] int64.

    Targets that an earlier window scores are IGNORE_INDEX, as are positions past the end.
    """
    starts = [index * stride for index in indices]
    ids, targets = TokenWindows(tokens, context).__getitems__(starts)
    overlapping = torch.tensor(starts) > 0
    targets[overlapping, : context - stride] = IGNORE_INDEX
    return ids, targets


# ---------------------------------------------------------------------------- stories


@dataclass(frozen=True)
class Temperature:
    """The stories of one temperature, and how much they repeat themselves and copy."""

    temperature: float
    stories: list[dict[str, str]]  # prompt, and the text that continues it
    repetition: Repetition  # of the texts, without their prompts


def write_stories(
    model: GPT, tokenizer: Tokenizer, config: StoriesConfig, seed: int
) -> list[list[dict[str, str]]]:
    """Return the stories of each temperature: dicts of `prompt` and the `text` that continues it.

    A prompt has the same random numbers at each temperature, and no two prompts share theirs:
    stories would otherwise repeat one another.
    """
    groups = []
    for temperature in config.temperatures:
        stories = []
        for i, prompt in enumerate(config.prompts):
            sampling = SamplingConfig(temperature, max_tokens=config.max_tokens, seed=seed + i)
            texts = generate_stories(model, tokenizer, prompt, config.n, sampling)
            stories += [{"prompt": prompt, "text": text} for text in texts]
        groups.append(stories)
    return groups


def compare_temperatures(
    temperatures: Sequence[float],
    stories: list[list[dict[str, str]]],
    trained_on: DataConfig | None,
) -> tuple[list[Temperature], int]:
    """Return a row for each temperature, and how many training stories novelty was measured on.

    These are the first training stories of the run, and those of the bundled sample for any run on
    TinyStories. Where they cannot be read the log says so, and their number is 0.
    """
    texts = [[story["text"] for story in group] for group in stories]
    try:
        if trained_on is None:
            raise UserError("the run does not say where they are")
        own_text = trained_on.source in ("text", "hf")
        corpus = open_corpus(trained_on) if own_text else bundled_sample()
        training = itertools.islice(corpus.stories("train"), NOVELTY_STORIES)
        repetitions, n_training = measure(texts, training)
    except UserError as error:
        log.warning("novelty is left out, as the training stories cannot be read: %s", error)
        repetitions, n_training = measure(texts, [])
    return list(map(Temperature, temperatures, stories, repetitions)), n_training


def own_data(run_config: dict[str, Any]) -> DataConfig | None:
    """Return what a run was trained on.

    None for an export of a model of own files, and for a run whose stories are no longer bundled.
    """
    data = run_config["data"]
    if data.get("source") == "text" and "train_files" not in data:
        return None
    if data.get("source") == "tinystories_tuning":  # held out a part of the first edition
        return None
    return with_cache_here(build(DataConfig, data, "data"))


# ---------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Score:
    """The loss on one text."""

    n_stories: int
    n_tokens: int  # scored
    nats_per_token: float
    perplexity: float
    bits_per_byte: float


@dataclass(frozen=True)
class Evaluation(Score):
    """All that evaluation.json holds; the loss is that on V2 where both texts were scored."""

    valid: str | None  # v1, v2 or both, on the bundled sample
    valid_v1: Score | None  # V1's, where both were scored
    checkpoint: str  # name of the file
    weights: str  # their fingerprint
    parameters: int
    device: str
    precision: str
    data: dict[str, Any]  # settings of the corpus
    stride: int | None
    seed: int
    temperatures: list[Temperature]
    novelty_stories: int  # training stories that novelty was measured against
    neighbours: dict[str, Tokens | str]  # of each word, or the reason why there are none
    analogies: dict[str, Tokens | str]


def evaluate(
    run: Run | str | Path,
    config: EvaluationConfig | None = None,
    console: Console | None = None,
    out: Path | None = None,
) -> Evaluation:
    """Measure a run's checkpoint, write evaluation.json, and return its content.

    The device is the best one here. The precision is that of training, so that the loss equals the
    one that training logged; float32 where this machine would only emulate it.

    Args:
        run: a run, or its folder.
        config: what to measure; None: the defaults.
        console: where to show progress; None: nowhere.
        out: folder of evaluation.json; None: the run's, and for an export the current one.

    Returns:
        The evaluation. On the bundled sample its loss is that on V2's validation text, and
        `valid_v1` has that on V1's.

    Raises:
        UserError: no run, a damaged checkpoint, a corpus that cannot be read, a wrong setting, or
            a folder that cannot be written to.
    """
    run, config = Run.load(run), config or EvaluationConfig()
    out = run.output_dir if out is None else user_path(out, "out")
    _check_writable(out)  # before anything is measured
    model = run.load_model()
    trained_on = own_data(run.config)
    settings = config.data or trained_on
    if settings is None:
        files = {"data": "text", "data.valid_files": ["stories.txt"]}
        raise UserError(f"the stories of {run.folder} are not known or no longer there", fix=files)
    settings, valid, corpora = _texts(settings, config.valid)
    # A run that was killed left no summary; its setting is resolved in the same way here.
    setting = run.config.get("trainer", {}).get("precision", "auto")
    precision = read_summary(run.folder).get("precision", setting)
    hardware = Hardware.detect("auto", "1", 1, precision)
    if hardware.emulated:
        log.info("computed in 32-true, not %s: this CPU has no native bfloat16", precision)
        hardware = Hardware.detect("auto", "1", 1, "32-true")
    device, precision, tokenizer = hardware.accelerator, hardware.precision, run.tokenizer
    model = model.to(device).use(kernels_for(device))
    scores = []
    for corpus in corpora:
        split = prepare_split(corpus, "valid", tokenizer, settings.cache_dir)
        batching = config.batch_size, config.stride
        loss = evaluate_loss(model, split.array(), *batching, precision, console)
        bits_per_byte = loss.bits_per_byte(split.bytes_per_token)
        numbers = split.n_stories, loss.n_tokens, loss.nats_per_token, loss.perplexity
        scores.append(Score(*numbers, bits_per_byte))
    stories = write_stories(model, tokenizer, config.stories, config.seed)
    rows, n_training = compare_temperatures(config.stories.temperatures, stories, trained_on)
    probe = EmbeddingProbe(model, tokenizer)
    evaluation = Evaluation(
        **dataclasses.asdict(scores[0]),
        valid=valid,
        valid_v1=scores[1] if len(scores) > 1 else None,
        checkpoint=run.checkpoint.name,
        weights=weights_fingerprint(model),
        parameters=model.n_parameters,
        device=device,
        precision=precision,
        data=dataclasses.asdict(settings),
        stride=config.stride,
        seed=config.seed,
        temperatures=rows,
        novelty_stories=n_training,
        neighbours={word: tokens_or_reason(probe.neighbours, word) for word in config.words},
        analogies={
            f"{a} − {b} + {c}": tokens_or_reason(probe.analogy, a, b, c)
            for a, b, c in config.analogies
        },
    )
    write_json(out / evaluation_name(config, evaluation), dataclasses.asdict(evaluation))
    return evaluation


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = f"cannot write evaluation.json there ({error.strerror}); give another folder"
        raise UserError(problem, "out", str(folder)) from None


def _texts(data: DataConfig, valid: str | None) -> tuple[DataConfig, str | None, list[Corpus]]:
    """Return what to score: the settings, which of the sample's texts, and the corpora of each."""
    sample = data.source == "tinystories_sample"
    if valid is not None and not sample:
        problem = f"is for the bundled sample alone, not for {data.source}: leave it out"
        raise UserError(problem, "valid", valid)
    if valid is None and not (sample and data.valid is None):
        return data, None, [open_corpus(data, valid_only=True)]
    valid = valid or "both"
    v2, v1 = bundled_sample("v2"), bundled_sample("v1")
    corpora = {"v2": [v2], "v1": [v1], "both": [v2, v1]}[valid]
    return dataclasses.replace(data, valid=None), valid, corpora


def evaluation_name(config: EvaluationConfig, evaluation: Evaluation) -> str:
    """Return the name of the file that an evaluation is written to.

    evaluation.json holds the validation split of the run's own corpus. Other corpora, tuning
    stories, V1 alone and other strides have names of their own.
    """
    parts = [
        "evaluation",
        config.data.source if config.data else "",
        "tuning" if evaluation.data["valid"] == "tuning" else "",
        "v1" if evaluation.valid == "v1" else "",
        f"stride{config.stride}" if config.stride else "",
    ]
    return "-".join(filter(None, parts)) + ".json"
