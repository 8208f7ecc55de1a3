"""Functions to read, write and verify checkpoint files."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from minigpt.core.files import check_archive, parse_json, write_bytes
from minigpt.core.settings import UserError
from minigpt.model import GPT

_MISSING = "weights or model settings are missing; give a run folder or another .ckpt file"


def read_model(path: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """Return the model settings and the weights in a checkpoint.

    Args:
        path: the checkpoint file.

    Returns:
        The model settings by name, and the tensors by parameter name of `GPT`.

    Raises:
        UserError: the file is not a checkpoint of Mini GPT, or is damaged.
    """
    content = read_checkpoint(path)
    settings = content["hyper_parameters"].get("model")
    if not isinstance(settings, Mapping):
        raise UserError(f"{path} is not a checkpoint of Mini GPT: {_MISSING}")
    return settings, {k.removeprefix("net."): v for k, v in content["state_dict"].items()}


def with_weights(model: GPT, weights: dict[str, Tensor], path: Path) -> GPT:
    """Load weights into a model and return the model.

    The weights are converted to the dtype of the model.

    Args:
        model: the model.
        weights: tensors by parameter name.
        path: path of the file with the weights, for error messages.

    Returns:
        The same model.

    Raises:
        UserError: the names or shapes of the weights differ from those of the model's parameters.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        problem = f"the weights in {path} do not fit this model ({reason})"
        raise UserError(f"{problem}: give another checkpoint, or restore the model class") from None
    return model


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a safetensors file.

    Args:
        path: path of the file.

    Returns:
        The tensors by name.

    Raises:
        UserError: the file is missing, damaged, or not a safetensors file.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError):
        raise UserError(f"{path} is damaged or not a safetensors file; export it again") from None


def weights_fingerprint(model: GPT) -> str:
    """Return a hash of the names and float32 values of all parameters, to identify the weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def rounded_fingerprint(model: GPT) -> str:
    """Return the fingerprint of the weights after rounding to bfloat16.

    A run and its export in bfloat16 have the same rounded fingerprint.
    """
    return weights_fingerprint(copy.deepcopy(model).bfloat16())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint or snapshot; only tensors and plain values are accepted.

    Args:
        path: a Lightning checkpoint, or a file from `write_snapshot`.

    Returns:
        A dict with at least `state_dict` and `hyper_parameters`. For a snapshot, the only other key
        is `global_step`.

    Raises:
        UserError: the file does not exist, is not a checkpoint of Mini GPT, is damaged, or contains
            code.
    """
    try:
        content = _load(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a run folder or a .ckpt file") from None
    except UserError:
        raise
    except Exception as error:  # torch.load raises many types of errors for damaged files
        code = re.search("unsupported (global|class)", str(error), re.IGNORECASE)
        fault = "contains code, which is refused" if code else "is damaged or not a checkpoint"
        raise UserError(f"{path} {fault}: give a run folder or another .ckpt file") from None
    parts = ("state_dict", "hyper_parameters")
    if not isinstance(content, dict) or not all(isinstance(content.get(p), dict) for p in parts):
        raise UserError(f"{path} is not a checkpoint of Mini GPT: {_MISSING}")
    return content


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        stored, step = parse_json(metadata["hyper_parameters"]), int(metadata["step"])
        return {"state_dict": load_file(path), "hyper_parameters": stored, "global_step": step}
    if zipfile.is_zipfile(path):
        check_archive(path)
    with warnings.catch_warnings(action="ignore"):  # about pickles that are rejected anyway
        return torch.load(path, map_location="cpu", weights_only=True)


def write_checkpoint(path: Path, content: dict[str, Any], keep: int = 1) -> None:
    """Write a checkpoint atomically, and keep earlier checkpoints under numbered names.

    For example, with `keep` 3, x-1.ckpt is first renamed to x-2.ckpt, and x.ckpt to x-1.ckpt.

    Args:
        path: the checkpoint file.
        content: tensors and plain values.
        keep: maximum number of checkpoints to keep, including the new one.

    Raises:
        OSError: the checkpoint could not be written; earlier checkpoints are unchanged.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    names = [path, *(path.with_stem(f"{path.stem}-{age}") for age in range(1, keep))]
    write_bytes(path, buffer.getbuffer(), move=list(zip(names[-2::-1], names[:0:-1], strict=True)))


def write_snapshot(
    path: Path, model: GPT, hyper_parameters: Mapping[str, Any], values: Mapping[str, Any]
) -> None:
    """Atomically write a safetensors file with the weights of a model, rounded to bfloat16.

    Args:
        path: the file.
        model: the model.
        hyper_parameters: plain values, as in a checkpoint.
        values: further metadata of the file, with at least `step`, the number of updates so far.

    Raises:
        OSError: the file cannot be written.
    """
    weights = {}
    for name, weight in model.state_dict().items():
        dtype = torch.bfloat16 if weight.is_floating_point() else weight.dtype
        weights[name] = weight.to("cpu", dtype, copy=True).contiguous()
    metadata = {name: str(value) for name, value in values.items()}
    metadata["hyper_parameters"] = json.dumps(dict(hyper_parameters))
    write_bytes(path, _with_sorted_header(save(weights, metadata)))


def _with_sorted_header(content: bytes) -> bytes:
    """Return `content` with a sorted header, so that equal weights give equal bytes.

    The library safetensors writes the metadata in random order. A safetensors file consists of
    three parts: eight bytes with the length of the header; the header in JSON, padded with spaces
    to a multiple of eight bytes; and the data.

    Args:
        content: content of a safetensors file.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(
        json.loads(content[8:end]), ensure_ascii=False, separators=(",", ":"), sort_keys=True
    ).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def snapshot_values(path: Path) -> tuple[int, float]:
    """Return the number of tokens that a snapshot was trained on, and its training loss.

    Args:
        path: the file, written by `write_snapshot`.

    Returns:
        The number of tokens, and the loss of the last batch before the snapshot. The loss is in
        nats per token; for the snapshot of step 0, it is NaN.

    Raises:
        UserError: the file is damaged or not a snapshot.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        return int(metadata["tokens"]), float(metadata["train_loss"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged or not a snapshot: remove it") from None


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint is undamaged, according to the checksums in its zip archive.

    An undamaged checkpoint may contain code; `read_checkpoint` then rejects it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return False
        _load(path)  # the directory of the archive has no checksum
    except pickle.UnpicklingError:
        return True  # not damaged, but rejected: `read_checkpoint` reports the reason
    except Exception:  # zipfile and torch raise many types of errors for damaged files
        return False
    return True
