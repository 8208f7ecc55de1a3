"""Stories that an evaluation generates, and their repetition and novelty."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from minigpt.analysis.repetition import NOVELTY_STORIES, Repetition, measure
from minigpt.core.settings import UserError
from minigpt.data.config import DataConfig
from minigpt.data.sources import bundled_sample, open_corpus
from minigpt.evaluation.config import StoriesConfig
from minigpt.generation.sampling import SamplingConfig, generate_stories
from minigpt.model import GPT
from minigpt.tokenizer import Tokenizer

log = logging.getLogger("minigpt")


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
