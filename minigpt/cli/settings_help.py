"""The help of single settings: `python train.py --help optimizer`, or `--help optimizer.lr`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from minigpt.cli.compose import defaults
from minigpt.cli.program import hydra_value
from minigpt.core.fields import setting_docs
from minigpt.core.settings import UserError, flat, unknown_name

# Settings of the command line alone, which no dataclass has.
_OWN = {
    "ckpt": "The run to evaluate: its folder, or a checkpoint file in it.",
    "out": "Folder of evaluation.json; None means the run's, and the current one for an export.",
    "class_path": "Dotted path of the model's class; None means minigpt.model.GPT.",
}


def settings_help(name: str, words: Sequence[str]) -> str:
    """Return what the settings mean that are named, each with its default.

    Args:
        name: of the root config: train or evaluate.
        words: settings, or groups of them such as optimizer; "all" means every setting.

    Raises:
        UserError: there is no such setting.
    """
    from minigpt.evaluation import EvaluationConfig
    from minigpt.training.config import TrainConfig

    docs = setting_docs(TrainConfig if name == "train" else EvaluationConfig)
    values = flat(defaults(name, ["data=text"]))  # with a corpus, evaluate has the data settings
    blocks = []
    for word in (word.partition("=")[0] for word in words):
        chosen = [key for key in values if word in ("all", key) or key.startswith(f"{word}.")]
        if not chosen:
            raise UserError(unknown_name(word, [*values]))
        for key in chosen:
            text = docs.get(key, _OWN.get(key.removeprefix("model."), ""))
            lines = textwrap.wrap(re.sub(r"\bNone\b", "null", text), 86)
            value = "<required>" if values[key] == "???" else hydra_value(values[key])
            blocks.append("\n    ".join([f"{key}={value}", *lines]))
    return "\n".join(blocks)
