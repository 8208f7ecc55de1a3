"""Evaluation of a trained model: validation loss, generated stories, and embedding probes.

>>> evaluation = evaluate(Run.load("runs/my-run"), EvaluationConfig(stride=128))
>>> evaluation.perplexity
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from rich.console import Console

from minigpt.analysis.embeddings import EmbeddingProbe, Tokens, tokens_or_reason
from minigpt.core.files import user_path, write_json
from minigpt.core.hardware import Hardware
from minigpt.core.settings import UserError
from minigpt.data.config import DataConfig
from minigpt.data.corpus import Corpus
from minigpt.data.preparation import prepare_split
from minigpt.evaluation.config import EvaluationConfig
from minigpt.evaluation.corpora import Scores, own_data, score_corpora
from minigpt.evaluation.loss import Score, evaluate_loss
from minigpt.evaluation.results import Evaluation, check_writable, evaluation_name
from minigpt.evaluation.stories import compare_temperatures, write_stories
from minigpt.kernels.choice import kernels_for
from minigpt.model import GPT
from minigpt.runs.checkpoint import weights_fingerprint
from minigpt.runs.folder import Run
from minigpt.runs.records import read_summary

log = logging.getLogger("minigpt")


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
    if config.context is not None:
        problem = "applies only to a Hugging Face model: leave it out"
        raise UserError(problem, "context", config.context)
    out = run.output_dir if out is None else user_path(out, "out")
    check_writable(out)  # before anything is measured
    model, tokenizer = run.load_model(), run.tokenizer
    trained_on = own_data(run.config)
    settings = config.data or trained_on
    if settings is None:
        files = {"data": "text", "data.valid_files": ["stories.txt"]}
        problem = f"the stories that {run.folder} was trained on are not available"
        raise UserError(problem, fix=files)
    hardware = _hardware(run)
    model = model.to(hardware.accelerator).use(kernels_for(hardware.accelerator))
    scores = _scores(model, run, config, settings, hardware.precision, console)
    stories = write_stories(model, tokenizer, config.stories, config.seed)
    rows, n_training = compare_temperatures(config.stories.temperatures, stories, trained_on)
    neighbours, analogies = _probe(EmbeddingProbe(model, tokenizer), config)
    evaluation = Evaluation(
        **vars(scores),
        checkpoint=run.checkpoint.name,
        weights=weights_fingerprint(model),
        parameters=model.n_parameters,
        device=hardware.accelerator,
        precision=hardware.precision,
        stride=config.stride,
        seed=config.seed,
        temperatures=rows,
        novelty_stories=n_training,
        neighbours=neighbours,
        analogies=analogies,
    )
    write_json(out / evaluation_name(config, evaluation), dataclasses.asdict(evaluation))
    return evaluation


def _scores(
    model: GPT, run: Run, config: EvaluationConfig, data: DataConfig, precision: str,
    console: Console | None,
) -> Scores:  # fmt: skip
    """Return the loss of the model of `run` on the validation stories of `data`."""
    may_change = config.data is None and data.source != "tinystories_sample"

    def score(corpus: Corpus) -> Score:
        split = prepare_split(corpus, "valid", run.tokenizer, data.cache_dir)
        if may_change:
            _warn_if_changed(split.n_tokens, run)
        batching = config.batch_size, config.stride
        loss = evaluate_loss(model, split.array(), *batching, precision, console)
        return loss.score(split.n_stories, split.bytes_per_token)

    return score_corpora(data, config.valid, score)


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
