"""Python binding of decode.c, which is compiled at first use if there is a C compiler.

decode.c is an optional backend of `generation.decoder` for models on a CPU. It supports models that
compute exactly what model.py does. The compiler is the command in the environment variable CC. If
CC is not set, the compiler is the first of `gcc`, `cc` and `clang` that is installed. This backend
is disabled on Windows, and if CC is set to an empty string. The compiled library is cached in
$XDG_CACHE_HOME/minigpt, or in ~/.cache/minigpt if XDG_CACHE_HOME is not set. The name of the cached
file depends on the source, the compiler, its version and options, and the CPU.
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

from minigpt.core.hardware import cpu_name
from minigpt.kernels.choice import is_plain
from minigpt.kernels.sampler import PANEL, Sampler, SamplerStruct
from minigpt.model import GPT, Block

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("decode.c")
_FLAGS = [
    "-O3", "-shared", "-fPIC",
    # These change no result, because decode.c reads neither errno nor floating-point exceptions.
    "-fno-math-errno", "-fno-trapping-math",
    *([] if platform.machine() == "arm64" else ["-march=native"]),  # not needed on Apple silicon
]  # fmt: skip
_MAX_THREADS = 8  # maximum for a batch too small to give each thread sequences of its own
# `fill` adds prompts to a pass until the pass has this many tokens. For the medium model, they need
# 17 MB of scratch memory.
_MAX_TOKENS = 2048
_MIN_SEQUENCES = 4  # as in decode.c: from this many per thread, threads have separate sequences
MISMATCH = "its logits differ from those of GPT.forward: was model.py changed, but not decode.c?"


# ---------------------------------------------------------------------------- the library


def library() -> ctypes.CDLL | None:
    """Return the compiled decode.c; None if it cannot be compiled, or if a self-check failed."""
    return None if False in _self_checks.values() else _compiled_library()


@functools.cache
def _compiled_library() -> ctypes.CDLL | None:
    try:
        command = compiler()
        if command is None and "CC" not in os.environ and sys.platform != "win32":
            log.warning("decode.c is not compiled, so generation is slower: install gcc or clang")
        return _load(command) if command is not None and SOURCE.is_file() else None
    # Path.home() raises RuntimeError if there is no home folder.
    except (OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        first = str(getattr(error, "stderr", None) or error).strip().split("\n")[0]
        log.warning("decode.c cannot be used, so generation is slower: %s", first)
        return None


def compiler() -> list[str] | None:
    """Return the command of the C compiler, split into words; None if there is none.

    Raises:
        ValueError: the environment variable CC has an unbalanced quote.
    """
    if sys.platform == "win32":
        return None
    if (named := os.environ.get("CC")) is not None:
        return shlex.split(named) or None
    return next(([name] for name in ("gcc", "cc", "clang") if shutil.which(name)), None)


def is_threaded() -> bool:
    """Return whether `library()` was compiled with OpenMP and can run on several threads."""
    compiled = library()
    return compiled is not None and bool(c_int32.in_dll(compiled, "threaded").value)


def _load(command: list[str]) -> ctypes.CDLL:
    path = _cached_path(command)
    try:
        return _open(path)
    except OSError:  # the cached file is damaged
        path.unlink()
        return _open(_cached_path(command))


def _open(path: Path) -> ctypes.CDLL:
    compiled = ctypes.CDLL(str(path))
    compiled.read_tokens.argtypes = [c_void_p] * 3
    return compiled


def _cached_path(command: list[str]) -> Path:
    """Return the path of the library in the cache, after compiling it if necessary."""
    # GCC's OpenMP runs the library on PyTorch's own threads; Apple's compiler has no OpenMP.
    if sys.platform == "linux":
        try:
            return _compile([*command, "-fopenmp"])
        except subprocess.CalledProcessError:
            log.debug("%s has no OpenMP", command[0])
    return _compile(command)


def _compile(command: list[str]) -> Path:
    version = run([*command, "--version"])
    # The CPU is part of the name because different machines may share the cache.
    parts = SOURCE.read_text(encoding="utf-8"), command, _FLAGS, version, cpu_name()
    name = f"decoding-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minigpt"
    if not (cache / name).exists():
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            output = Path(folder, name)
            run([*command, *_FLAGS, str(SOURCE), "-o", str(output), "-lm"])
            output.replace(cache / name)  # atomic: other processes may compile it as well
    return cache / name


def run(command: list[str]) -> str:
    """Return the output of a command.

    Raises:
        CalledProcessError: the command fails.
        TimeoutExpired: the command takes more than two minutes.
        OSError: the command cannot be started.
    """
    return subprocess.run(  # noqa: S603
        command, check=True, capture_output=True, text=True, errors="replace", timeout=120
    ).stdout


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


_SCRATCH = ("x", "normed", "qkv", "attended", "up", "scores", "outputs")


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("n_sequences", "capacity", "threads")),
        *((name, c_void_p) for name in ("starts", "ids", "positions", "blocks", *_SCRATCH)),
        ("logits", c_void_p),
    )  # fmt: skip


_Step = tuple[_Batch, list[object]]  # a batch, and the objects it points to
_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_FLOATS: Any = {"dtype": torch.float32, "device": "cpu"}  # independent of PyTorch's defaults


# ---------------------------------------------------------------------------- calls


class Weights:
    """Packed copy of a model's weights in the layout that decode.c reads.

    Args:
        model: a model in float32 on a CPU.
        dtype: float32 or bfloat16. The output projection, the matrices of the linear layers, and
            the cached keys and values have this dtype. All other tensors are float32.
    """

    def __init__(self, model: GPT, dtype: torch.dtype) -> None:
        compiled, c = library(), model.config
        assert compiled is not None
        self.library, self.dtype, self.config = compiled, dtype, c
        self._tensors = list[Tensor]()  # keeps alive what the struct points to
        self._lanes = c_int32.in_dll(compiled, "lanes").value
        self._layers = (_Layer * c.n_layers)(*(self._layer(block) for block in model.blocks))
        self.struct = _Model(
            c.vocab_size, c.d_model, c.n_layers, c.n_heads, c.d_ff, _KINDS[dtype],
            model.final_norm.eps, self._pointer(model.embedding.weight * model.scale),
            self._pointer(model.positions), self._norm(model.final_norm),
            self._matrix(model.embedding.weight, None), ctypes.addressof(self._layers),
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
        """Copy a weight (out, in) and its bias (out,) in the order in which decode.c reads them.

        The outputs are divided into groups of 2 · `lanes`, where `lanes` is the number of floats in
        a vector of decode.c. Each group is stored as a matrix (in, 2 · `lanes`).
        """
        out, width = weight.shape
        padded = torch.zeros(-(-out // PANEL) * PANEL, width, **_FLOATS)
        padded[:out] = weight
        panels = padded.view(-1, 2 * self._lanes, width).transpose(1, 2)
        if self.dtype == torch.bfloat16:  # interleave i and i + lanes, to load both at once
            panels = panels.unflatten(2, (2, self._lanes)).transpose(2, 3)
        padded_bias = torch.zeros(len(padded), **_FLOATS)
        if bias is not None:
            padded_bias[:out] = bias
        return _Matrix(self._pointer(panels, self.dtype), self._pointer(padded_bias), width, out)

    def _pointer(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
        copy = torch.empty(tensor.shape, dtype=dtype, device="cpu")
        self._tensors.append(copy.copy_(tensor.detach()))
        return copy.data_ptr()


class Batch:
    """Batch of sequences that decode.c decodes, with their keys and values.

    This class implements the protocol `generation.decoder.Batch`.

    Args:
        weights: the packed weights of the model.
        n_sequences: number of sequences, B.
    """

    def __init__(self, weights: Weights, n_sequences: int) -> None:
        self.weights, self._n_sequences = weights, n_sequences
        useful = max(_MAX_THREADS, n_sequences // _MIN_SEQUENCES)
        self._threads = min(torch.get_num_threads(), useful)
        self._blocks = list[Tensor]()  # PANEL tokens each: more tokens need no copy
        self._single = torch.arange(n_sequences + 1, dtype=torch.int32, device="cpu")
        self._step = self._struct(self._single)

    def step(self, ids: Tensor, positions: Tensor, end: int) -> Tensor:
        """Append one token to each sequence and return the logits of the next token.

        Args:
            ids: the new tokens (B,), on a CPU.
            positions: positions of the new tokens (B,), int64.
            end: the largest position plus one.

        Returns:
            Logits (B, V), float32.

        Raises:
            IndexError: an id is not in the vocabulary.
        """
        logits = torch.empty(self._n_sequences, self.weights.config.vocab_size, **_FLOATS)
        self._read(self._single_tokens(end), ids, positions, logits)
        return logits

    def generate(
        self, ids: Tensor, positions: Tensor, end: int, sampler: Sampler, points: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Generate tokens: each step appends a token to each sequence and samples the next token.

        The first step appends `ids`. Each later step appends the tokens that the previous step
        sampled. The tokens that the last step samples are returned, but not appended. Generation
        stops early when all sequences have ended.

        Args:
            ids: the new tokens (B,), on a CPU.
            positions: positions of the new tokens (B,), int64.
            end: the largest position plus one.
            sampler: settings and state of the sampling.
            points: uniform random numbers in [0, 1) for each step, (steps, B) float32, on a CPU.

        Returns:
            The sampled tokens (n, B), int64, and the logits (n, B, V), float32. n is the number of
            steps until all sequences have ended, at most `len(points)`.

        Raises:
            IndexError: an id is not in the vocabulary.
        """
        n_steps, vocab_size = len(points), self.weights.config.vocab_size
        chosen = torch.empty(points.shape, dtype=torch.long, device="cpu")
        logits = torch.empty(*points.shape, vocab_size, **_FLOATS)
        positions = positions + torch.arange(n_steps, device="cpu")[:, None]  # (steps, B)
        step = self._single_tokens(end + n_steps - 1)
        n = self._read(step, ids, positions, logits, sampler.prepare(points, chosen, vocab_size))
        return chosen[:n], logits[:n]

    def _single_tokens(self, capacity: int) -> _Step:
        """Return a batch struct for one new token per sequence.

        The caches of the struct have space for at least `capacity` tokens per sequence, including
        the new token.
        """
        if capacity > self._step[0].capacity:  # `fill` may have added blocks that the struct lacks
            self._reserve(capacity)
            self._step = self._struct(self._single)
        return self._step

    def fill(self, indices: list[int], sequences: list[Tensor]) -> None:
        """Replace the sequences at `indices`, and compute keys and values of the new sequences.

        Args:
            indices: indices of the sequences to replace, in [0, B).
            sequences: token ids (T,) of each new sequence; the first token has position 0.
        """
        self._reserve(max(map(len, sequences)))
        waiting = dict(sorted(zip(indices, sequences, strict=True)))
        while waiting:
            lengths, chunk = [0] * self._n_sequences, list[Tensor]()
            while waiting and sum(lengths) < _MAX_TOKENS:
                index = next(iter(waiting))
                chunk.append(waiting.pop(index))
                lengths[index] = len(chunk[-1])
            starts = torch.tensor([0, *lengths], device="cpu").cumsum(0, dtype=torch.int32)
            positions = torch.cat([torch.arange(len(ids), device="cpu") for ids in chunk])
            self._read(self._struct(starts), torch.cat(chunk), positions, None)

    def _reserve(self, capacity: int) -> None:
        c = self.weights.config
        size = c.n_layers * self._n_sequences * 2 * c.d_model * PANEL
        while len(self._blocks) * PANEL < capacity:
            # + PANEL, because decode.c reads PANEL elements at once, perhaps beyond the last one.
            self._blocks.append(torch.empty(size + PANEL, dtype=self.weights.dtype, device="cpu"))

    def _struct(self, starts: Tensor) -> _Step:
        """Return a batch struct, and a list of the objects to which the struct points.

        The pointers to ids, positions and logits are null until `_read` sets them.
        """
        c, threads, n = self.weights.config, self._threads, int(starts[-1])
        heads, n_blocks = threads * c.n_heads, len(self._blocks)
        copies = 1 if self._n_sequences >= _MIN_SEQUENCES * threads else threads
        width = -(-c.d_model // c.n_heads // PANEL) * PANEL
        widths = c.d_model, copies * c.d_model, 3 * c.d_model, c.d_model, c.d_ff
        sizes = *(n * size for size in widths), heads * n_blocks * PANEL, heads * width
        scratch = [torch.empty(size, **_FLOATS) for size in sizes]
        blocks = (c_void_p * n_blocks)(*(block.data_ptr() for block in self._blocks))
        batch = _Batch(
            self._n_sequences, n_blocks * PANEL, threads, starts.data_ptr(), None, None,
            ctypes.addressof(blocks), *(tensor.data_ptr() for tensor in scratch), None,
        )  # fmt: skip
        return batch, [starts, blocks, scratch]

    def _read(
        self, struct: _Step, ids: Tensor, positions: Tensor, logits: Tensor | None,
        sampler: SamplerStruct | None = None,
    ) -> int:  # fmt: skip
        """Call `read_tokens` of decode.c, and return the number of steps that it computed."""
        ids = ids.long().contiguous()
        batch, weights = struct[0], self.weights
        batch.ids, batch.positions = ids.data_ptr(), positions.data_ptr()
        batch.logits = None if logits is None else logits.data_ptr()
        parts = (None if x is None else ctypes.byref(x) for x in (weights.struct, batch, sampler))
        if (n_steps := weights.library.read_tokens(*parts)) < 0:
            raise IndexError(f"an id is not in the vocabulary of size {weights.config.vocab_size}")
        return n_steps


# ---------------------------------------------------------------------------- supported models

_self_checks: dict[torch.dtype, bool] = {}  # result of the self-check for each dtype


def unsupported(model: GPT) -> str | None:
    """Return the reason why decode.c cannot decode `model`; None if it can."""
    weight = next(model.parameters())
    if weight.device.type != "cpu":
        return f"the model is on {weight.device}, not on a CPU"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weights are {weight.dtype}, not float32, bfloat16 or float16"
    if library() is None:
        return MISMATCH if False in _self_checks.values() else "it needs a C compiler"
    if not is_plain(model):
        return f"it supports only GPT: this {type(model).__qualname__} has other parts or methods"
    return None


class _Packed(NamedTuple):
    """Packed weights of a model, and its parameters at the time of packing."""

    parameters: list[Tensor]  # kept alive, so that their addresses cannot be reused
    state: list[tuple[int, int]]  # address and version counter of each parameter
    weights: Weights


_cache: WeakKeyDictionary[GPT, _Packed] = WeakKeyDictionary()  # no value may refer to its key


def packed_weights(model: GPT) -> Weights | None:
    """Return the packed weights of a supported model; None if the self-check of decode.c fails.

    The packed weights of a frozen model are cached until a weight changes. If a parameter requires
    a gradient, the weights are packed in each call: fused optimizers do not increment the version
    counters of PyTorch, so a change could be missed. Weights that were created in inference mode
    have no version counter, so they are also packed in each call.

    Args:
        model: a model for which `unsupported` returns None.
    """
    tensors = *model.parameters(), *model.buffers()
    parameters = [p.detach() for p in tensors]
    if any(p.requires_grad for p in tensors) or any(p.is_inference() for p in parameters):
        return _pack(model)
    state = [(p.data_ptr(), p._version) for p in parameters]
    packed = _cache.get(model)
    if packed is None or packed.state != state:
        if (weights := _pack(model)) is None:
            return None
        packed = _cache[model] = _Packed(parameters, state, weights)
    return packed.weights


def _pack(model: GPT) -> Weights | None:
    dtype = model.embedding.weight.dtype
    is_float32 = all(p.dtype == torch.float32 for p in (*model.parameters(), *model.buffers()))
    exact = model if is_float32 else copy.deepcopy(model).float()
    weights = Weights(exact, torch.float32 if dtype == torch.float16 else dtype)
    return weights if _passes_self_check(weights, exact) else None


@torch.inference_mode()
def _passes_self_check(weights: Weights, model: GPT) -> bool:
    """Return whether decode.c computes the same logits as `model`, up to rounding.

    The first result for each dtype is stored, and later calls return it. If the logits of `model`
    are not finite, the result is True and is not stored.
    """
    if weights.dtype in _self_checks:
        return _self_checks[weights.dtype]
    n = min(5, model.config.context_length)
    ids = torch.arange(n) % model.config.vocab_size
    batch = Batch(weights, 1)
    batch.fill([0], [ids[:-1]])
    logits, expected = batch.step(ids[-1:], torch.tensor([n - 1]), n), model(ids[None])[:, -1]
    if not expected.isfinite().all():  # damaged weights, which say nothing about decode.c
        return True
    tolerance = 1e-3 if weights.dtype == torch.float32 else 5e-2
    is_close = (logits - expected).abs().max() <= tolerance * expected.abs().max()
    if not _self_checks.setdefault(weights.dtype, bool(is_close)):
        log.warning("decode.c is not used, because %s", MISMATCH)
    return bool(is_close)
