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
    """Return `n` continuations of a prompt by the model of a run.

    Args:
        run: a run, or the path of its folder, of a checkpoint or of an export.
        prompt: beginning of each story.
        n: number of stories, at least 1.
        sampling: how tokens are chosen; None means the defaults, with a new seed each time.

    Returns:
        The continuations, without the prompt.

    Raises:
        UserError: `run` is not a run or cannot be read, or the prompt is not valid Unicode.
    """
    run, sampling = Run.load(run), sampling or SamplingConfig()
    return generate_stories(run.load_model(), run.tokenizer, prompt, n, sampling)
