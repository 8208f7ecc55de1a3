"""Checkpoint files: reading, writing, damage, and the weights in them."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minigpt.core.files import check_archive, write_bytes
from minigpt.core.settings import UserError
from minigpt.model import GPT


def read_model(path: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """Return the model settings in a checkpoint, and its weights by their names in the model.

    Raises:
        UserError: not a checkpoint, a damaged one, or one without a model.
    """
    content = read_checkpoint(path)
    settings = content["hyper_parameters"].get("model")
    if not isinstance(settings, Mapping):
        raise UserError(f"{path} is not a checkpoint of Mini GPT: it has no model settings")
    return settings, {k.removeprefix("net."): v for k, v in content["state_dict"].items()}


def with_weights(model: GPT, weights: dict[str, Tensor], path: Path) -> GPT:
    """Return `model` with these weights, converted to its dtype. `path` names them in an error.

    Raises:
        UserError: they are those of another model.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} holds the weights of another model: {reason}") from None
    return model


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. UserError: it is none, or a truncated one."""
    try:
        return load_file(path)
    except (SafetensorError, OSError):
        raise UserError(f"{path} is damaged or not a safetensors file; export it again") from None


def weights_fingerprint(net: GPT) -> str:
    """Return a hash of all parameters as float32, which ties a measured number to the weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(net.named_parameters()):
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what a Lightning checkpoint holds: tensors and plain values only.

    Raises:
        UserError: not a checkpoint, a damaged one, one with code in it, one of another program.
    """
    try:
        content = _load(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a run folder or a .ckpt file") from None
    except UserError:
        raise
    except Exception as error:  # torch.load raises errors of a dozen kinds for damaged files
        code = re.search("unsupported (global|class)", str(error), re.IGNORECASE)
        fault = "would run code, so it was not loaded" if code else "is damaged or no checkpoint"
        raise UserError(f"{path} {fault}; give a run folder or another .ckpt file") from None
    parts = ("state_dict", "hyper_parameters")
    if not isinstance(content, dict) or not all(isinstance(content.get(p), dict) for p in parts):
        raise UserError(f"{path} is not a checkpoint of Mini GPT: it has no weights and settings")
    return content


def _load(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        check_archive(path)
    with warnings.catch_warnings(action="ignore"):  # of an odd pickle, which is refused
        return torch.load(path, map_location="cpu", weights_only=True)


def write_checkpoint(path: Path, content: dict[str, Any], keep: int = 1) -> None:
    """Write a checkpoint whole or not at all; at most `keep` of its name stay.

    With `keep` 3, an x.ckpt that is there becomes x-1.ckpt, and that x-2.ckpt, which is replaced.

    Raises:
        OSError: it could not be written; what was there before is still there.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    names = [path, *(path.with_stem(f"{path.stem}-{age}") for age in range(1, keep))]
    write_bytes(path, buffer.getbuffer(), move=list(zip(names[-2::-1], names[:0:-1], strict=True)))


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint is undamaged, by the CRC-32s of the zip archive that it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return False
        _load(path)  # the directory of the archive has no CRC-32
    except pickle.UnpicklingError:
        return True  # it was written like that: reading it says what is wrong
    except Exception:  # zipfile and torch raise errors of many kinds for damaged files
        return False
    return True
