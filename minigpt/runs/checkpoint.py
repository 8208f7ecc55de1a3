"""Checkpoint files: reading, writing, damage, and the weights in them."""

from __future__ import annotations

import hashlib
import io
import os
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
from minigpt.core.settings import UserError, build
from minigpt.model import GPT, GPTConfig

_CHECKSUM = b"blake2b="  # the comment at the end of a checkpoint, which is a zip archive
_COMMENT_BYTES = len(_CHECKSUM) + 2 * hashlib.blake2b().digest_size


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
        if zipfile.is_zipfile(path):
            check_archive(path)
        with warnings.catch_warnings(action="ignore"):  # of an odd pickle: it is refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a run folder or a .ckpt file") from None
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        if re.search("unsupported (global|class)", str(error), re.IGNORECASE):
            raise UserError(
                f"{path} asks to run code, which a checkpoint never does: refused, and not run"
            ) from None
        raise UserError(_damaged(path)) from None
    except Exception:  # torch.load answers damage with errors of a dozen kinds
        raise UserError(_damaged(path)) from None
    parts = ("state_dict", "hyper_parameters")
    if not isinstance(content, dict) or not all(isinstance(content.get(p), dict) for p in parts):
        raise UserError(f"{path} is not a checkpoint of Mini GPT: it holds no weights and settings")
    drop_removed_settings(content["hyper_parameters"])
    return content


def drop_removed_settings(config: dict[str, Any]) -> None:
    """Remove from `config` what an earlier version stored and no longer has a meaning."""
    if isinstance(config.get("model"), dict):
        config["model"].pop("attention", None)  # a choice of kernels, not of shape


def write_checkpoint(path: Path, content: dict[str, Any], keep: int = 1) -> None:
    """Write a checkpoint whole or not at all, with a checksum; at most `keep` of its name stay.

    With `keep` 3, x.ckpt that is there becomes x-1.ckpt, and that x-2.ckpt, which is replaced. The
    checksum is the comment of the zip archive that torch writes, so that one rename brings both.

    Raises:
        OSError: it could not be written; what was there before is still there.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    # The archive ends with the length of its comment, which torch leaves at 0 (2 bytes).
    buffer.seek(-2, os.SEEK_END)
    buffer.write(_COMMENT_BYTES.to_bytes(2, "little"))
    buffer.write(_CHECKSUM + hashlib.blake2b(buffer.getbuffer()).hexdigest().encode())
    names = [path, *(path.with_stem(f"{path.stem}-{age}") for age in range(1, keep))]
    write_bytes(path, buffer.getbuffer(), move=list(zip(names[-2::-1], names[:0:-1], strict=True)))


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is as it was written, by its checksum.

    One that was written without (by Lightning alone) is held against the CRC-32 of its parts.
    """
    try:
        with path.open("rb") as file:
            file.seek(-_COMMENT_BYTES, os.SEEK_END)
            content_bytes, comment = file.tell(), file.read()
            if comment.startswith(_CHECKSUM):
                file.seek(0)
                digest = hashlib.blake2b()
                while content_bytes > 0:
                    block = file.read(min(content_bytes, 1 << 20))
                    digest.update(block)
                    content_bytes -= len(block)
                return comment == _CHECKSUM + digest.hexdigest().encode()
        with zipfile.ZipFile(path) as archive:
            return not archive.comment and archive.testzip() is None
    except Exception:  # zipfile answers damage with errors of several kinds
        return False


def _damaged(path: Path) -> str:
    return f"{path} is not a checkpoint, or is cut short: give runs/<name> or a .ckpt written by it"
