"""decode.c from Python: compiled once where there is a C compiler, called with tensors.

It is an optional backend of `generation.decoder`, for a GPT that is on a CPU and computes exactly
what model.py says. The compiler is `gcc`, `cc` or `clang`, or what the environment variable CC
names; an empty CC does without. The compiled library lies below ~/.cache/minigpt (XDG_CACHE_HOME),
under a name of its own for each source, command and kind of CPU.
"""

from __future__ import annotations

import copy
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
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from minigpt.model import GPT, Block, CausalSelfAttention, FeedForward, GPTConfig

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
_MOST_TOKENS = 2048  # of prompts, read at once: 17 MB at the medium size, and one prompt more
_OWN_ROWS = 4  # as in decode.c: or more for each thread, and each has its own


# ---------------------------------------------------------------------------- the library


def library() -> ctypes.CDLL | None:
    """Return the compiled decode.c; None without a working compiler, or if it computes wrongly."""
    return None if False in _verdicts.values() else _compiled_here()


@functools.cache
def _compiled_here() -> ctypes.CDLL | None:
    try:
        command = compiler()
        return _loaded(command) if command is not None and SOURCE.is_file() else None
    except (OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:  # or no home
        reason = getattr(error, "stderr", None) or error
        first = str(reason).strip().split("\n")[0]
        log.warning("text is generated without decode.c, more slowly: %s", first)
        return None


def compiler() -> list[str] | None:
    """Return the command of a C compiler, if there is one; ValueError if CC has an open quote."""
    if sys.platform == "win32":
        return None
    named = os.environ.get("CC")
    if named is not None:
        return shlex.split(named) or None
    return next(([name] for name in ("gcc", "cc", "clang") if shutil.which(name)), None)


def is_threaded() -> bool:
    """Whether `library()` works on several threads: that needs a compiler with OpenMP."""
    compiled = library()
    return compiled is not None and bool(c_int32.in_dll(compiled, "threaded").value)


def _loaded(command: list[str]) -> ctypes.CDLL:
    path = _cached(command)
    try:
        return _opened(path)
    except OSError:  # damaged since
        path.unlink()
        return _opened(_cached(command))


def _opened(path: Path) -> ctypes.CDLL:
    compiled = ctypes.CDLL(str(path))
    compiled.sample.argtypes = [*[c_int32] * 3, c_float, *[c_void_p] * 4]
    return compiled


def _cached(command: list[str]) -> Path:
    """Return the path of the library, compiled now unless it is there."""
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
            output = Path(folder, name)
            _run([*command, *_FLAGS, str(SOURCE), "-o", str(output), "-lm"])
            output.replace(cache / name)  # whole or not at all, whoever else compiles it too
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


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff")),
        ("kind", c_int32), ("eps", c_float), ("embedding", c_void_p), ("positions", c_void_p),
        ("final_norm", _Norm), ("lm_head", _Matrix), ("layers", c_void_p),
    )  # fmt: skip


_SCRATCH = ("x", "normed", "qkv", "mixed", "up", "scores", "outputs")


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("rows", "capacity", "threads")),
        *((name, c_void_p) for name in ("starts", "ids", "positions", "blocks", *_SCRATCH)),
        ("logits", c_void_p),
    )  # fmt: skip


_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_FLOATS: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are


# ---------------------------------------------------------------------------- calls


class Weights:
    """The weights of a model as decode.c reads them.

    Args:
        net: a model on a CPU, in float32.
        dtype: of its matrices in the copy that is made, and of keys and values: float32 or
            bfloat16.
    """

    def __init__(self, net: GPT, dtype: torch.dtype) -> None:
        compiled, c = library(), net.config
        assert compiled is not None
        self.library, self.dtype, self.config = compiled, dtype, c
        self._held = list[Tensor]()  # a pointer keeps no tensor alive
        self._lanes = c_int32.in_dll(compiled, "lanes").value
        self._layers = (_Layer * c.n_layers)(*(self._layer(block) for block in net.blocks))
        self.struct = _Model(
            c.vocab_size, c.d_model, c.n_layers, c.n_heads, c.d_ff, _KINDS[dtype],
            net.final_norm.eps, self._pointer(net.embedding.weight * net.scale),
            self._pointer(net.positions), self._norm(net.final_norm),
            self._matrix(net.embedding.weight, None), ctypes.addressof(self._layers),
        )  # fmt: skip

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


class Batch:
    """The keys and values of a batch of `rows` sequences, which new tokens are added to."""

    def __init__(self, weights: Weights, rows: int) -> None:
        self.weights, self._rows = weights, rows
        self._threads = min(torch.get_num_threads(), max(_MOST_THREADS, rows // _OWN_ROWS))
        self._blocks = list[Tensor]()  # of PANEL tokens: they grow, and nothing is copied
        self._each = torch.arange(rows + 1, dtype=torch.int32, device="cpu")
        self._step = self._struct(self._each)

    def step(self, ids: Tensor, at: Tensor, end: int) -> Tensor:
        """Return logits (B, V) of what follows the tokens `ids` (B,), one of each sequence.

        Args:
            ids: the new tokens, on a CPU.
            at: their positions (B,), int64.
            end: the largest position plus one.

        Raises:
            IndexError: an id is not in the vocabulary.
        """
        if end > self._step[0].capacity:  # and not the blocks': C knows those of the struct
            self._reserve(end)
            self._step = self._struct(self._each)
        logits = torch.empty(self._rows, self.weights.config.vocab_size, **_FLOATS)
        self._read(self._step, ids, at, logits)
        return logits

    def fill(self, rows: list[int], texts: list[Tensor]) -> None:
        """Compute keys and values of `texts` (T,), from position 0, for those `rows`."""
        self._reserve(max(len(text) for text in texts))
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

    def _reserve(self, tokens: int) -> None:
        c = self.weights.config
        size = c.n_layers * self._rows * 2 * c.d_model * PANEL
        while len(self._blocks) * PANEL < tokens:
            # decode.c reads PANEL elements at a time, behind the last where dk is no multiple.
            block = torch.empty(size + PANEL, dtype=self.weights.dtype, device="cpu")
            self._blocks.append(block)

    def _struct(self, starts: Tensor) -> tuple[_Batch, list[object]]:
        """Return a batch without tokens and logits, and what must stay alive as long as it does."""
        c, threads, n = self.weights.config, self._threads, int(starts[-1])
        n_blocks = len(self._blocks)
        copies = 1 if self._rows >= _OWN_ROWS * threads else threads
        width = -(-c.d_model // c.n_heads // PANEL) * PANEL
        of_each = c.d_model, copies * c.d_model, 3 * c.d_model, c.d_model, c.d_ff
        of_heads = threads * c.n_heads
        sizes = *(n * size for size in of_each), of_heads * n_blocks * PANEL, of_heads * width
        scratch = [torch.empty(size, **_FLOATS) for size in sizes]
        blocks = (c_void_p * n_blocks)(*(block.data_ptr() for block in self._blocks))
        batch = _Batch(
            self._rows, n_blocks * PANEL, threads, starts.data_ptr(), None, None,
            ctypes.addressof(blocks), *(tensor.data_ptr() for tensor in scratch), None,
        )  # fmt: skip
        return batch, [starts, blocks, scratch]

    def _read(
        self, struct: tuple[_Batch, list[object]], ids: Tensor, at: Tensor, logits: Tensor | None
    ) -> None:
        ids = ids.long().contiguous()
        batch, weights = struct[0], self.weights
        batch.ids, batch.positions = ids.data_ptr(), at.data_ptr()
        batch.logits = None if logits is None else logits.data_ptr()
        if weights.library.read_tokens(ctypes.byref(weights.struct), ctypes.byref(batch)):
            raise IndexError(f"an id is not in the vocabulary of {weights.config.vocab_size}")


def sample(logits: Tensor, temperature: float, points: Tensor) -> Tensor:
    """Return for each row the id at which softmax(logits / temperature), summed, passes its point.

    `logits` (B, V) on a CPU, `points` (B,) in [0, 1); ids (B,). There must be a `library()`.
    """
    compiled, (rows, n) = library(), logits.shape
    assert compiled is not None
    threads = min(torch.get_num_threads(), -(-rows // 8))
    logits, points = logits.float().contiguous(), points.float().contiguous()
    ids = torch.empty(rows, dtype=torch.long, device="cpu")
    scratch = torch.empty(threads * (n + PANEL), **_FLOATS)
    compiled.sample(
        rows, n, threads, temperature,
        logits.data_ptr(), points.data_ptr(), scratch.data_ptr(), ids.data_ptr(),
    )  # fmt: skip
    return ids


# ---------------------------------------------------------------------------- what it knows

_FORWARDS = {cls: cls.forward for cls in (GPT, Block, CausalSelfAttention, FeedForward)}
_HIDDEN = GPT.hidden
_verdicts: dict[torch.dtype, bool] = {}  # whether decode.c was right; asked once for each dtype


def unsupported(net: GPT) -> str | None:
    """Return why decode.c cannot decode `net`, or None where it can."""
    weight = next(net.parameters())
    if weight.device.type != "cpu":
        return f"the model is on {weight.device}, not on a CPU"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weights are {weight.dtype}"
    if library() is None:
        return "no C compiler works here: install gcc or clang"
    if not is_plain(net):
        return f"it knows GPT alone, and {type(net).__qualname__} has parts or methods of its own"
    return None


def is_plain(net: GPT) -> bool:
    """Whether all that `net` computes is as in model.py: no subclass, hook or replaced part."""
    return (
        type(net) is GPT
        and type(net.config) is GPTConfig
        and all(cls.forward is forward for cls, forward in _FORWARDS.items())
        and GPT.hidden is _HIDDEN
        and not any(
            m._forward_hooks or m._forward_pre_hooks or {"forward", "hidden"} & vars(m).keys()
            for m in net.modules()
        )
        and _parts(net) == _parts_of(net.config)
    )


def _parts(net: GPT) -> list[tuple[Any, ...]]:
    modules = [(name, type(m), getattr(m, "eps", None)) for name, m in net.named_modules()]
    return [*modules, *((name, weight.shape) for name, weight in net.named_parameters())]


@functools.cache
def _parts_of(config: GPTConfig) -> list[tuple[Any, ...]]:
    with torch.device("meta"):
        return _parts(GPT(config))


class _Kept(NamedTuple):
    """The packed weights of a model as it was."""

    parameters: list[Tensor]  # held, so that no new ones take their addresses
    state: list[tuple[int, int]]  # address and version of each
    weights: Weights


_kept: WeakKeyDictionary[GPT, _Kept] = WeakKeyDictionary()  # no value may hold its key


def prepared(net: GPT) -> Weights | None:
    """Return the packed weights of a supported `net`; None if decode.c computes something else.

    Those of a frozen model are packed once. Not so where a parameter requires a gradient, because
    PyTorch does not count what fused optimizers write.
    """
    parameters = [p.detach() for p in (*net.parameters(), *net.buffers())]
    if any(p.requires_grad for p in net.parameters()) or any(p.is_inference() for p in parameters):
        return _packed(net)
    state = [(p.data_ptr(), p._version) for p in parameters]
    kept = _kept.get(net)
    if kept is None or kept.state != state:
        if (weights := _packed(net)) is None:
            return None
        kept = _kept[net] = _Kept(parameters, state, weights)
    return kept.weights


def _packed(net: GPT) -> Weights | None:
    stored = net.embedding.weight.dtype
    whole = all(p.dtype == torch.float32 for p in (*net.parameters(), *net.buffers()))
    exact = net if whole else copy.deepcopy(net).float()
    weights = Weights(exact, torch.float32 if stored == torch.float16 else stored)
    return weights if _agrees(weights, exact) else None


@torch.inference_mode()
def _agrees(weights: Weights, net: GPT) -> bool:
    """Whether decode.c gives the logits of `net`, compared at its first use for each dtype."""
    if weights.dtype in _verdicts:
        return _verdicts[weights.dtype]
    n = min(5, net.config.context_length)
    ids = torch.arange(n) % net.config.vocab_size
    batch = Batch(weights, 1)
    batch.fill([0], [ids[:-1]])
    logits, expected = batch.step(ids[-1:], torch.tensor([n - 1]), n), net(ids[None])[:, -1]
    if not expected.isfinite().all():  # which says nothing about decode.c
        return True
    share = 1e-3 if weights.dtype == torch.float32 else 5e-2
    _verdicts[weights.dtype] = bool((logits - expected).abs().max() <= share * expected.abs().max())
    if not _verdicts[weights.dtype]:
        log.warning("decode.c is not used: its logits are not those of GPT.forward on this machine")
    return _verdicts[weights.dtype]
