"""Text from a trained model: sampling and decoding."""

from __future__ import annotations

from pathlib import Path

from minigpt.generation.sampling import SamplingConfig, generate_stories, stream_story
from minigpt.runs.folder import Run

__all__ = ["SamplingConfig", "generate", "stream_story"]


def generate(
    run: str | Path | Run,
    prompt: str = "Once upon a time",
    n: int = 1,
    sampling: SamplingConfig | None = None,
) -> list[str]:
    """Return `n` continuations of `prompt` by the model of `run`, without the prompt.

    Args:
        run: a run, or where it is.
        prompt: how each story begins.
        n: number of stories, at least 1.
        sampling: how tokens are chosen; None: the defaults, another story each time.

    Raises:
        UserError: there is no run, or the prompt is not valid Unicode.
    """
    run = Run.load(run)
    return generate_stories(
        run.load_model(), run.tokenizer, prompt, n, sampling or SamplingConfig()
    )
