"""decode.c from Python: compiled once where there is a C compiler, called with tensors.

The compiler is `gcc`, `cc` or `clang`, or what the environment variable CC names; an empty CC does
without. What it made lies below ~/.cache/minigpt (XDG_CACHE_HOME), under a name of its own for each
source, command and kind of CPU. Where there is none, decoding.py computes the same with PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from ctypes import c_float, c_int32, c_void_p
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.model import GPT, Block

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("decode.c")
PANEL = 32  # as in decode.c: tokens of a block of keys and values; columns come in whole ones
_FLAGS = [
    "-O3", "-shared", "-fPIC",
    # Neither changes a result: nobody asks for errno, nor for exceptions of floating point.
    "-fno-math-errno", "-fno-trapping-math",
    *([] if platform.machine() == "arm64" else ["-march=native"]),  # Apple's are all alike
]  # fmt: skip
_MOST_THREADS = 8  # of a batch that is too small to give each its own rows
_MOST_TOKENS = 2048  # of prompts, read at once: 17 MB of room at the medium size, and a text more
_MOST_KNOWN = 2**24  # numbers in the table of the first layer; 2.3 million at the medium size
_OWN_ROWS = 4  # as in decode.c: or more for each thread, and each has its own


# ---------------------------------------------------------------------------- the library


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled decode.c; None where there is no compiler, or what it made is of no use."""
    try:
        command = compiler()
        return None if command is None else _loaded(command)
    except (OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:  # or no home
        reason = getattr(error, "stderr", None) or error
        first = str(reason).strip().split("\n")[0]
        log.warning("text is generated without decode.c, more slowly: %s", first)
        return None


def compiler() -> list[str] | None:
    """The command of a C compiler, if there is one. ValueError: CC has an open quote."""
    if sys.platform == "win32":
        return None
    named = os.environ.get("CC")
    if named is not None:
        return shlex.split(named) or None
    return next(([name] for name in ("gcc", "cc", "clang") if shutil.which(name)), None)


def is_threaded() -> bool:
    """Whether `library()` works on several threads: compilers without OpenMP make one for one."""
    found = library()
    return found is not None and bool(c_int32.in_dll(found, "threaded").value)


def _loaded(command: list[str]) -> ctypes.CDLL:
    path = _cached(command)
    try:
        return _opened(path)
    except OSError:  # damaged since
        path.unlink()
        return _opened(_cached(command))


def _opened(path: Path) -> ctypes.CDLL:
    opened = ctypes.CDLL(str(path))
    opened.draw.argtypes = [*[c_int32] * 3, c_float, *[c_void_p] * 4]
    return opened


def _cached(command: list[str]) -> Path:
    """Where the library lies, made now unless it is there."""
    # PyTorch's own threads do the work, by the OpenMP of GCC; Apple's compiler has none.
    if sys.platform == "linux":
        try:
            return _compiled([*command, "-fopenmp"])
        except subprocess.CalledProcessError:
            log.debug("%s has no OpenMP", command[0])
    return _compiled(command)


def _compiled(command: list[str]) -> Path:
    version = _run([*command, "--version"])
    parts = SOURCE.read_text(encoding="utf-8"), command, _FLAGS, version, _cpu()
    name = f"decoding-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minigpt"
    if not (cache / name).exists():
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder, name)
            _run([*command, *_FLAGS, str(SOURCE), "-o", str(made), "-lm"])
            made.replace(cache / name)  # whole or not at all, whoever else makes it too
    return cache / name


def _run(command: list[str]) -> str:
    return subprocess.run(  # noqa: S603
        command, check=True, capture_output=True, text=True, errors="replace", timeout=120
    ).stdout


def _cpu() -> str:
    """What `-march=native` depends on: a home may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    names = ("model name", "flags", "Features", "CPU part")
    return " ".join(sorted({line for line in lines if line.startswith(names)}))


# ---------------------------------------------------------------------------- structs


class _Matrix(ctypes.Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("in_", c_int32), ("out", c_int32))


class _Norm(ctypes.Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("norm1", _Norm), ("qkv", _Matrix), ("out", _Matrix),
        ("norm2", _Norm), ("up", _Matrix), ("down", _Matrix),
    )  # fmt: skip


class _Known(ctypes.Structure):
    _fields_ = tuple((name, c_void_p) for name in ("tokens", "places", "bias"))


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff")),
        ("kind", c_int32), ("eps", c_float), ("embedding", c_void_p), ("positions", c_void_p),
        ("final_norm", _Norm), ("unembed", _Matrix), ("known", _Known), ("layers", c_void_p),
    )  # fmt: skip


_SCRATCH = ("x", "normed", "qkv", "mixed", "up", "scores", "found")


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("rows", "room", "threads")),
        *((name, c_void_p) for name in ("starts", "ids", "at", "blocks", *_SCRATCH)),
        ("logits", c_void_p),
    )  # fmt: skip


_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_FLOATS: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are


# ---------------------------------------------------------------------------- calls


class NativeWeights:
    """The weights of a net as decode.c wants them."""

    def __init__(self, net: GPT, dtype: torch.dtype, tabulate: bool) -> None:
        """`net` on a CPU; its matrices are kept in `dtype`, float32 or bfloat16, as keys are.

        `tabulate` the first layer, which is worth its 1.2 GFLOP (medium) for more than one text.
        """
        found, c = library(), net.config
        assert found is not None
        self.library, self.dtype, self.config = found, dtype, c
        self._held = list[Tensor]()  # a pointer keeps no tensor alive
        self._lanes = c_int32.in_dll(found, "lanes").value
        self._layers = (_Layer * c.n_layers)(*(self._layer(block) for block in net.blocks))
        self.struct = _Model(
            c.vocab_size, c.d_model, c.n_layers, c.n_heads, c.d_ff, _KINDS[dtype],
            net.final_norm.eps, self._pointer(net.embedding.weight * net.scale),
            self._pointer(net.positions), self._norm(net.final_norm),
            self._matrix(net.embedding.weight, None), self._known(net) if tabulate else _Known(),
            ctypes.addressof(self._layers),
        )  # fmt: skip

    def _known(self, net: GPT) -> _Known:
        """What the first layer's queries, keys and values are made of, where that is no matrix.

        Of how a model begins nothing but σ depends on more than a token or its place.
        """
        c, block = self.config, net.blocks[0]
        if (c.vocab_size + c.context_length) * 3 * c.d_model > _MOST_KNOWN:
            return _Known()
        assert isinstance(block, Block)
        qkv, norm = block.attention.qkv, block.norm1
        with torch.inference_mode():
            weight = qkv.weight.to(self.dtype).float()
            scaled = weight * norm.weight.float()
            return _Known(
                self._pointer(F.linear(_centred(net.embedding.weight * net.scale), scaled)),
                self._pointer(F.linear(_centred(net.positions), scaled)),
                self._pointer(F.linear(norm.bias.float(), weight, qkv.bias.float())),
            )

    def _layer(self, block: nn.Module) -> _Layer:
        assert isinstance(block, Block)
        attention, mlp = block.attention, block.feed_forward
        return _Layer(
            self._norm(block.norm1),
            self._matrix(attention.qkv.weight, attention.qkv.bias),
            self._matrix(attention.out.weight, attention.out.bias),
            self._norm(block.norm2),
            self._matrix(mlp.up.weight, mlp.up.bias),
            self._matrix(mlp.down.weight, mlp.down.bias),
        )

    def _norm(self, norm: nn.LayerNorm) -> _Norm:
        return _Norm(self._pointer(norm.weight), self._pointer(norm.bias))

    def _matrix(self, weight: Tensor, bias: Tensor | None) -> _Matrix:
        """Panels (in, 2 lanes): what decode.c multiplies at once, it reads in one stream."""
        out, width = weight.shape
        padded = torch.zeros(-(-out // PANEL) * PANEL, width, **_FLOATS)
        padded[:out] = weight
        panels = padded.view(-1, 2 * self._lanes, width).transpose(1, 2)
        if self.dtype == torch.bfloat16:  # element i beside element i + lanes: one load gives both
            panels = panels.unflatten(2, (2, self._lanes)).transpose(2, 3)
        added = torch.zeros(len(padded), **_FLOATS)
        if bias is not None:
            added[:out] = bias
        return _Matrix(self._pointer(panels, self.dtype), self._pointer(added), width, out)

    def _pointer(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
        copy = torch.empty(tensor.shape, dtype=dtype, device="cpu")
        self._held.append(copy.copy_(tensor.detach()))
        return copy.data_ptr()


def _centred(rows: Tensor) -> Tensor:
    return rows.float() - rows.float().mean(dim=1, keepdim=True)


class NativeBatch:
    """The texts of a batch: their keys and values, which new tokens are added to."""

    def __init__(self, weights: NativeWeights, rows: int) -> None:
        self.weights, self._rows = weights, rows
        self._threads = min(torch.get_num_threads(), max(_MOST_THREADS, rows // _OWN_ROWS))
        self._blocks = list[Tensor]()  # of PANEL tokens: they grow, and nothing is copied
        self._each = torch.arange(rows + 1, dtype=torch.int32, device="cpu")
        self._step = self._struct(self._each)

    def step(self, ids: Tensor, at: Tensor, end: int) -> Tensor:
        """Logits (B, V) behind one token `ids` (B,) of each row, at its place `at` (B,) < `end`.

        Raises:
            IndexError: an id that is none of the vocabulary.
            ValueError: not one id for each row.
        """
        rows = self._rows
        if ids.shape != (rows,):
            raise ValueError(f"ids of shape {tuple(ids.shape)} for {rows} rows: give one for each")
        if end > self._step[0].room:  # and not the blocks': C knows those of the struct
            self._make_room(end)
            self._step = self._struct(self._each)
        logits = torch.empty(rows, self.weights.config.vocab_size, **_FLOATS)
        self._read(self._step, ids, at, logits)
        return logits

    def fill(self, rows: list[int], texts: list[Tensor]) -> None:
        """Keys and values of `texts` (T,), from place 0, for those `rows`."""
        self._make_room(max(len(text) for text in texts))
        waiting = dict(sorted(zip(rows, texts, strict=True)))
        while waiting:
            counts, now = [0] * self._rows, list[Tensor]()
            while waiting and sum(counts) < _MOST_TOKENS:
                row = next(iter(waiting))
                now.append(waiting.pop(row))
                counts[row] = len(now[-1])
            starts = torch.tensor([0, *counts], device="cpu").cumsum(0, dtype=torch.int32)
            at = torch.cat([torch.arange(len(text), device="cpu") for text in now])
            self._read(self._struct(starts), torch.cat(now), at, None)

    def _make_room(self, tokens: int) -> None:
        c = self.weights.config
        size = c.n_layers * self._rows * 2 * c.d_model * PANEL
        while len(self._blocks) * PANEL < tokens:
            # decode.c reads PANEL elements at a time, behind the last where dk is no multiple.
            block = torch.empty(size + PANEL, dtype=self.weights.dtype, device="cpu")
            self._blocks.append(block)

    def _struct(self, starts: Tensor) -> tuple[_Batch, list[object]]:
        """All but the tokens and the logits; what it points to is to be held meanwhile."""
        c, threads, n = self.weights.config, self._threads, int(starts[-1])
        room = len(self._blocks)
        copies = 1 if self._rows >= _OWN_ROWS * threads else threads
        width = -(-c.d_model // c.n_heads // PANEL) * PANEL
        of_each = c.d_model, copies * c.d_model, 3 * c.d_model, c.d_model, c.d_ff
        of_heads = threads * c.n_heads
        sizes = *(n * size for size in of_each), of_heads * room * PANEL, of_heads * width
        scratch = [torch.empty(size, **_FLOATS) for size in sizes]
        blocks = (c_void_p * room)(*(block.data_ptr() for block in self._blocks))
        batch = _Batch(
            self._rows, room * PANEL, threads, starts.data_ptr(), None, None,
            ctypes.addressof(blocks), *(tensor.data_ptr() for tensor in scratch), None,
        )  # fmt: skip
        return batch, [starts, blocks, scratch]

    def _read(
        self, struct: tuple[_Batch, list[object]], ids: Tensor, at: Tensor, logits: Tensor | None
    ) -> None:
        ids = ids.long().contiguous()
        batch, weights = struct[0], self.weights
        batch.ids, batch.at = ids.data_ptr(), at.data_ptr()
        batch.logits = None if logits is None else logits.data_ptr()
        if weights.library.read_tokens(ctypes.byref(weights.struct), ctypes.byref(batch)):
            raise IndexError(f"a token is none of the vocabulary of {weights.config.vocab_size}")


def draw(logits: Tensor, temperature: float, points: Tensor) -> Tensor:
    """For each row the token at which softmax(logits / temperature), summed, passes its point.

    `logits` (B, V) on a CPU, `points` (B,) in [0, 1); ids (B,). Wants `library()`.
    """
    found, (rows, n) = library(), logits.shape
    assert found is not None
    threads = min(torch.get_num_threads(), -(-rows // 8))
    logits, points = logits.float().contiguous(), points.float().contiguous()
    ids = torch.empty(rows, dtype=torch.long, device="cpu")
    room = torch.empty(threads * (n + PANEL), **_FLOATS)
    pointers = [tensor.data_ptr() for tensor in (logits, points, room, ids)]
    found.draw(rows, n, threads, temperature, *pointers)
    return ids
