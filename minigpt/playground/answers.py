"""HTML answers to visitor input on the playground page.

All inputs are limited in length and range. For an invalid input the page shows a one-line error.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minigpt.analysis.attention import HeadScores, attention_weights, head_scores
from minigpt.analysis.embedding_map import FewWordsError, caption, embedding_map, map_svg
from minigpt.analysis.embeddings import EmbeddingProbe, parse_analogy
from minigpt.core.settings import UserError
from minigpt.core.text import human_count
from minigpt.generation.sampling import SamplingConfig, encode_prompt
from minigpt.model import GPT
from minigpt.playground import html
from minigpt.runs.folder import Run
from minigpt.runs.names import BEST
from minigpt.tokenizer import Tokenizer

MAX_RUNS = 4  # columns of stories that fit on the page
MAX_PROMPT = 1000  # maximum length of a prompt in characters
MAX_TOKENS = 400  # maximum number of tokens per story
MAX_ATTENTION = 48  # maximum number of tokens in a readable heatmap
UPDATE_SECONDS = 0.08  # minimum time between two updates of a growing story


@dataclass(frozen=True)
class LoadedModel:
    """Model of one run on the page."""

    name: str
    net: GPT
    tokenizer: Tokenizer
    probe: EmbeddingProbe
    map: str  # map of words, as HTML
    scores: HeadScores | None = None  # None if they cannot be measured


class Playground:
    """Loaded models and their answers to visitors.

    Methods do not modify the object, so many visitors can be served at once.

    Args:
        models: the models, whose names must differ.
    """

    def __init__(self, models: Sequence[LoadedModel]) -> None:
        self.models = {model.name: model for model in models}

    @classmethod
    def load(cls, runs: Sequence[Run]) -> Playground:
        """Load the models of `runs`; a checkpoint that several runs share is loaded once.

        Args:
            runs: the runs, at most MAX_RUNS.

        Returns:
            A playground with these models.

        Raises:
            UserError: there are too many runs, or one of them cannot be read.
        """
        if len(runs) > MAX_RUNS:
            raise UserError(f"the page shows at most {MAX_RUNS} runs, not {len(runs)}")
        models: dict[Path, LoadedModel] = {}
        for run in runs:
            if run.checkpoint not in models:
                models[run.checkpoint] = _load(run, [model.name for model in models.values()])
        return cls(list(models.values()))

    def write(
        self, prompt: str, temperature: float, top_k: int, top_p: float, min_p: float,
        max_tokens: int,
    ) -> Iterator[tuple[str, ...]]:  # fmt: skip
        """Yield the stories of all models as HTML, updated as they grow.

        All models sample with the same seed. For an invalid input, a one-line error is yielded
        instead of each story.

        Args:
            prompt: beginning of the story, at most MAX_PROMPT characters.
            temperature: sampling temperature; 0 means that the most likely token is always chosen.
            top_k: number of most likely tokens to sample from; 0 means all.
            top_p: total probability of the most likely tokens to sample from; 1 means all.
            min_p: minimum probability, relative to the most likely token; 0 means all tokens.
            max_tokens: maximum number of new tokens, from 1 to MAX_TOKENS.

        Yields:
            The story so far of each model.
        """
        try:
            prompt = checked_text(prompt)
            if not 1 <= max_tokens <= MAX_TOKENS:
                raise UserError(f"must be from 1 to {MAX_TOKENS}", "max_tokens", max_tokens)
            seed = random.getrandbits(31)
            sampling = SamplingConfig(temperature, top_k or None, top_p, max_tokens, seed, min_p)
            stories = [_story(model, prompt, sampling) for model in self.models.values()]
            columns = [next(story) for story in stories]
        except UserError as error:
            yield (html.note_html(str(error), "error"),) * len(self.models)
            return
        last = 0.0  # the first token is shown at once
        while any(updates := [next(story, "") for story in stories]):
            columns = [new or old for new, old in zip(updates, columns, strict=True)]
            if time.monotonic() - last > UPDATE_SECONDS:
                yield tuple(columns)
                last = time.monotonic()
        yield tuple(columns)

    def neighbours(self, name: str, word: str) -> str:
        """Return a bar chart, as HTML, of the tokens nearest to a word.

        Args:
            name: name of the model.
            word: the word.

        Returns:
            The bar chart, or a one-line error.
        """
        try:
            return html.bars_html(
                self.models[name].probe.neighbours(checked_text(word, "a word"), k=8)
            )
        except UserError as error:
            return html.note_html(str(error), "error")

    def analogy(self, name: str, text: str) -> str:
        """Return a bar chart, as HTML, of the answers to an analogy.

        Args:
            name: name of the model.
            text: analogy, such as "princess - girl + boy".

        Returns:
            The bar chart, or a one-line error.
        """
        try:
            words = parse_analogy(checked_text(text, "three words"))
            return html.bars_html(self.models[name].probe.analogy(*words, k=8))
        except UserError as error:
            return html.note_html(str(error), "error")

    def map(self, name: str) -> str:
        """Return the map of words of the model `name`, as HTML."""
        return self.models[name].map

    def attention(self, name: str, text: str, layer: int, head: int) -> str:
        """Return the attention of one head, as HTML.

        Args:
            name: name of the model.
            text: text to attend to; at most its first MAX_ATTENTION tokens are shown.
            layer: number of the layer, from 1.
            head: number of the head, from 1.

        Returns:
            The text and the attention matrix, or a one-line error.
        """
        model = self.models[name]
        shape = model.net.config
        try:
            for part, i, n in (("layers", layer, shape.n_layers), ("heads", head, shape.n_heads)):
                if not 1 <= i <= n:
                    raise UserError(f"{name} has {n} {part}: choose a number from 1 to {n}")
            text_ids = encode_prompt(model.tokenizer, checked_text(text, "a sentence"))
            ids = text_ids[:, : min(MAX_ATTENTION, shape.context_length)]
            weights = attention_weights(model.net, ids.to(model.net.embedding.weight.device))
        except UserError as error:
            return html.note_html(str(error), "error")
        names = ["(start) ", *map(model.tokenizer.token, ids[0, 1:].tolist())]
        matrix = html.attention_html(names, weights[layer - 1, head - 1])
        if (scores := model.scores) is not None:
            previous = scores.previous_token[layer - 1, head - 1]
            induction = scores.induction[layer - 1, head - 1]
            line = f"Previous-token score {previous:.2f}, induction score {induction:.2f}."
            matrix = html.note_html(line) + matrix
        if ids.shape[1] == text_ids.shape[1]:
            return matrix
        cut = f"Only the first {ids.shape[1]} of {text_ids.shape[1]} tokens are shown."
        return html.note_html(cut) + matrix


def _story(model: LoadedModel, prompt: str, sampling: SamplingConfig) -> Iterator[str]:
    """Yield, as HTML, the story so far.

    The first item is the prompt. Then the story is yielded after each token and, at the end, with a
    note on how it ended.
    """
    length, context = len(model.tokenizer.encode(prompt)), model.net.config.context_length
    story = html.prompt_html(prompt)
    if length >= context:
        size = f"The prompt of {length} tokens does not fit into the context of {context}"
        cut = f"{size}, so only its end is read."
        story = html.note_html(cut) + story
    yield story
    tokens = html.stream_tokens(model.net, model.tokenizer, prompt, sampling)
    n, seconds, end = 0, 0.0, "Stopped at the maximum length"
    while True:
        started = time.monotonic()
        try:
            token = next(tokens, None)
        except UserError as error:  # logits that are not finite; other models continue
            yield story + html.note_html(str(error), "error")
            return
        seconds += time.monotonic() - started  # excludes the time of the other models
        if token is None:
            break
        n, story = n + 1, story + html.token_html(token)
        if not token.text:
            end = "The story ended"
            break
        yield story
    yield story + html.note_html(f"{end}: {n} tokens, {n / max(seconds, 1e-3):.0f} tokens/s.")


def _load(run: Run, taken: Sequence[str]) -> LoadedModel:
    net, tokenizer = run.load_model(), run.tokenizer
    name = run.folder.resolve().name
    if run.checkpoint.stem != BEST:
        name += f" {run.checkpoint.stem}"
    name += f" ({human_count(net.n_parameters)} parameters)"
    while name in taken:
        name += " again"
    probe = EmbeddingProbe(net, tokenizer)
    try:
        words = embedding_map(probe)
        word_map = f'<div class="map">{map_svg(words)}</div>{html.note_html(caption(words))}'
    except FewWordsError as error:
        word_map = html.note_html(str(error), "error")
    try:
        scores = head_scores(net)
    except UserError:  # the context is too short, or the class takes no cache
        scores = None
    return LoadedModel(name, net, tokenizer, probe, word_map, scores)


def checked_text(text: str | None, what: str = "a prompt, such as Once upon a time") -> str:
    """Return `text`; raise UserError if it is empty or too long."""
    if text is None or not text.strip():
        raise UserError(f"The field is empty: type {what}.")
    if len(text) > MAX_PROMPT:
        raise UserError(f"The text has {len(text)} characters: type at most {MAX_PROMPT}.")
    return text
