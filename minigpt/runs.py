"""A run folder: what lies in it under which name, and how to get its model back.

>>> run = Run.open("runs/small-20260101-120000")  # or a checkpoint file in it
>>> net, tokenizer = run.load_net(), run.load_tokenizer()
"""

from __future__ import annotations

import json
import os
import pickle
import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.rendezvous import rendezvous

from minigpt.config import UserError, build
from minigpt.model import GPT, GPTConfig
from minigpt.ranks import global_rank, step_name
from minigpt.tokenizer import Tokenizer

CONFIG = "config.yaml"
TOKENIZER = "tokenizer.json"
METRICS = "metrics.csv"
SAMPLES = "samples.jsonl"
SUMMARY = "summary.json"
REPORT = "report.html"
EVALUATION = "evaluation.json"
CHECKPOINTS = "checkpoints"
RUN_FOLDER_VARIABLE = "MINIGPT_RUN_FOLDER"  # rank 0 tells the ranks it launches
BEST, LAST = "best", "last"  # checkpoints/best.ckpt, checkpoints/last.ckpt


@dataclass(frozen=True)
class Run:
    """One run folder and the checkpoint in it that is meant."""

    folder: Path
    checkpoint: Path

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run at `path`: its folder (the best checkpoint, else the last) or a checkpoint file.

        A folder of runs stands for the newest of them.

        Raises:
            UserError: there is no run or no checkpoint there.
        """
        path = Path(path)
        if path.is_dir():
            found = [path / CHECKPOINTS / f"{name}.ckpt" for name in (BEST, LAST)]
            found = [checkpoint for checkpoint in found if checkpoint.is_file()]
            if not found:
                newest = max(path.glob(f"*/{CHECKPOINTS}/*.ckpt"), key=_modified, default=None)
                if newest is not None:
                    return cls.open(newest.parent.parent)
                raise UserError(
                    f"{path} holds no {CHECKPOINTS}/{BEST}.ckpt or {LAST}.ckpt: give the folder of "
                    "a run (runs/<name>), or train one with python train.py"
                )
            return cls(path, found[0])
        if not path.is_file():
            raise UserError(f"{path} does not exist: give a run folder (runs/<name>) or a .ckpt")
        inside = path.parent.name == CHECKPOINTS
        return cls(path.parent.parent if inside else path.parent, path)

    def load_net(self, device: str | torch.device = "cpu") -> GPT:
        """The model with the checkpoint's weights, in evaluation mode, in float32.

        Raises:
            UserError: not a checkpoint, a damaged one, or one of another run.
        """
        net = load_net(self.checkpoint)
        if build(GPTConfig, self.config().get("model", {}), "model") != net.config:
            raise UserError(f"{self.checkpoint} is not of this run: its model is another one")
        return net.to(device).eval()

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that the run was trained with."""
        return Tokenizer.load(self._inside(TOKENIZER))

    def config(self) -> dict[str, Any]:
        """The resolved configuration of the run, as plain values."""
        return read_config(self.folder)

    def _inside(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise UserError(f"{self.folder} has no {name}: give a checkpoint in its run's folder")
        return path


def last_checkpoint(path: Path) -> Path:
    """The checkpoint that a run goes on from: `path` itself, or the last one of its run folder.

    Raises:
        UserError: there is none.
    """
    found = path / CHECKPOINTS / f"{LAST}.ckpt" if path.is_dir() else path
    if not found.is_file():
        raise UserError(f"{found} does not exist: give a run folder (runs/<name>) to go on with")
    return found


def new_run_folder(parent: Path, name: str | None, size: str) -> Path:
    """A folder in `parent` that no other run has, made now: two runs never share one.

    Without a name it is called after the size and the time; under srun, after the job, so that a
    job that is queued again finds it. The first process makes it and tells the others: those of
    torchrun through torchrun's store, those that Lightning starts by the environment.

    Raises:
        UserError: the name is taken.
    """
    if name is None and (step := step_name()) is not None:
        name = f"{size}-{step}"
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    store = next(rendezvous("env://"))[0] if torchrun else None
    if global_rank() == 0:
        folder = _make_run_folder(parent, name, size)
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


def _make_run_folder(parent: Path, name: str | None, size: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    base = name or f"{size}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in range(1, 1000):
        folder = parent / (base if attempt == 1 else f"{base}-{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:
            if name is not None:
                raise UserError(
                    f"{folder} exists: go on with it by resume={folder}, or take another name=..."
                ) from None
            continue
        return folder
    raise UserError(f"{parent} holds a thousand runs of this second: give a name=...")


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration in a run folder, as plain values. UserError: there is none."""
    path = folder / CONFIG
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no {CONFIG}: give a run folder (runs/<name>)") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold the settings of a run: restore it or train again")
    return config


def load_net(checkpoint: Path) -> GPT:
    """The model in a checkpoint file of this project, on CPU.

    Only tensors and plain values are read; a pickle that would run code is refused unrun.

    Raises:
        UserError: not a checkpoint, a truncated one, or one of another model.
    """
    content = read_checkpoint(checkpoint)
    settings = content["hyper_parameters"].get("model")
    if not isinstance(settings, Mapping):
        raise UserError(f"{checkpoint} is not a Mini GPT checkpoint: it holds no model settings")
    net = GPT(build(GPTConfig, settings, "model"))
    weights = {k.removeprefix("net."): v for k, v in content["state_dict"].items()}
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{checkpoint} holds the weights of another model: {reason}") from None
    return net


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a Lightning checkpoint holds: tensors and plain values only (`weights_only=True`).

    Raises:
        UserError: not a checkpoint, a truncated one, one with code in it, one of another program.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of an odd pickle: it is refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a run folder or a .ckpt file") from None
    except pickle.UnpicklingError as error:
        if re.search("unsupported (global|class)", str(error), re.IGNORECASE):
            raise UserError(
                f"{path} asks to run code, which a checkpoint never does: refused, and not run"
            ) from None
        raise UserError(_damaged(path)) from None
    except Exception:  # torch.load answers damage with errors of a dozen kinds
        raise UserError(_damaged(path)) from None
    if not isinstance(content, dict) or not {"state_dict", "hyper_parameters"} <= content.keys():
        raise UserError(f"{path} is not a checkpoint of Mini GPT: it holds no weights and settings")
    return content


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON at `path`, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write `content` at `path`, whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(content, encoding="utf-8", newline="")
    temporary.replace(path)


def _damaged(path: Path) -> str:
    return f"{path} is not a checkpoint, or is cut short: give runs/<name> or a .ckpt written by it"


def _modified(path: Path) -> float:
    return path.stat().st_mtime
