"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from minigpt.core.fields import documented
from minigpt.core.settings import UserError, make_tuples
from minigpt.data.config import DataConfig
from minigpt.generation.sampling import SamplingConfig


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
        make_tuples(self, "prompts", "temperatures")
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

    context: int | None = None
    """Number of tokens per window of a Hugging Face model, from 1 to the context length of the
    model. None means this length, but at most 2,048; it means 2,048 if the config of the model has
    no length. A run of Mini GPT always uses its own context length."""

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
        make_tuples(self, "words", "analogies")
        for name in ("context", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError("must be at least 1", name, value)
        if self.seed < 0:
            raise UserError("must not be negative", "seed", self.seed)
        for words in self.analogies:
            if len(words) != 3:
                example = {"analogies": [["princess", "girl", "boy"]]}
                problem = "each analogy must have three words"
                raise UserError(problem, "analogies", list(words), fix=example)
