"""What the playground's page shows for what visitors type.

`Playground` answers in HTML. Whatever is typed is bounded, and a mistake is one line in the page.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minigpt.analysis.attention import attention_weights
from minigpt.analysis.embedding_map import FewWordsError, caption, embedding_map, map_svg
from minigpt.analysis.embeddings import EmbeddingProbe, parse_analogy
from minigpt.core.settings import UserError
from minigpt.core.text import human_count
from minigpt.generation.sampling import SamplingConfig, encode_prompt
from minigpt.model import GPT
from minigpt.playground.html import (
    attention_html,
    bars_html,
    note_html,
    prompt_html,
    stream_tokens,
    token_html,
)
from minigpt.runs.folder import Run
from minigpt.runs.names import BEST
from minigpt.tokenizer import Tokenizer

MAX_RUNS = 4  # columns that a page has room for
MAX_PROMPT = 1000  # characters
MAX_TOKENS = 400  # of a story
MAX_ATTENTION = 48  # tokens: what a heatmap can be read at
UPDATE_SECONDS = 0.08  # between two looks at a growing story


@dataclass(frozen=True)
class LoadedModel:
    """The model of one run on the page."""

    name: str
    net: GPT
    tokenizer: Tokenizer
    probe: EmbeddingProbe
    map: str  # HTML


class Playground:
    """What the page shows for what a visitor types. Keeps nothing: many may ask at once."""

    def __init__(self, models: Sequence[LoadedModel]) -> None:
        self.models = {model.name: model for model in models}

    @classmethod
    def load(cls, runs: Sequence[Run]) -> Playground:
        """Return a page with the models of `runs`, each once.

        Raises:
            UserError: more than MAX_RUNS, or one that cannot be read.
        """
        if len(runs) > MAX_RUNS:
            raise UserError(f"{len(runs)} runs do not fit on a page: give at most {MAX_RUNS}")
        models: dict[Path, LoadedModel] = {}
        for run in runs:
            if run.checkpoint not in models:
                models[run.checkpoint] = _load(run, [model.name for model in models.values()])
        return cls(list(models.values()))

    def write(
        self, prompt: str, temperature: float, top_k: int, top_p: float, min_p: float,
        max_tokens: int,
    ) -> Iterator[tuple[str, ...]]:  # fmt: skip
        """The story of each model as HTML, again and again while it grows.

        All models sample with one seed. top_k 0 and top_p 1 mean without.
        """
        try:
            prompt = _checked(prompt)
            if not 1 <= max_tokens <= MAX_TOKENS:
                raise UserError(f"a length of {max_tokens} must be from 1 to {MAX_TOKENS} tokens")
            sampling = SamplingConfig(
                temperature, top_k or None, top_p, max_tokens, random.getrandbits(31), min_p
            )
            stories = [_story(model, prompt, sampling) for model in self.models.values()]
            shown = [next(story) for story in stories]
        except UserError as error:
            yield (note_html(str(error), "error"),) * len(self.models)
            return
        last = 0.0  # the first token is shown at once
        while any(looks := [next(story, "") for story in stories]):
            shown = [look or before for look, before in zip(looks, shown, strict=True)]
            if time.monotonic() - last > UPDATE_SECONDS:
                yield tuple(shown)
                last = time.monotonic()
        yield tuple(shown)

    def neighbours(self, name: str, word: str) -> str:
        """Bars of the tokens nearest to `word` in the model called `name`."""
        try:
            return bars_html(self.models[name].probe.neighbours(_checked(word, "a word"), k=8))
        except UserError as error:
            return note_html(str(error), "error")

    def analogy(self, name: str, text: str) -> str:
        """Bars of the answers to `princess - girl + boy`."""
        try:
            words = parse_analogy(_checked(text, "three words"))
            return bars_html(self.models[name].probe.analogy(*words, k=8))
        except UserError as error:
            return note_html(str(error), "error")

    def map(self, name: str) -> str:
        """The map of words of the model called `name`."""
        return self.models[name].map

    def attention(self, name: str, text: str, layer: int, head: int) -> str:
        """Where each token of `text` looks, in a layer and head that are counted from 1."""
        model = self.models[name]
        shape = model.net.config
        try:
            for part, i, n in (("layers", layer, shape.n_layers), ("heads", head, shape.n_heads)):
                if not 1 <= i <= n:
                    raise UserError(f"{name} has {n} {part}: choose 1 to {n}")
            text_ids = encode_prompt(model.tokenizer, _checked(text, "a sentence"))
            ids = text_ids[:, : min(MAX_ATTENTION, shape.context_length)]
            weights = attention_weights(model.net, ids.to(model.net.embedding.weight.device))
        except UserError as error:
            return note_html(str(error), "error")
        names = ["(start) ", *map(model.tokenizer.token, ids[0, 1:].tolist())]
        shown = attention_html(names, weights[layer - 1, head - 1])
        if ids.shape[1] == text_ids.shape[1]:
            return shown
        cut = f"Only the first {ids.shape[1]} of {text_ids.shape[1]} tokens are shown."
        return note_html(cut) + shown


def _story(model: LoadedModel, prompt: str, sampling: SamplingConfig) -> Iterator[str]:
    """Yield a story as HTML: the prompt alone, then again with each token; how it ended last."""
    length, context = len(model.tokenizer.encode(prompt)), model.net.config.context_length
    shown = prompt_html(prompt)
    if length >= context:
        cut = f"{length} tokens outgrow the context of {context}: the model reads their end."
        shown = note_html(cut) + shown
    yield shown
    tokens = stream_tokens(model.net, model.tokenizer, prompt, sampling)
    n, seconds, end = 0, 0.0, "The longest length was reached"
    while True:
        started = time.monotonic()
        token = next(tokens, None)
        seconds += time.monotonic() - started  # without the turns of the others
        if token is None:
            break
        n, shown = n + 1, shown + token_html(token)
        if not token.text:
            end = "The story ended"
            break
        yield shown
    yield shown + note_html(f"{end}: {n} tokens, {n / max(seconds, 1e-3):.0f} a second.")


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
        word_map = f'<div class="map">{map_svg(words)}</div>{note_html(caption(words))}'
    except FewWordsError as error:
        word_map = note_html(str(error), "error")
    return LoadedModel(name, net, tokenizer, probe, word_map)


def _checked(text: str | None, what: str = "how the story begins, such as Once upon a time") -> str:
    """`text`, if it is something and not too long. UserError otherwise."""
    if text is None or not text.strip():
        raise UserError(f"Nothing is typed: type {what}.")
    if len(text) > MAX_PROMPT:
        raise UserError(f"{len(text)} characters are too many: type at most {MAX_PROMPT}.")
    return text
