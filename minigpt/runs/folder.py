"""A run folder: what lies in it under which name, and how to get its model back.

>>> run = Run.open("runs/small-20260101-120000")  # or a checkpoint file in it, or an export of it
>>> net, tokenizer = run.load_net(), run.load_tokenizer()
"""

from __future__ import annotations

import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.rendezvous import rendezvous

from minigpt.core.distributed import global_rank
from minigpt.core.files import read_yaml, refuse_links_out
from minigpt.core.settings import UserError, build
from minigpt.model import GPT, GPTConfig
from minigpt.runs.checkpoint import (
    _with_weights,
    drop_removed_settings,
    is_whole,
    load_net,
    read_safetensors,
)
from minigpt.tokenizer import Tokenizer

CONFIG = "config.yaml"
TOKENIZER = "tokenizer.json"
METRICS = "metrics.csv"
SAMPLES = "samples.jsonl"
SUMMARY = "summary.json"
REPORT = "report.html"
EVALUATION = "evaluation.json"
CHECKPOINTS = "checkpoints"
WEIGHTS = "model.safetensors"  # in place of checkpoints, in what `minigpt export` makes
RUN_FOLDER_VARIABLE = "MINIGPT_RUN_FOLDER"  # rank 0 tells the ranks it launches
BEST, LAST = "best", "last"  # checkpoints/best.ckpt, last.ckpt; before it last-1.ckpt, ...


log = logging.getLogger("minigpt")


@dataclass(frozen=True)
class Run:
    """One run folder and the checkpoint in it that is meant."""

    folder: Path
    checkpoint: Path

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run at `path`: its folder (the best checkpoint, else the last) or a checkpoint file.

        A folder of runs stands for the newest of them. In a folder, a damaged checkpoint is passed
        over, and the log says so. A folder that `minigpt export --format safetensors` made is a run
        as well.

        Raises:
            UserError: there is no run or no checkpoint there.
        """
        path = Path(path)
        if path.is_dir():
            best, weights = path / CHECKPOINTS / f"{BEST}.ckpt", path / WEIGHTS
            found = [*([best] if best.is_file() else []), *last_checkpoints(path)]
            if not found and weights.is_file():
                return cls(path, weights)
            if not found:
                newest = max(path.glob(f"*/{CHECKPOINTS}/*.ckpt"), key=_modified, default=None)
                if newest is not None:
                    return cls.open(newest.parent.parent)
                raise UserError(
                    f"{path} holds no {CHECKPOINTS}/{BEST}.ckpt or {LAST}.ckpt: give the folder of "
                    "a run (runs/<name>), or train one with python train.py"
                )
            refuse_links_out(path)
            return cls(path, first_undamaged(found))
        if not path.is_file():
            raise UserError(f"{path} does not exist: give a run folder (runs/<name>) or a .ckpt")
        inside = path.parent.name == CHECKPOINTS
        folder = path.parent.parent if inside else path.parent
        if inside:
            refuse_links_out(folder)
        return cls(folder, path)

    @property
    def place(self) -> Path:
        """Where what is found out about it goes: its folder, or here for an export, which is whole.

        An export may be part of a repository, and its card tells of what lies in it.
        """
        return Path() if self.checkpoint.suffix == ".safetensors" else self.folder

    def load_net(self, device: str | torch.device = "cpu") -> GPT:
        """The model with the checkpoint's weights, in evaluation mode, in float32.

        The weights are frozen, so that generation prepares them once; `net.requires_grad_()` lets
        them be trained.

        Raises:
            UserError: not a checkpoint, a damaged one, or one of another run.
        """
        if self.checkpoint.suffix == ".safetensors":
            weights = read_safetensors(self.checkpoint)
            net = _with_weights(self._model(), weights, self.checkpoint)
        else:
            net = load_net(self.checkpoint)
        if net.config != self._model():
            raise UserError(f"{self.checkpoint} is not of this run: its model is another one")
        return net.to(device).eval().requires_grad_(False)

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that the run was trained with."""
        return Tokenizer.load(self._inside(TOKENIZER))

    def config(self) -> dict[str, Any]:
        """The resolved configuration of the run, as plain values."""
        return read_config(self.folder)

    def _model(self) -> GPTConfig:
        return build(GPTConfig, self.config().get("model", {}), "model")

    def _inside(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise UserError(f"{self.folder} has no {name}: give a checkpoint in its run's folder")
        return path


def last_checkpoints(folder: Path) -> list[Path]:
    """last.ckpt of a run folder and those before it that were kept, the newest first."""

    def age(path: Path) -> int:  # 0 for last.ckpt, 1 for last-1.ckpt
        return int(path.stem.partition("-")[2] or 0)

    names = re.compile(rf"{LAST}(-\d+)?\.ckpt")
    found = (folder / CHECKPOINTS).glob(f"{LAST}*.ckpt")
    return sorted((path for path in found if names.fullmatch(path.name)), key=age)


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
    if path.is_dir():
        found = last_checkpoints(path)
        if found:
            return first_undamaged(found)
        path = path / CHECKPOINTS / f"{LAST}.ckpt"
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a run folder (runs/<name>) to go on with")
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
        raise UserError("processes that are started one by one need name=<run> to share it")
    return parent / name


def _make_run_folder(parent: Path, name: str | None, size: str, exist_ok: bool) -> Path:
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {parent} ({error.strerror}): set runs_dir=... to another"
        ) from None
    base = name or f"{size}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in range(1, 1000):
        folder = parent / (base if attempt == 1 else f"{base}-{attempt}")
        try:
            folder.mkdir(exist_ok=exist_ok and name is not None)
        except FileExistsError:
            if name is None:
                continue
            then = (
                f"go on with it by resume={folder}"
                if last_checkpoints(folder)
                else "it has no checkpoint, so delete it or type resume=auto to begin there"
            )
            raise UserError(f"{folder} exists: {then}, or take another name=...") from None
        return folder
    raise UserError(f"{parent} holds a thousand runs of this second: give a name=...")


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration in a run folder, as plain values. UserError: there is none."""
    path = folder / CONFIG
    try:
        config = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"{folder} has no {CONFIG}: give a run folder (runs/<name>)") from None
    except (OSError, ValueError):  # not YAML, or not even UTF-8
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold the settings of a run: restore it or train again")
    drop_removed_settings(config)
    return config


def _modified(path: Path) -> float:
    return path.stat().st_mtime
