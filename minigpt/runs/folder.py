"""A run folder and the model in it.

>>> run = Run.load("runs/small-20260101-120000")  # or a checkpoint file in it, or an export of it
>>> model, tokenizer = run.load_model(), run.tokenizer
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.rendezvous import rendezvous

from minigpt.core.distributed import global_rank
from minigpt.core.files import read_yaml, refuse_links_out, user_path
from minigpt.core.settings import ModelClassError, UserError, build
from minigpt.model import GPT, GPTConfig
from minigpt.runs.checkpoint import (
    is_whole,
    read_checkpoint,
    read_model,
    read_safetensors,
    with_weights,
)
from minigpt.runs.names import BEST, CHECKPOINTS, CONFIG, LAST, TOKENIZER, WEIGHTS
from minigpt.runs.records import read_summary
from minigpt.tokenizer import Tokenizer

log = logging.getLogger("minigpt")

RUN_FOLDER_VARIABLE = "MINIGPT_RUN_FOLDER"  # rank 0 tells the ranks it launches
ModelFactory = Callable[[Any], GPT]  # a class derived from GPT, or a function of its config

# What a setting meant that the files of an older run lack, as commit c2cfd24 read it; and the
# settings that are none any more.
OLD_DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {"d_model": 256, "n_heads": 8, "d_ff": 512},
    "data": {"batch_size": 32},
    "optimizer": {"schedule": "cosine"},
}
OLD_SETTINGS = {"model": ("attention",)}


@dataclass(frozen=True)
class Run:
    """A run folder and the selected checkpoint. Its files are read once.

    Args:
        folder: the run folder, or an export in our own format.
        checkpoint: the selected checkpoint, or the weights of an export.
        model: class of the model, or a function from its config to a model; None: `GPT`.
    """

    folder: Path
    checkpoint: Path
    model: ModelFactory | None = None

    @classmethod
    def load(cls, path: str | Path | Run, model: ModelFactory | None = None) -> Run:
        """Return the run at `path`: a run folder, a checkpoint file in one, or an export.

        In a folder the best checkpoint is selected, else the last; damaged ones are passed over,
        and the log says so. A folder of runs stands for the newest of them.

        Args:
            path: where it is; a `Run` is returned as it is.
            model: class or factory of a model that is no plain `GPT`.

        Raises:
            UserError: there is no run or no checkpoint there.
        """
        if isinstance(path, Run):
            return path
        path = user_path(path)
        if path.is_dir():
            best, weights = path / CHECKPOINTS / f"{BEST}.ckpt", path / WEIGHTS
            checkpoints = [*([best] if best.is_file() else []), *last_checkpoints(path)]
            if checkpoints:
                refuse_links_out(path)
                return cls(path, first_undamaged(checkpoints), model)
            if weights.is_file():
                return cls(path, weights, model)
            newest = max(path.glob(f"*/{CHECKPOINTS}/*.ckpt"), key=os.path.getmtime, default=None)
            if newest is not None:
                return cls.load(newest.parent.parent, model)
            names = f"{CHECKPOINTS}/{BEST}.ckpt or {LAST}.ckpt"
            raise UserError(f"{path} holds no {names}: give the folder of a run, or train one")
        if not path.is_file() or path.suffix not in (".ckpt", ".safetensors"):
            fault = "is not a checkpoint" if path.is_file() else "does not exist"
            raise UserError(f"{path} {fault}: give a run folder (runs/<name>) or a .ckpt")
        if path.parent.name != CHECKPOINTS:
            return cls(path.parent, path, model)
        refuse_links_out(path.parent.parent)
        return cls(path.parent.parent, path, model)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Resolved configuration of the run, as plain values."""
        return read_config(self.folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer that the run was trained with."""
        path = self.folder / TOKENIZER
        if not path.is_file():
            raise UserError(f"{self.folder} has no {TOKENIZER}: give a checkpoint in its folder")
        return Tokenizer.load(path)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Content of summary.json, with the steps and tokens that the checkpoint has seen.

        {} while the run trains; a run that was killed left none.
        """
        summary = read_summary(self.folder)
        if self.is_export:
            return summary
        content = read_checkpoint(self.checkpoint)
        stored, steps = content["hyper_parameters"], content["global_step"]
        if "init_from" in stored:
            summary = {**summary, "init_from": stored["init_from"]}
        if steps == summary.get("steps"):
            return summary
        per_step = stored.get("tokens_per_step")
        return {**summary, "steps": steps, "tokens": per_step and steps * per_step}

    @property
    def is_export(self) -> bool:
        """Whether this is what `minigpt export --format safetensors` wrote."""
        return self.checkpoint.suffix == ".safetensors"

    @property
    def output_dir(self) -> Path:
        """Directory for evaluation output: the run folder, or the working directory for an export.

        An export may be part of a repository, and its card lists what lies in it.
        """
        return Path() if self.is_export else self.folder

    def load_model(self, device: str | torch.device = "cpu") -> GPT:
        """Return the model with the checkpoint's weights in float32, frozen, in evaluation mode.

        Only tensors and plain values are read; a pickle that would run code is refused unrun.

        Raises:
            UserError: not a checkpoint, a damaged one, or one of another run.
            ModelClassError: the run's model is of another class than the one that was given.
        """
        trained = self.config.get("model_class")
        if trained is not None and self.model is None:
            raise ModelClassError(f"{self.folder} was trained with the class {trained}", trained)
        factory = self.model or GPT
        shape = build(config_class(factory), _current(self.config.get("model"), "model"), "model")
        if self.is_export:
            weights = read_safetensors(self.checkpoint)
        else:
            stored, weights = read_model(self.checkpoint)
            if build(type(shape), _current(stored, "model"), "model") != shape:
                raise UserError(f"{self.checkpoint} is of another run: its model differs")
        model = with_weights(factory(shape), weights, self.checkpoint)
        trained = trained or class_path(GPT)
        given = class_path(factory)
        if given.rpartition(".")[2] != trained.rpartition(".")[2]:
            raise ModelClassError(f"{self.folder} was trained with {trained}, not {given}", trained)
        return model.to(device).eval().requires_grad_(False)


def class_path(factory: ModelFactory) -> str:
    """Return the dotted path of a class or function, such as minigpt.model.GPT."""
    return f"{factory.__module__}.{getattr(factory, '__qualname__', repr(factory))}"


def config_class(factory: ModelFactory) -> type[GPTConfig]:
    """Return the dataclass of the config that `factory` makes models of."""
    return getattr(factory, "config_class", GPTConfig)


def last_checkpoints(folder: Path) -> list[Path]:
    """last.ckpt of a run folder and those before it that were kept, the newest first."""
    paths = (folder / CHECKPOINTS).glob(f"{LAST}*.ckpt")
    matches = ((re.fullmatch(rf"{LAST}(?:-(\d+))?", path.stem), path) for path in paths)
    ages = [(int(match[1] or 0), path) for match, path in matches if match]
    return [path for _, path in sorted(ages)]


def first_undamaged(checkpoints: list[Path]) -> Path:
    """The first that is whole, or the very first: reading it tells what is wrong with it."""
    for checkpoint in checkpoints:
        if is_whole(checkpoint):
            return checkpoint
        log.warning("%s is damaged, its checksum does not fit: passed over", checkpoint)
    return checkpoints[0]


def last_checkpoint(path: Path) -> Path:
    """The checkpoint that a run goes on from: `path` itself, or the last one of its run folder.

    Of a folder's checkpoints a damaged one is passed over, and the log says so.

    Raises:
        UserError: there is none.
    """
    if checkpoints := last_checkpoints(path):
        return first_undamaged(checkpoints)
    if path.is_dir():
        path = path / CHECKPOINTS / f"{LAST}.ckpt"
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a run folder to continue")
    return path


def new_run_folder(parent: Path, name: str | None, size: str, exist_ok: bool = False) -> Path:
    """A folder in `parent` that no other run has, made now: two runs never share one.

    With `exist_ok` the folder `name` may be there already: one that a killed run left empty.

    Without a name it is called after the size and the time. The first process makes it and tells
    the others: those of torchrun through torchrun's store, those that Lightning starts by the
    environment. Others can know it by name alone.

    Raises:
        UserError: the name is taken.
    """
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    store = next(rendezvous("env://"))[0] if torchrun else None
    if global_rank() == 0:
        folder = _make_run_folder(parent, name, size, exist_ok)
        os.environ[RUN_FOLDER_VARIABLE] = str(folder)
        if store is not None:
            store.set(RUN_FOLDER_VARIABLE, str(folder))
        return folder
    if store is not None:
        return Path(store.get(RUN_FOLDER_VARIABLE).decode())  # waits until it is there
    if RUN_FOLDER_VARIABLE in os.environ:
        return Path(os.environ[RUN_FOLDER_VARIABLE])
    if name is None:
        raise UserError("is not set: processes that are started one by one share it", "name")
    return parent / name


def _make_run_folder(parent: Path, name: str | None, size: str, exist_ok: bool) -> Path:
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"cannot make this folder ({error.strerror})"
        raise UserError(reason, "runs_dir", str(parent)) from None
    base = name or f"{size}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in range(1, 1000):
        folder = parent / (base if attempt == 1 else f"{base}-{attempt}")
        try:
            folder.mkdir(exist_ok=exist_ok and name is not None)
            return folder
        except FileExistsError:
            if name is None:
                continue
        resume: dict[str, Any] = {"fix": {"resume": "auto"}}  # begin there
        if last_checkpoints(folder):
            resume = {"command": ("train", {"resume": str(folder)})}
        message = f"{folder} exists: choose another name, or continue it"
        raise UserError(message, "name", name, **resume)
    raise UserError(f"{parent} holds a thousand runs of this second: choose a name", "name")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the resolved configuration in a run folder, as plain values.

    What an older run lacks has the value that it meant then, by OLD_DEFAULTS.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / CONFIG
    try:
        config = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"{folder} has no {CONFIG}: give a run folder (runs/<name>)") from None
    except (OSError, ValueError):  # not YAML, or not even UTF-8
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold the settings of a run: restore it or train again")
    sections = {key: _current(config[key], key) for key in OLD_DEFAULTS if key in config}
    return config | sections


def _current(values: Any, section: str) -> Any:
    """Return a section of an older config as today's code reads it."""
    if not isinstance(values, Mapping):
        return values
    gone = OLD_SETTINGS.get(section, ())
    kept = {key: value for key, value in values.items() if key not in gone}
    return {**OLD_DEFAULTS[section], **kept}
