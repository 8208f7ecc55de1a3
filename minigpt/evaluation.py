"""Evaluation of a trained model: validation loss, generated stories, and embedding probes.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from minigpt.core.hardware import Hardware, gpu_memory_for
from minigpt.core.progress import track
from minigpt.core.settings import UserError, build
from minigpt.data.config import DataConfig, with_cache_here
from minigpt.data.preparation import prepare_split
from minigpt.data.sources import Corpus, bundled_sample, open_corpus
from minigpt.data.windows import TokenWindows
from minigpt.generation.sampling import SamplingConfig, generate_stories
from minigpt.kernels.choice import kernels_for, sequences_at_once
from minigpt.model import GPT, IGNORE_INDEX, perplexity
from minigpt.runs.checkpoint import weights_fingerprint
from minigpt.runs.folder import Run
from minigpt.runs.records import read_summary
from minigpt.tokenizer import Tokenizer

log = logging.getLogger("minigpt")
WINDOWS = 32  # number of windows to score at a time, except on a CUDA GPU


# ---------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class StoriesConfig:
    """Settings of the stories that are generated at each temperature.

    Raises:
        UserError: a value is out of range.
    """

    prompts: tuple[str, ...] = ("Once upon a time", "One day, a little girl named Lily")
    """Prompts that the stories continue; if there are none, no stories are generated."""

    temperatures: tuple[float, ...] = (0.5, 0.8, 1.0, 1.2)
    """Temperatures at which stories are generated and compared, each at least 0; 0 always chooses
    the most likely token."""

    n: int = 4
    """Number of stories per prompt and temperature, at least 1."""

    max_tokens: int = 200
    """Maximum number of new tokens per story, at least 1."""

    def __post_init__(self) -> None:
        if self.n < 1:
            problem = "must be at least 1; to write no stories, give no prompts"
            raise UserError(problem, "n", self.n, fix={"prompts": []})
        SamplingConfig(max_tokens=self.max_tokens)
        for temperature in self.temperatures:
            try:
                SamplingConfig(temperature=temperature)
            except UserError as error:
                raise UserError(error.message, "temperatures", list(self.temperatures)) from None


@documented
@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of an evaluation: the data to score, the stories to generate, the words to probe.

    Raises:
        UserError: a value is out of range.
    """

    stride: int | None = None
    """Number of tokens from the start of one window to the next, from 1 to the context length; None
    means adjacent windows, as in training."""

    batch_size: int | None = None
    """Number of windows to score at a time, at least 1. None means 32 or, on a CUDA GPU, as many
    windows as fit in a quarter of its memory, from 32 to 1,024. For a Hugging Face model, None
    means 32, and the number is reduced if the logits of the windows would take more than 512 MB."""

    seed: int = 1
    """Seed for generating the stories, at least 0; every temperature uses the same seed."""

    stories: StoriesConfig = field(default_factory=StoriesConfig)
    """Settings of the stories to generate."""

    words: tuple[str, ...] = ("dad", "mom", "king", "dog", "happy", "ran", "red", "house")
    """Words for which the nearest tokens are listed, by cosine similarity of the embeddings."""

    analogies: tuple[tuple[str, ...], ...] = (
        ("princess", "girl", "boy"),
        ("mom", "girl", "boy"),
        ("queen", "woman", "man"),
    )
    """Word triples (a, b, c); the tokens nearest to a − b + c are listed."""

    data: DataConfig | None = None
    """Data to score, encoded with the tokenizer of the run; None means the data that the run was
    trained on."""

    valid: Literal["v1", "v2", "both"] | None = None
    """Validation stories of the bundled sample to score: those from TinyStories V2, those from the
    harder V1, or both. None means both if the data is this sample and `data.valid` is None.
    Otherwise, None means the stories that the data settings select for validation."""

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError("must be at least 1", "batch_size", self.batch_size)
        if self.seed < 0:
            raise UserError("must not be negative", "seed", self.seed)
        for words in self.analogies:
            if len(words) != 3:
                example = {"analogies": [["princess", "girl", "boy"]]}
                problem = "each analogy must have three words"
                raise UserError(problem, "analogies", list(words), fix=example)


# ---------------------------------------------------------------------------- loss of a split


@dataclass(frozen=True)
class Loss:
    """Sum of the cross-entropy over `n_tokens` predictions, in nats."""

    nats: float
    n_tokens: int

    @property
    def nats_per_token(self) -> float:
        """Mean cross-entropy per token, in nats."""
        return self.nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        """Exponential of the mean cross-entropy."""
        return perplexity(self.nats_per_token)

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """Return the loss in bits per UTF-8 byte.

        In this unit, the losses of models with different tokenizers can be compared.

        Args:
            bytes_per_token: mean number of UTF-8 bytes per token of the split that was scored.

        Returns:
            Bits per byte.
        """
        return self.nats_per_token / math.log(2) / bytes_per_token


def evaluate_loss(
    model: GPT,
    tokens: np.ndarray,
    batch_size: int | None = None,
    stride: int | None = None,
    precision: str = "32-true",
    console: Console | None = None,
) -> Loss:
    """Return the loss of `model` on a split; each token except the first is scored once.

    Args:
        model: the model; its context length is the window length, T.
        tokens: ids [n_tokens] uint16, usually a memory map.
        batch_size: number of windows to score at a time; None means 32, or more on a CUDA GPU.
        stride: number of tokens from the start of one window to the next, from 1 to T; None means
            T, as in the validation of a training run. A window scores only the tokens after the end
            of the previous window. So each token after the first window has at least T - stride
            tokens of context.
        precision: precision in Lightning's notation; only `*-mixed` uses autocast.
        console: console for the progress; None means that no progress is shown.

    Returns:
        The total loss in nats, and the number of scored tokens.

    Raises:
        UserError: the stride is not from 1 to the context length, or the GPU does not have enough
            memory.
    """
    context, device = model.config.context_length, model.embedding.weight.device
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        problem = f"must be from 1 to {context}, the context length of this model"
        raise UserError(problem, "stride", stride, fix={"stride": max(1, context // 2)})
    batch_size = batch_size or sequences_at_once(model, on_cpu=WINDOWS)
    n_windows = 1 + max(0, math.ceil((len(tokens) - 1 - context) / stride))
    batches = [range(n_windows)[i : i + batch_size] for i in range(0, n_windows, batch_size)]
    half = torch.float16 if precision == "16-mixed" else torch.bfloat16
    mixed = torch.autocast(device.type, half, enabled=precision.endswith("-mixed"))
    losses: list[Tensor] = []  # on the device, so that a batch does not wait for the one before
    counts: list[int] = []
    with torch.inference_mode(), mixed, contextlib.ExitStack() as at_exit:
        at_exit.callback(model.train, model.training)
        model.eval()
        for batch in track(batches, "validation split", console):
            ids, targets = windows(tokens, batch, context, stride)
            counts.append(int((targets != IGNORE_INDEX).sum()))
            with gpu_memory_for("batch_size", batch_size):
                losses.append(model.loss(ids.to(device), targets.to(device)))
    means = torch.stack(losses).tolist()
    return Loss(sum(n * mean for n, mean in zip(counts, means, strict=True)), sum(counts))


def windows(
    tokens: np.ndarray, indices: Iterable[int], context: int, stride: int
) -> tuple[Tensor, Tensor]:
    """Return the windows at `indices`; window i starts at token i * `stride`.

    Args:
        tokens: ids [n_tokens] uint16.
        indices: indices of the windows, from 0.
        context: number of tokens per window, T.
        stride: number of tokens from the start of one window to the next, from 1 to T.

    Returns:
        Inputs and targets, each [B, T] int64. Targets that an earlier window scores, and targets
        past the end of `tokens`, are IGNORE_INDEX.
    """
    starts = [index * stride for index in indices]
    ids, targets = TokenWindows(tokens, context).__getitems__(starts)
    overlapping = torch.tensor(starts) > 0
    targets[overlapping, : context - stride] = IGNORE_INDEX
    return ids, targets


# ---------------------------------------------------------------------------- stories


@dataclass(frozen=True)
class Temperature:
    """Stories at one temperature, with measures of their repetition and their novelty."""

    temperature: float
    stories: list[dict[str, str]]  # keys: `prompt`, and its continuation `text`
    repetition: Repetition  # measured on the texts without their prompts


def write_stories(
    model: GPT, tokenizer: Tokenizer, config: StoriesConfig, seed: int
) -> list[list[dict[str, str]]]:
    """Generate the stories of an evaluation.

    A prompt uses the same seed at each temperature. Different prompts use different seeds, so that
    their stories do not repeat one another.

    Args:
        model: the model.
        tokenizer: the tokenizer that the model was trained with.
        config: settings of the stories.
        seed: seed of the first prompt; prompt i uses `seed` + i.

    Returns:
        One list of dicts per temperature; each dict has a `prompt` and the `text` that continues
        the prompt.

    Raises:
        UserError: the logits of the model are not finite, or the GPU does not have enough memory.
    """
    groups = []
    for temperature in config.temperatures:
        stories = []
        for i, prompt in enumerate(config.prompts):
            sampling = SamplingConfig(temperature, max_tokens=config.max_tokens, seed=seed + i)
            try:
                texts = generate_stories(model, tokenizer, prompt, config.n, sampling)
            except UserError as error:
                raise error.within("stories") from None
            stories += [{"prompt": prompt, "text": text} for text in texts]
        groups.append(stories)
    return groups


def compare_temperatures(
    temperatures: Sequence[float],
    stories: list[list[dict[str, str]]],
    trained_on: DataConfig | None,
) -> tuple[list[Temperature], int]:
    """Measure how much the stories at each temperature repeat themselves and the training stories.

    Novelty is measured against training stories. For a run on source `text` or `hf`, these are the
    first training stories of the run. For the other sources, they are the first training stories of
    the bundled sample. If these stories cannot be read, a warning is logged, and novelty is not
    measured.

    Args:
        temperatures: the temperatures.
        stories: the stories at each temperature, from `write_stories`.
        trained_on: data settings of the run, from `own_data`; None means that novelty cannot be
            measured.

    Returns:
        The results for each temperature, and the number of training stories that were used, which
        is 0 if they cannot be read.
    """
    texts = [[story["text"] for story in group] for group in stories]
    try:
        if trained_on is None:
            raise UserError("the run does not record where the training stories are")
        own_text = trained_on.source in ("text", "hf")
        corpus = open_corpus(trained_on) if own_text else bundled_sample()
        training = itertools.islice(corpus.stories("train"), NOVELTY_STORIES)
        repetitions, n_training = measure(texts, training)
    except UserError as error:
        log.warning("novelty was not measured: cannot read the training stories (%s)", error)
        repetitions, n_training = measure(texts, [])
    return list(map(Temperature, temperatures, stories, repetitions)), n_training


def own_data(run_config: dict[str, Any]) -> DataConfig | None:
    """Return the data settings that a run was trained with.

    Args:
        run_config: configuration of the run.

    Returns:
        The settings; None if the data cannot be found. This is the case for an export of a run on
        the user's own files or on a local dataset, because an export does not record their paths.
        It is also the case for the source `tinystories_tuning`, which is no longer bundled.

    Raises:
        UserError: the configuration has no valid data settings.
    """
    data = run_config.get("data")
    if not isinstance(data, Mapping):
        raise UserError("the run's config.yaml has no valid data settings: restore the file")
    needed = {"text": "train_files", "hf": "dataset"}.get(str(data.get("source")))
    if needed is not None and not data.get(needed):
        return None
    if data.get("source") == "tinystories_tuning":  # part of the first edition of the sample
        return None
    return with_cache_here(build(DataConfig, data, "data"))


# ---------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Score:
    """Loss on one set of stories."""

    n_stories: int
    n_tokens: int  # number of tokens that were scored
    nats_per_token: float
    perplexity: float
    bits_per_byte: float


@dataclass(frozen=True)
class Evaluation(Score):
    """Content of evaluation.json: the loss, the generated stories and the embedding probes.

    If the validation stories of both TinyStories V2 and V1 were scored, the fields inherited from
    `Score` are for V2, and `valid_v1` is the score for V1.
    """

    valid: str | None  # stories of the bundled sample: v1, v2 or both; None if others were scored
    valid_v1: Score | None  # loss on V1, if both were scored
    checkpoint: str  # name of the checkpoint file
    weights: str  # fingerprint of the weights
    parameters: int
    device: str
    precision: str
    data: dict[str, Any]  # data settings
    stride: int | None
    seed: int
    temperatures: list[Temperature]
    novelty_stories: int  # number of training stories that novelty was measured against
    neighbours: dict[str, Tokens | str]  # nearest tokens of each word, or why there are none
    analogies: dict[str, Tokens | str]  # answers to each analogy, or why there are none


def evaluate(
    run: Run | str | Path,
    config: EvaluationConfig | None = None,
    console: Console | None = None,
    out: Path | None = None,
) -> Evaluation:
    """Evaluate the selected checkpoint of a run, write the results to a file, and return them.

    `evaluation_name` gives the name of the file, such as evaluation.json. The best available device
    is used. The precision is that of training, so that the loss is comparable with the loss that
    was logged in training. On a CPU there are two exceptions: float32 replaces emulated
    bfloat16, and the precision that `trainer.precision=auto` selects replaces 16-mixed.

    Args:
        run: a run, or the path of its folder, of a checkpoint or of an export.
        config: settings of the evaluation; None means the defaults.
        console: console for the progress; None means that no progress is shown.
        out: folder for the results; None means the run folder or, for an export, the working
            directory.

    Returns:
        The evaluation. The bundled sample has validation stories from TinyStories V2 and V1. If
        both were scored, the loss is for V2, and `valid_v1` has the loss for V1.

    Raises:
        UserError: there is no run, its checkpoint is damaged, the data cannot be read, a setting is
            invalid, or the output folder cannot be written.
    """
    run, config = Run.load(run), config or EvaluationConfig()
    out = run.output_dir if out is None else user_path(out, "out")
    check_writable(out)  # before anything is measured
    model, tokenizer = run.load_model(), run.tokenizer
    trained_on = own_data(run.config)
    settings = config.data or trained_on
    if settings is None:
        files = {"data": "text", "data.valid_files": ["stories.txt"]}
        problem = f"the stories that {run.folder} was trained on are not available"
        raise UserError(problem, fix=files)
    hardware, cache_dir = _hardware(run), settings.cache_dir
    may_change = config.data is None and settings.source != "tinystories_sample"
    model = model.to(hardware.accelerator).use(kernels_for(hardware.accelerator))

    def score(corpus: Corpus) -> Score:
        split = prepare_split(corpus, "valid", tokenizer, cache_dir)
        if may_change:
            _warn_if_changed(split.n_tokens, run)
        batching = config.batch_size, config.stride
        loss = evaluate_loss(model, split.array(), *batching, hardware.precision, console)
        bits_per_byte = loss.bits_per_byte(split.bytes_per_token)
        numbers = split.n_stories, loss.n_tokens, loss.nats_per_token, loss.perplexity
        return Score(*numbers, bits_per_byte)

    settings, valid, scores = score_corpora(settings, config.valid, score)
    stories = write_stories(model, tokenizer, config.stories, config.seed)
    rows, n_training = compare_temperatures(config.stories.temperatures, stories, trained_on)
    neighbours, analogies = _probe(EmbeddingProbe(model, tokenizer), config)
    evaluation = Evaluation(
        **dataclasses.asdict(scores[0]),
        valid=valid,
        valid_v1=scores[1] if len(scores) > 1 else None,
        checkpoint=run.checkpoint.name,
        weights=weights_fingerprint(model),
        parameters=model.n_parameters,
        device=hardware.accelerator,
        precision=hardware.precision,
        data=dataclasses.asdict(settings),
        stride=config.stride,
        seed=config.seed,
        temperatures=rows,
        novelty_stories=n_training,
        neighbours=neighbours,
        analogies=analogies,
    )
    write_json(out / evaluation_name(config, evaluation), dataclasses.asdict(evaluation))
    return evaluation


def _warn_if_changed(n_tokens: int, run: Run) -> None:
    """Log a warning if the run's own validation split has another size than in training.

    Args:
        n_tokens: number of tokens in the validation split now.
        run: the run, which may not have recorded the number.
    """
    recorded = read_summary(run.folder).get("valid_tokens")
    if recorded not in (None, n_tokens):
        log.warning(
            "the data of %s has changed: its validation split has %s tokens, but had %s in "
            "training; it may contain stories that the model was trained on",
            run.folder, f"{n_tokens:,}", f"{recorded:,}",
        )  # fmt: skip


def _hardware(run: Run) -> Hardware:
    """Return the best device, with the precision in which the run was trained.

    The precision is read from summary.json. If it is not recorded there, the setting
    `trainer.precision` of the run is used, and `auto` means the best precision for this device. On
    a CPU, 16-mixed is treated as `auto`. If the CPU would emulate bfloat16, float32 is used.
    """
    # A killed run has no summary.json, so the precision is resolved from the setting of the run.
    setting = (run.config.get("trainer") or {}).get("precision", "auto")
    precision = read_summary(run.folder).get("precision", setting)
    hardware = Hardware.single(precision)
    if not hardware.emulated:
        if hardware.precision != precision != "auto":
            log.info("using %s: %s", hardware.precision, hardware.why)
        return hardware
    log.info("using 32-true instead of %s: this CPU has no native bfloat16", precision)
    return Hardware.single("32-true")


def _probe(
    probe: EmbeddingProbe, config: EvaluationConfig
) -> tuple[dict[str, Tokens | str], dict[str, Tokens | str]]:
    """Return the nearest tokens of each word and the answers to each analogy.

    If a word or an analogy has no result, the reason stands in its place.
    """
    neighbours = {word: tokens_or_reason(probe.neighbours, word) for word in config.words}
    analogies = {
        f"{a} − {b} + {c}": tokens_or_reason(probe.analogy, a, b, c) for a, b, c in config.analogies
    }
    return neighbours, analogies


def check_writable(folder: Path, name: str = "evaluation.json") -> None:
    """Create `folder` if it is missing; raise UserError if no file can be created in it.

    The error says that the file `name` cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = f"cannot write {name} ({error.strerror}); choose another folder"
        raise UserError(problem, "out", str(folder)) from None


def score_corpora(
    data: DataConfig, valid: str | None, score: Callable[[Corpus], Score]
) -> tuple[DataConfig, str | None, list[Score]]:
    """Score the validation stories that the settings select.

    Args:
        data: data settings.
        valid: validation stories of the bundled sample, as in `EvaluationConfig`.
        score: function to call with each corpus; it returns the score.

    Returns:
        Three values: the data settings of the scored stories, the name of the stories, and the list
        of scores. The name is "v1", "v2" or "both" for validation splits of the bundled sample. It
        is None for all other stories, and for stories that `data.valid` selects. If the name is
        "both", the first score is for V2 and the second for V1.

    Raises:
        UserError: the stories cannot be read, or `valid` is set but the data is not the bundled
            sample.
    """
    sample = data.source == "tinystories_sample"
    if valid is not None and not sample:
        problem = f"is only for the bundled sample, not for data.source={data.source}: leave it out"
        raise UserError(problem, "valid", valid)
    if valid is None and not (sample and data.valid is None):
        return data, None, [score(open_corpus(data, valid_only=True))]
    valid = valid or "both"
    v2, v1 = bundled_sample("v2"), bundled_sample("v1")
    corpora = {"v2": [v2], "v1": [v1], "both": [v2, v1]}[valid]
    return dataclasses.replace(data, valid=None), valid, [score(corpus) for corpus in corpora]


def evaluation_name(config: EvaluationConfig, evaluation: Evaluation) -> str:
    """Return the name of the file to write an evaluation to.

    The name consists of "evaluation" and a part for each of the following that applies: the source
    of `config.data`, if this is set; "tuning" for data.valid=tuning; "v1" if only the stories
    from TinyStories V1 are scored; and `config.stride`, if this is set.

    Args:
        config: settings of the evaluation.
        evaluation: the evaluation.

    Returns:
        The name, such as "evaluation-stride128.json".
    """
    return file_name("evaluation", config, evaluation.data["valid"] == "tuning", evaluation.valid)


def file_name(start: str, config: EvaluationConfig, is_tuning: bool, valid: str | None) -> str:
    """Return the name of a file of results: `start`, then the parts listed in `evaluation_name`."""
    parts = [
        start,
        config.data.source if config.data else "",
        "tuning" if is_tuning else "",
        "v1" if valid == "v1" else "",
        f"stride{config.stride}" if config.stride else "",
    ]
    return "-".join(filter(None, parts)) + ".json"
