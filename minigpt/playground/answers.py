"""HTML answers to visitor input on the playground page.

All inputs are limited in length and range. For an invalid input the page shows a one-line error.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

from minigpt.analysis.attention import HeadScores, attention_weights, head_scores
from minigpt.analysis.embedding_map import FewWordsError, caption, embedding_map, map_svg
from minigpt.analysis.embeddings import EmbeddingProbe, parse_analogy
from minigpt.core.gpu_memory import is_out_of_memory
from minigpt.core.hardware import model_device
from minigpt.core.settings import UserError, one_line
from minigpt.core.text import human_count
from minigpt.generation.sampling import SamplingConfig, encode_prompt
from minigpt.model import GPT
from minigpt.playground import html
from minigpt.playground.curves import Curve, curves_html, safe_curve
from minigpt.runs.checkpoint import snapshot_values
from minigpt.runs.folder import Run
from minigpt.runs.names import BEST
from minigpt.tokenizer import Tokenizer

MAX_RUNS = 4  # columns of stories that fit on the page
MAX_PROMPT = 1000  # maximum length of a prompt in characters
MAX_TOKENS = 400  # maximum number of tokens per story
MAX_ATTENTION = 48  # maximum number of tokens in a readable heatmap
UPDATE_SECONDS = 0.08  # minimum time between two updates of a growing story
LOADED_AGES = 12  # maximum number of snapshots in memory


@dataclass(frozen=True)
class Age:
    """Snapshot of a model during its training. Visitors select it with the age slider."""

    name: str  # name of the snapshot on the page
    run: Run  # the run, with the snapshot as its selected checkpoint
    tokenizer: Tokenizer  # tokenizer of the run; all snapshots of a run share this object
    tokens: int  # number of training tokens up to the snapshot


@dataclass(frozen=True)
class LoadedModel:
    """Loaded model of a run or of a snapshot, with the data that the page shows about it."""

    name: str
    net: GPT
    tokenizer: Tokenizer
    probe: EmbeddingProbe
    map: str | None  # map of word embeddings, as HTML; None means that it is drawn when needed
    checkpoint: Path | None = None
    ages: tuple[Age, ...] = ()  # snapshots of the run, sorted by step
    curve: Curve | None = None  # loss curve of the run

    @cached_property
    def scores(self) -> HeadScores | None:
        """Previous-token and induction scores of all heads; None if they cannot be measured."""
        try:
            return head_scores(self.net)
        except UserError:  # such as a context that is too short, or a class without cache
            return None


class Models(dict[str, LoadedModel]):
    """Loaded models by name. A look-up of the name of a snapshot loads the snapshot."""

    def __missing__(self, name: str) -> LoadedModel:
        for model in self.values():
            for age in model.ages:
                if age.name == name:
                    return _load_age(age)
        raise KeyError(name)


class Playground:
    """Loaded models and their answers to visitors.

    Only `add` modifies the object: it replaces the dict `models` by a new one. So several threads
    can answer visitors at the same time.

    Args:
        models: the models. Their names must differ.
        min_ages: lower limit for `n_ages`, the length of the age slider.

    Attributes:
        n_ages: length of the age slider: the highest number of snapshots of `models`, or
            `min_ages` if that is higher. It does not change when a model is added, so that a
            position has the same meaning for all visitors.
    """

    def __init__(self, models: Sequence[LoadedModel], min_ages: int = 0) -> None:
        self.models = Models({model.name: model for model in models})
        self.n_ages = max([min_ages, *(len(model.ages) for model in models)])

    @classmethod
    def load(cls, runs: Sequence[Run], min_ages: int = 0) -> Playground:
        """Load the models of `runs`; a checkpoint that several runs share is loaded once.

        Args:
            runs: the runs, at most MAX_RUNS.
            min_ages: lower limit for `n_ages`, the length of the age slider. If a model may be
                added later, pass its number of snapshots.

        Returns:
            A playground with these models.

        Raises:
            UserError: there are too many runs, or one of them cannot be read.
        """
        if len(runs) > MAX_RUNS:
            raise UserError(f"the page shows at most {MAX_RUNS} runs, not {len(runs)}")
        models: dict[Path, LoadedModel] = {}
        for run in runs:
            if (path := run.checkpoint.resolve()) not in models:
                models[path] = _load(run, [model.name for model in models.values()])
        return cls(list(models.values()), min_ages)

    def add(self, run: Run) -> None:
        """Add the model of a run, unless it is already loaded.

        Args:
            run: the run.

        Raises:
            UserError: the run cannot be read.
        """
        paths = {m.checkpoint.resolve() for m in self.models.values() if m.checkpoint is not None}
        if run.checkpoint.resolve() not in paths:
            model = _load(run, list(self.models))
            self.models = Models({**self.models, model.name: model})

    @property
    def has_ages(self) -> bool:
        """Whether at least one of the models has snapshots."""
        return any(model.ages for model in self.models.values())

    def aged(self, name: str, age: int | None) -> str:
        """Return the name of the snapshot that the age slider selects for a model.

        Args:
            name: name of the model.
            age: position of the slider, from 0 for the first snapshot to `n_ages` for the model
                itself. None also means the model itself. If the model has fewer than `n_ages`
                snapshots, they are spread evenly over the positions below `n_ages`.

        Returns:
            A key of `models`: the name of the snapshot, or `name` for the model itself and for a
            model without snapshots.
        """
        ages, n = self.models[name].ages, self.n_ages
        if age is None or not ages or age >= n:
            return name
        return ages[max(int(age), 0) * len(ages) // n].name

    def age_html(self, names: Sequence[str], age: int | None) -> str:
        """Return the loss curves of models as HTML, each with a line at the selected snapshot.

        Models without snapshots or without a loss curve are left out.

        Args:
            names: names of models that visitors chose; names of unknown models are left out. If
                there are fewer than MAX_RUNS, the first of the other models are added.
            age: position of the age slider, as in `aged`.
        """
        curves, known = {}, [name for name in dict.fromkeys(names) if name in self.models]
        others = [name for name in self.models if name not in known]
        for name in known + others[: max(MAX_RUNS - len(known), 0)]:
            model = self.models[name]
            if model.curve is not None and model.ages:
                key = self.aged(name, age)
                tokens = {each.name: each.tokens for each in model.ages}.get(key)
                curves[key] = model.curve, model.curve.end if tokens is None else tokens
        return curves_html(curves)

    def chosen(self, names: Sequence[str] | None) -> list[str]:
        """Return the names of the models that a visitor chose, at most MAX_RUNS.

        Args:
            names: the chosen names; names of unknown models are left out. None or an empty list
                means the first models.
        """
        return [name for name in names or self.models if name in self.models][:MAX_RUNS]

    def write(
        self, prompt: str, temperature: float, top_k: int, top_p: float, min_p: float,
        max_tokens: int, names: Sequence[str] | None = None, age: int | None = None,
        seed: int | None = None,
    ) -> Iterator[tuple[str, ...]]:  # fmt: skip
        """Yield the stories of several models as HTML, updated as they grow.

        All models sample with the same seed. For an invalid input, a one-line error is yielded
        instead of each story.

        Args:
            prompt: beginning of the story, at most MAX_PROMPT characters.
            temperature: sampling temperature; 0 means that the most likely token is always chosen.
            top_k: number of most likely tokens to sample from; 0 means all.
            top_p: minimum total probability of the most likely tokens to sample from; 1 means all.
            min_p: minimum probability of a token, as a fraction of the highest; 0 means all tokens.
            max_tokens: maximum number of new tokens, from 1 to MAX_TOKENS.
            names: names of the models, as in `chosen`.
            age: position of the age slider, as in `aged`.
            seed: seed of the sampling; None means a random seed.

        Yields:
            The story so far of each model.
        """
        chosen = self.chosen(names)
        try:
            prompt = checked_text(prompt)
            if not 1 <= max_tokens <= MAX_TOKENS:
                raise UserError(f"must be from 1 to {MAX_TOKENS}", "max_tokens", max_tokens)
            seed = random.getrandbits(31) if seed is None else seed
            sampling = SamplingConfig(temperature, top_k or None, top_p, max_tokens, seed, min_p)
            models = [self.models[self.aged(name, age)] for name in chosen]
            stories = [_story(model, prompt, sampling) for model in models]
            columns = [next(story) for story in stories]
        except UserError as error:
            yield (html.note_html(str(error), "error"),) * len(chosen)
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
        """Return the two-dimensional map of word embeddings of the model `name`, as HTML."""
        try:
            model = self.models[name]
        except UserError as error:  # its files were deleted
            return html.note_html(str(error), "error")
        return _word_map(model.probe) if model.map is None else model.map

    def attention(self, name: str, text: str, layer: int, head: int) -> str:
        """Return the attention of one head, as HTML.

        Args:
            name: name of the model.
            text: text to read; at most its first MAX_ATTENTION tokens are shown.
            layer: number of the layer, from 1.
            head: number of the head, from 1.

        Returns:
            The text and the attention matrix, or a one-line error.
        """
        try:
            model = self.models[name]
            shape = model.net.config
            for part, i, n in (("layers", layer, shape.n_layers), ("heads", head, shape.n_heads)):
                if not 1 <= i <= n:
                    raise UserError(f"{name} has {n} {part}: choose a number from 1 to {n}.")
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
    """Yield the story as HTML: first only the prompt, then the story so far after each new token.

    The last HTML also contains a note on how the story ended, or an error message.
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
        except (UserError, RuntimeError) as error:  # the other models continue
            problem = one_line(error).partition(". ")[0]
            if not isinstance(error, UserError):
                if not is_out_of_memory(error):
                    raise
                problem = "The GPU does not have enough memory"
            yield story + html.note_html(problem, "error")
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
    net, tokenizer = run.load_model(model_device()), run.tokenizer
    name = run.folder.resolve().name
    if run.checkpoint.stem != BEST:
        name += f" {run.checkpoint.stem}"
    name += f" ({human_count(net.n_parameters)} parameters)"
    while name in taken:
        name += " again"
    probe = EmbeddingProbe(net, tokenizer)
    ages = []
    for path in run.snapshots:
        tokens, loss = snapshot_values(path)
        aged = f"{name} after {human_count(tokens)} tokens, {path.stem}"
        ages.append((Age(aged, replace(run, checkpoint=path), tokenizer, tokens), loss))
    curve = safe_curve(run.folder)
    if curve is None and ages:  # a release has no metrics.csv
        losses = [age.tokens for age, _ in ages], [loss for _, loss in ages]
        curve = Curve(losses, ([], []))
    ages = tuple(age for age, _ in ages)
    return LoadedModel(name, net, tokenizer, probe, _word_map(probe), run.checkpoint, ages, curve)


@lru_cache(maxsize=LOADED_AGES)
def _load_age(age: Age) -> LoadedModel:
    net = age.run.load_model(model_device())
    return LoadedModel(age.name, net, age.tokenizer, EmbeddingProbe(net, age.tokenizer), None)


@lru_cache(maxsize=LOADED_AGES)
def _word_map(probe: EmbeddingProbe) -> str:
    """Return the two-dimensional map of word embeddings as HTML, or a one-line error."""
    try:
        words = embedding_map(probe)
        return f'<div class="map">{map_svg(words)}</div>{html.note_html(caption(words))}'
    except FewWordsError as error:
        return html.note_html(str(error), "error")


def checked_text(text: str | None, what: str = "a prompt, such as Once upon a time") -> str:
    """Return `text`; raise UserError if it is empty or too long."""
    if text is None or not text.strip():
        raise UserError(f"The field is empty: type {what}.")
    if len(text) > MAX_PROMPT:
        raise UserError(f"The text has {len(text)} characters: type at most {MAX_PROMPT}.")
    return text
