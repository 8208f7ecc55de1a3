"""Help for a group of settings (`--help optimizer`) or a single one (`--help optimizer.lr`)."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from minigpt.cli.compose import defaults
from minigpt.core.fields import setting_docs
from minigpt.core.settings import UserError, flat, unknown_name
from minigpt.core.typed import shell_word, typed_settings

# Settings that exist only on the command line, not in a dataclass.
_OWN = {
    "ckpt": "Run to evaluate: its folder, or a checkpoint file in it.",
    "hf": "Folder with a causal language model in Hugging Face's format, to measure instead of a "
    "run; only data, valid, context, stride and batch_size apply.",
    "out": "Folder for evaluation.json; None means the run folder, or, for an export or hf, the "
    "working directory.",
    "class_path": "Dotted path of the model's class; None means minigpt.model.GPT.",
}


def settings_help(name: str, words: Sequence[str]) -> str:
    """Return the help text of the named settings, with their defaults.

    Args:
        name: name of the root config, train or evaluate.
        words: names of settings, or of groups such as optimizer; "all" means every setting.

    Returns:
        For each setting, a line with the default, quoted for a shell, and indented lines that say
        what the setting means.

    Raises:
        UserError: a name is neither a setting nor a group.
    """
    from minigpt.evaluation import EvaluationConfig
    from minigpt.training.config import TrainConfig

    docs = setting_docs(TrainConfig if name == "train" else EvaluationConfig)
    values = flat(defaults(name, ["data=text"]))  # evaluate has no data settings without it
    blocks = []
    for word in (word.partition("=")[0] for word in words):
        chosen = [key for key in values if word in ("all", key) or key.startswith(f"{word}.")]
        if not chosen:
            raise UserError(unknown_name(word, [*values]), word)
        for key in chosen:
            text = docs.get(key, _OWN.get(key.removeprefix("model."), ""))
            lines = textwrap.wrap(re.sub(r"\bNone\b", "null", text), 86)
            (typed,) = typed_settings({key: values[key]})
            typed = f"{key}=<required>" if values[key] == "???" else shell_word(typed)
            blocks.append("\n    ".join([typed, *lines]))
    return "\n".join(blocks)
