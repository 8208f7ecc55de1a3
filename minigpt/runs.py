"""A run folder: what lies in it under which name, and how to get its model back.

>>> run = Run.open("runs/small-20260101-120000")  # or a checkpoint file in it, or an export of it
>>> net, tokenizer = run.load_net(), run.load_tokenizer()
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import subprocess
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minigpt.config import UserError, build
from minigpt.model import GPT, GPTConfig
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
BEST, LAST = "best", "last"  # checkpoints/best.ckpt, checkpoints/last.ckpt


@dataclass(frozen=True)
class Run:
    """One run folder and the checkpoint in it that is meant."""

    folder: Path
    checkpoint: Path

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run at `path`: its folder (the best checkpoint, else the last) or a checkpoint file.

        A folder of runs stands for the newest of them. A folder that `minigpt export --format
        safetensors` made is a run as well.

        Raises:
            UserError: there is no run or no checkpoint there.
        """
        path = Path(path)
        if path.is_dir():
            found = [path / CHECKPOINTS / f"{name}.ckpt" for name in (BEST, LAST)]
            found.append(path / WEIGHTS)
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
        config = build(GPTConfig, self.config().get("model", {}), "model")
        if self.checkpoint.suffix == ".safetensors":
            net = _with_weights(config, read_safetensors(self.checkpoint), self.checkpoint)
        else:
            net = load_net(self.checkpoint)
        if config != net.config:
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


def global_rank() -> int:
    """Which of the run's processes this is: 0 for the first, or the only one."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):  # torchrun, Slurm, Lightning's launcher
        if name in os.environ:
            return int(os.environ[name])
    return 0


def new_run_folder(parent: Path, name: str | None, size: str) -> Path:
    """A folder in `parent` that no other run has, made now: two runs never share one.

    Without a name it is called after the size and the time. The processes that Lightning starts
    for other devices are told which it is by the environment; others can know it by name alone.
    """
    if global_rank() > 0:
        if RUN_FOLDER_VARIABLE in os.environ:
            return Path(os.environ[RUN_FOLDER_VARIABLE])
        if name is None:
            raise UserError("processes that are started one by one need name=<run> to share it")
        (parent / name).mkdir(parents=True, exist_ok=True)
        return parent / name
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
        os.environ[RUN_FOLDER_VARIABLE] = str(folder)
        return folder
    raise UserError(f"{parent} holds a thousand runs of this second: give a name=...")


def source_commit() -> str | None:
    """The git commit of this code, with -dirty behind it when changed; None outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


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
    weights = {k.removeprefix("net."): v for k, v in content["state_dict"].items()}
    return _with_weights(build(GPTConfig, settings, "model"), weights, checkpoint)


def _with_weights(config: GPTConfig, weights: dict[str, Tensor], path: Path) -> GPT:
    """A float32 model with these weights, of whatever dtype they are. `path` is for the error."""
    net = GPT(config)
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} holds the weights of another model: {reason}") from None
    return net


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. UserError: it is none, or is cut short."""
    try:
        return load_file(path)
    except (SafetensorError, OSError):
        raise UserError(
            f"{path} is not a safetensors file, or is cut short: export again"
        ) from None


def weights_fingerprint(net: GPT) -> str:
    """A hash of all parameters as float32: what was measured on one model holds for its equals."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(net.named_parameters()):
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


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
