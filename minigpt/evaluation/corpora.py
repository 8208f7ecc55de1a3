"""The stories that an evaluation scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from minigpt.core.settings import UserError, build
from minigpt.data.config import DataConfig, with_cache_here
from minigpt.data.corpus import Corpus
from minigpt.data.sources import are_available, bundled_sample, open_corpus
from minigpt.evaluation.loss import Score


@dataclass(frozen=True)
class Scores(Score):
    """Loss on the validation stories that the settings select.

    If the validation stories of both TinyStories V2 and V1 were scored, the fields inherited from
    `Score` are for V2, and `valid_v1` is the score for V1.
    """

    valid: str | None  # stories of the bundled sample: v1, v2 or both; None if others were scored
    valid_v1: Score | None  # loss on V1, if both were scored
    data: dict[str, Any]  # settings of the scored data


def own_data(run_config: dict[str, Any]) -> DataConfig | None:
    """Return the data settings that a run was trained with.

    Args:
        run_config: configuration of the run.

    Returns:
        The settings; None if the data cannot be found. This is the case for an export of a run on
        the user's own files or on a local dataset, because an export does not record their paths,
        and for a run whose files are gone, such as the uploads of a run that the playground has
        trained. It is also the case for the source `tinystories_tuning`, no longer bundled.

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
    settings = with_cache_here(build(DataConfig, data, "data"))
    files = settings.valid_files or settings.train_files
    if settings.source == "text" and not are_available([*files]):
        return None
    return settings


def score_corpora(data: DataConfig, valid: str | None, score: Callable[[Corpus], Score]) -> Scores:
    """Score the validation stories that the settings select.

    Args:
        data: data settings.
        valid: validation stories of the bundled sample, as in `EvaluationConfig`.
        score: function to call with each corpus; it returns the score.

    Returns:
        The scores. Their field `valid` is None for stories that are not a validation split of the
        bundled sample, and for stories that `data.valid` selects.

    Raises:
        UserError: the stories cannot be read, or `valid` is set but the data is not the bundled
            sample.
    """
    sample = data.source == "tinystories_sample"
    if valid is not None and not sample:
        problem = f"is only for the bundled sample, not for data.source={data.source}: leave it out"
        raise UserError(problem, "valid", valid)
    if valid is None and not (sample and data.valid is None):
        first, valid_v1 = score(open_corpus(data, valid_only=True)), None
    else:
        valid, data = valid or "both", dataclasses.replace(data, valid=None)
        first = score(bundled_sample("v1" if valid == "v1" else "v2"))
        valid_v1 = score(bundled_sample("v1")) if valid == "both" else None
    return Scores(**vars(first), valid=valid, valid_v1=valid_v1, data=dataclasses.asdict(data))
