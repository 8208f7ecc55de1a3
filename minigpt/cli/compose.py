"""Compose settings from the defaults of the dataclasses, conf/ and the command line.

The files in conf/ override the defaults, and the command line overrides both. Each default is
defined only in its dataclass. All defaults are registered with Hydra as one config of plain values,
which comes first in Hydra's defaults list. A YAML file therefore need only contain the settings
that differ from the defaults, and every setting can be typed without Hydra's plus sign.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton
from hydra.errors import HydraException
from hydra.version import VersionBase
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import minigpt
from minigpt.cli.program import CLASS_SETTINGS, names_class
from minigpt.cli.words import hydra_word, is_sweep
from minigpt.core.fields import setting_types
from minigpt.core.files import user_path
from minigpt.core.settings import UserError, build, plain_defaults, unknown_name
from minigpt.core.typed import is_quoted, quoted

if TYPE_CHECKING:
    from minigpt.evaluation import EvaluationConfig
    from minigpt.training.config import TrainConfig


def config_source() -> str:
    """Return the location of conf/ for Hydra: its path in a checkout, else pkg://minigpt.conf."""
    root = Path(minigpt.__file__).parent.parent
    beside = (root / "pyproject.toml").is_file() and (root / "conf/train.yaml").is_file()
    return str(root / "conf") if beside else "pkg://minigpt.conf"


@overload
def load_config(
    name: Literal["train"] = "train", overrides: Sequence[str] = (),
    config_dir: str | Path | None = None,
) -> TrainConfig: ...  # fmt: skip


@overload
def load_config(
    name: Literal["evaluate"], overrides: Sequence[str] = (), config_dir: str | Path | None = None
) -> EvaluationConfig: ...


def load_config(
    name: str = "train", overrides: Sequence[str] = (), config_dir: str | Path | None = None
) -> TrainConfig | EvaluationConfig:
    """Return the settings that the command line would compose from `overrides`.

    The function works in any working directory. It can be called inside another Hydra application,
    because it restores Hydra's previous state at the end.

    Args:
        name: "train" or "evaluate".
        overrides: settings as typed on the command line, such as ["model=large",
            "budget.tokens=20e6"].
        config_dir: folder with additional config groups, like --config-dir.

    Returns:
        A `TrainConfig` for "train", an `EvaluationConfig` for "evaluate".

    Raises:
        UserError: `name`, a setting or an option of a config group is unknown, a value is not
            allowed, or `config_dir` is not a folder.
    """
    if name not in CLASS_SETTINGS:
        raise UserError(unknown_name(name, list(CLASS_SETTINGS), "config"), "name", name)
    values, size = compose_values(name, overrides, config_dir)
    if name == "train":
        return train_config(values, size, overrides, typed_class("model.class_path", overrides))
    return evaluation_config(values)


def compose_values(
    name: str, overrides: Sequence[str] = (), config_dir: str | Path | None = None
) -> tuple[dict[str, Any], str | None]:
    """Compose settings, and return them as plain values with interpolations resolved.

    Args:
        name: name of the root config.
        overrides: settings as typed on the command line.
        config_dir: folder with additional config groups.

    Returns:
        The values, and the chosen option of the config group `model`, such as large; None if the
        root config has no such group.

    Raises:
        UserError: a setting cannot be read, a setting or an option of a config group is unknown, or
            `config_dir` is not a folder.
    """
    from minigpt.cli.hydra_errors import explain

    folder = None if config_dir is None else user_path(config_dir, "config_dir").absolute()
    words = composed_words(name, overrides, folder)
    if folder is not None:
        if not folder.is_dir():
            raise UserError("must be an existing folder", "config_dir", str(config_dir))
        words.append(f"hydra.searchpath=[{quoted(f'file://{folder}')}]")
    with own_hydra(name, overrides):
        try:
            config = compose(name, words, return_hydra_config=True)
            size = config.hydra.runtime.choices.get("model")
            with open_dict(config):
                del config["hydra"]
            return plain_values(config), size
        except (HydraException, OmegaConfBaseException) as error:
            raise explain(error, name) from None


def plain_values(config: Any) -> Any:
    """Return a composed config as a dict of plain values, with interpolations resolved."""
    return OmegaConf.to_container(config, resolve=True)


def composed_words(name: str, typed: Sequence[str], folder: Path | None = None) -> list[str]:
    """Return the typed settings in Hydra's grammar; teacher= becomes teacher.runs=.

    Settings that name a model class, such as model.class_path, are left out.

    For train, `local=<value of MINIGPT_LOCAL>` is added if the environment variable MINIGPT_LOCAL
    is set and a folder called local/ is in conf/ or in `folder`.

    Args:
        name: name of the root config.
        typed: settings as typed on the command line.
        folder: folder with additional config groups.
    """
    words = [_teacher_word(word) for word in typed if not names_class(word, name)]
    folders = [Path(path) for path in (config_source(), folder) if path is not None]
    has_local = any((path / "local").is_dir() for path in folders)
    if name == "train" and has_local and (local := os.environ.get("MINIGPT_LOCAL")):
        words.insert(first_setting(words), f"local={local}")
    hints, sweep = types_of_settings(name, typed), is_sweep(words)
    return [hydra_word(word, hints, sweep) for word in words]


def _teacher_word(word: str) -> str:
    """Return a typed setting in which teacher= is teacher.runs=; null means no teachers."""
    word = re.sub(r"^(\+{0,2})teacher=", r"\1teacher.runs=", word)
    return re.sub(r"^(\+{0,2}teacher\.runs)=(null|None)$", r"\1=[]", word)


def first_setting(words: Sequence[str]) -> int:
    """Return the index of the first setting in `words`; the length of `words` if there is none.

    New settings are inserted at this index, next to the other settings, because argparse does not
    accept settings both before and after a flag.
    """
    settings = (i for i, word in enumerate(words) if "=" in word and not word.startswith("-"))
    return next(settings, len(words))


@contextlib.contextmanager
def own_hydra(name: str, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Initialise Hydra for the root config `name`, and restore Hydra's previous state at the end.

    Args:
        name: name of the root config.
        overrides: settings as typed. Some of them add further settings: see `defaults`.
    """
    instances, store = Singleton._instances, ConfigStore.instance()
    before, repo = dict(instances), store.repo
    store.repo = copy.copy(repo)
    for kind in (GlobalHydra, VersionBase):
        instances.pop(kind, None)
    try:
        register_defaults(name, overrides)
        if (source := config_source()).startswith("pkg://"):
            initialize_config_module(source.removeprefix("pkg://"), version_base="1.3")
        else:
            initialize_config_dir(source, version_base="1.3")
        yield
    finally:
        instances.clear()
        instances.update(before)
        store.repo = repo


def register_defaults(name: str, overrides: Sequence[str] = ()) -> None:
    """Register the defaults of a root config with Hydra.

    Args:
        name: name of the root config.
        overrides: settings as typed. Some of them add further settings: see `defaults`.
    """
    ConfigStore.instance().store(f"{name}_defaults", defaults(name, overrides))


def defaults(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the default of every setting of `train` or `evaluate`, as plain values.

    Args:
        name: name of the root config.
        overrides: settings as typed. For train, model.class_path=... adds the settings of that
            class. For evaluate, data=... adds the settings of the corpus.
    """
    if name == "train":
        from minigpt.runs.folder import config_class
        from minigpt.training.config import TrainConfig

        values = plain_defaults(TrainConfig)
        for key in ("size", "model_class", "overrides"):  # derived from the overrides
            del values[key]
        if (model := typed_class("model.class_path", overrides)) is not None:
            values["model"] = plain_defaults(config_class(model))
        values["model"]["class_path"] = None
        return values
    from minigpt.data.config import DataConfig
    from minigpt.evaluation import EvaluationConfig

    corpus = any(word.startswith("data=") and word != "data=null" for word in overrides)
    data = plain_defaults(DataConfig) if corpus else None
    command_line = {"ckpt": "???", "hf": None, "out": None, "class_path": None}
    return {**command_line, **plain_defaults(EvaluationConfig), "data": data}


def types_of_settings(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the type of every setting of `train` or `evaluate`, by dotted name.

    Args:
        name: name of the root config.
        overrides: settings as typed. For train, model.class_path=... adds the settings of that
            class.
    """
    if name == "train":
        from minigpt.runs.folder import config_class
        from minigpt.training.config import TrainConfig

        own = typed_class("model.class_path", overrides)
        shape = {} if own is None else setting_types(config_class(own), "model.")
        return {**setting_types(TrainConfig), **shape}
    from minigpt.evaluation import EvaluationConfig

    return {"ckpt": str, "hf": str | None, "out": str | None, **setting_types(EvaluationConfig)}


# ---------------------------------------------------------------------------- into dataclasses


def train_config(
    values: dict[str, Any], size: str | None, overrides: Sequence[str], model: Any = None
) -> TrainConfig:
    """Build a `TrainConfig` from composed `values`.

    Args:
        values: composed settings as plain values.
        size: chosen option of the config group `model`, such as large.
        overrides: settings as typed, to be recorded in config.yaml.
        model: class of the model; None for a plain GPT.

    Raises:
        UserError: a config file names a class, or a value is invalid.
    """
    from minigpt.runs.folder import class_path, config_class
    from minigpt.training.config import TrainConfig

    for group in ("model", "teacher"):  # the settings of the command line were removed
        if not isinstance(values.get(group), dict):  # by ~teacher or ++teacher.=...
            raise UserError("this section cannot be removed or replaced: leave this out", group)
        if (path := values[group].get("class_path")) is not None:
            problem = "a config file must not name code to import: set this on the command line"
            raise UserError(problem, f"{group}.class_path", path)
    settings = {k: v for k, v in values["model"].items() if k != "class_path"}
    shape = build(config_class(model), settings, "model")
    name = None if model is None else class_path(model)
    more = {"size": size, "overrides": list(overrides), "model": shape, "model_class": name}
    return build(TrainConfig, {**values, **more}, "")


def evaluation_config(values: dict[str, Any]) -> EvaluationConfig:
    """Build an `EvaluationConfig` from composed `values`."""
    from minigpt.evaluation import EvaluationConfig

    settings = {k: v for k, v in values.items() if k not in ("ckpt", "hf", "out", "class_path")}
    return build(EvaluationConfig, settings, "")


# ---------------------------------------------------------------------------- custom model classes


def typed_class(setting: str, overrides: Sequence[str]) -> Any:
    """Return the model class that `overrides` set for `setting`.

    The result is None if `setting` is null or not in `overrides`.

    Args:
        setting: name of a setting that names a class, such as model.class_path.
        overrides: settings as typed.
    """
    words = [word.partition("=") for word in overrides]
    paths = [path for name, _, path in words if name == setting]
    if not paths or paths[-1] == "null":
        return None
    path = paths[-1][1:-1] if is_quoted(paths[-1]) else paths[-1]
    return import_class(path, setting)


def import_class(path: str, argument: str) -> Any:
    """Import and return the model class at a dotted path.

    The module may be in the working directory. The path must come from the user: a path that was
    read from a file would allow that file to run any code.

    Args:
        path: dotted path, such as mypackage.MyGPT.
        argument: name of the setting, for error messages.

    Raises:
        UserError: the import fails, the class is not derived from GPT, its constructor requires an
            argument besides the config, or its `config_class` is not derived from GPTConfig.
    """
    from minigpt.model import GPT, GPTConfig

    module, _, name = path.strip("'\"").rpartition(".")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        model = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module may raise anything while it is imported
        raise UserError(
            f"cannot be imported ({error!r}): check the path and the code", argument, path
        ) from None
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)
    if not (isinstance(model, type) and issubclass(model, GPT)):
        raise UserError("must be a class derived from minigpt.GPT", argument, path)
    try:
        inspect.signature(model).bind(None)
    except TypeError as error:
        message = f"its constructor must accept the config as its only argument ({error})"
        raise UserError(message, argument, path) from None
    config = model.config_class
    if not (isinstance(config, type) and issubclass(config, GPTConfig) and is_dataclass(config)):
        message = "its config_class must be a dataclass derived from minigpt.GPTConfig"
        raise UserError(message, argument, path)
    return model
