"""The measurements of steps and generation of benchmarks/gpu.py, one function each.

A function takes the numbers of the machine and returns plain values for the JSON.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.peers import Compile, Step, nanogpt_step, transformers_step
from minigpt.data.device import DeviceBatches
from minigpt.data.windows import BudgetSampler, StoryWindows, TrainingBatches
from minigpt.generation.sampling import SamplingConfig, generate
from minigpt.kernels.choice import kernels_for
from minigpt.kernels.cuda_graph import graphed_loss
from minigpt.model import GPT, GPTConfig
from minigpt.training.config import OptimizerConfig
from minigpt.training.optim import CombinedOptimizer, Muon, make_optimizer, peak_lrs

ROOT = Path(__file__).parent.parent
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPILE_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
Values = dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """The device, the sizes of everything that is measured, and the scratch folder."""

    device: torch.device
    scratch: Path
    sizes: dict[str, GPTConfig]
    batches: tuple[int, ...]  # windows per step, the most important first
    rounds: int  # measured rounds of `steps` steps
    steps: int
    precisions: tuple[str, ...]
    overrides: tuple[str, ...]  # of every training
    side: int  # of the matrices whose product is timed
    sequences: tuple[int, ...]  # batch sizes of generation
    new_tokens: int
    shared: tuple[int, ...]  # numbers of runs that share the device
    perplexity: float  # on the validation split, to which the time is measured

    def compile(self, mode: str | None = None) -> Compile:
        """Return `torch.compile` with a mode; on a CPU without the compiler, to save time."""
        if self.on_gpu:
            return partial(torch.compile, mode=mode)
        return partial(torch.compile, backend="aot_eager")

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def tokens(self, n: int = 200_000) -> np.ndarray:
        """Return random tokens with an end-of-text token now and then, uint16."""
        shape = next(iter(self.sizes.values()))
        ids = np.random.default_rng(0).integers(1, shape.vocab_size, n).astype(np.uint16)
        ids[199::200] = 0
        return ids

    def seconds(self, step: Step) -> float:
        """Return the median time of a step in seconds, after a warm-up of one round."""
        times = []
        for _ in range(self.rounds + 1):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(self.steps):
                step()
            self.synchronize()
            times.append((time.perf_counter() - start) / self.steps)
        return statistics.median(times[1:])


# ---------------------------------------------------------------------------- the machine


def describe(m: Machine) -> Values:
    """Return the name of the device, versions, copy bandwidth and speed of a bfloat16 product."""
    a, b = (torch.randn(m.side, m.side, device=m.device).bfloat16() for _ in range(2))
    source = torch.randn(m.side * m.side, device=m.device)
    target = torch.empty_like(source)
    copy, product = m.seconds(lambda: target.copy_(source)), m.seconds(lambda: torch.mm(a, b))
    return {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "copy GB/s": 2 * source.nbytes / copy / 1e9,  # bytes read and written
        "bfloat16 TFLOP/s": 2 * m.side**3 / product / 1e12,
    }


# ---------------------------------------------------------------------------- our step


def training_loss(model: GPT, graph: bool, compile: Compile | None = None) -> Any:
    """Return the loss of a training step, as `train.py` computes it on a GPU."""
    loss = compile(model.loss) if compile else model.loss
    return graphed_loss(model, loss, model.loss) if graph else loss


def our_step(
    m: Machine, shape: GPTConfig, batch: int, precision: str = "bfloat16", graph: bool = True,
    compile: Compile | None = None, optimizer_too: bool = False, narrow: bool = False,
) -> Step:  # fmt: skip
    """Return a step with batches on the device, Muon and clipping.

    `compile` is applied to forward pass, loss and backward pass, and if `optimizer_too` is set,
    also to Muon's products. If `narrow` is set, the residual stream is in bfloat16 instead of
    float32; docs/LOG.md, 2026-11-30, compares the losses.
    """
    model = GPT(shape).to(m.device).use(kernels_for("cuda"))
    if (
        narrow
    ):  # each block adds to its input, so the dtype of the first input is that of the stream
        model.blocks[0].register_forward_pre_hook(lambda _, args: (args[0].bfloat16(), *args[1:]))
    loss, dtype = training_loss(model, graph, compile), DTYPES[precision]
    settings = OptimizerConfig()
    products = dtype or torch.float32
    lrs = peak_lrs(settings, shape.d_model)
    optimizer = make_optimizer(model, settings, lrs, dtype=products, graphed=graph)
    if compile and optimizer_too:
        assert isinstance(optimizer, CombinedOptimizer)
        muon = optimizer.parts[1]
        assert isinstance(muon, Muon)
        muon._orthogonalised = compile(muon._orthogonalised)
    tokens, n = m.tokens(), iter(range(10**9))
    order = BudgetSampler(len(tokens), shape.context_length, batch, 10**6, 1, stories=True)
    windows = StoryWindows(tokens, shape.context_length, 1)
    batches = DeviceBatches(TrainingBatches(windows, order, 0.0, shape.vocab_size), m.device)

    def step() -> Tensor:
        with torch.autocast(m.device.type, dtype, dtype is not None):
            value = loss(*batches[next(n)])
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        return value.detach()

    return step


# ---------------------------------------------------------------------------- speed


# Steps by name, the most important first. Peers are those with "eager" or "compiled" in their name
# and without "ours".
CANDIDATES = (
    "ours", "ours compiled", "nanoGPT compiled", "nanoGPT compiled, CUDA graphs",
    "transformers compiled", "transformers compiled, CUDA graphs", "transformers eager",
)  # fmt: skip
MORE_CANDIDATES = (
    "ours without graph", "ours float32", "ours compiled, optimizer too",
    "ours compiled, graphs of torch.compile", "ours compiled, max-autotune",
    "bfloat16 stream", "bfloat16 stream, torch.compile",
)  # fmt: skip


def candidate(m: Machine, size: str, batch: int, name: str) -> Step:
    """Return the step with a name in CANDIDATES or MORE_CANDIDATES."""
    shape = m.sizes[size]
    args, ours = (shape, m.tokens(), batch, m.device), partial(our_step, m, shape, batch)
    compile, with_graphs = m.compile(), m.compile("reduce-overhead")
    steps: dict[str, Callable[[], Step]] = {
        "ours": ours,
        "ours compiled": lambda: ours(compile=compile),
        "nanoGPT compiled": lambda: nanogpt_step(*args, compile),
        "transformers compiled": lambda: transformers_step(*args, compile),
        "transformers eager": lambda: transformers_step(*args),
        "nanoGPT compiled, CUDA graphs": lambda: nanogpt_step(*args, with_graphs),
        "transformers compiled, CUDA graphs": lambda: transformers_step(*args, with_graphs),
        "ours without graph": lambda: ours(graph=False),
        "ours float32": lambda: ours("float32"),
        "ours compiled, optimizer too": lambda: ours(compile=compile, optimizer_too=True),
        # Not the optimizer too: its gradients would be in the memory of these graphs.
        "ours compiled, graphs of torch.compile": lambda: ours(graph=False, compile=with_graphs),
        "ours compiled, max-autotune": lambda: ours(
            compile=m.compile("max-autotune-no-cudagraphs")
        ),
        "bfloat16 stream": lambda: ours(narrow=True),
        "bfloat16 stream, torch.compile": lambda: ours(compile=compile, narrow=True),
    }
    return steps[name]()


def speed(m: Machine, size: str, batch: int, name: str) -> Values:
    """Measure the tokens per second and the memory of a step."""
    if m.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds = m.seconds(candidate(m, size, batch, name))
    finally:
        torch.compiler.reset()
    memory = torch.cuda.max_memory_allocated() / 1e6 if m.on_gpu else None
    n = batch * m.sizes[size].context_length
    flops = GPT(m.sizes[size]).flops_per_token() if name.startswith("ours") else None
    return {
        "size": size, "windows": batch, "step": name, "tokens per second": n / seconds,
        "memory MB": memory, "model TFLOP/s": flops and n / seconds * flops / 1e12,
    }  # fmt: skip


def kernels_of_a_step(m: Machine, size: str, batch: int) -> Values:
    """Profile our step: its kernels, which take most of the time, and the time without a kernel.

    A profiler may slow down everything that is measured after it in the same process.

    Raises:
        RuntimeError: no kernel of a GPU was recorded.
    """
    step = our_step(m, m.sizes[size], batch)
    whole = 1e3 * m.seconds(step)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if m.on_gpu else []
    with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
        for _ in range(m.steps):
            step()
        m.synchronize()
    device = "CUDA" if m.on_gpu else "CPU"
    events = [
        e for e in profile.key_averages()
        if e.device_type.name == device
        and not e.is_user_annotation  # a range, which contains kernels (pytorch#130730)
    ]  # fmt: skip
    if m.on_gpu and not events:
        raise RuntimeError("the profiler has recorded no kernel: CUPTI may be missing or in use")
    spent = {e.key: e.self_device_time_total if m.on_gpu else e.self_cpu_time_total for e in events}
    top = sorted(spent, key=lambda key: -spent[key])[:15]
    in_kernels = sum(spent.values()) / m.steps / 1e3
    launches = sum(e.count for e in profile.key_averages() if "Launch" in e.key) / m.steps
    return {
        "size": size, "windows": batch, "ms per step": whole,
        "kernels per step": sum(e.count for e in events) / m.steps,
        "launches per step": launches,
        "ms in kernels per step": in_kernels,
        "ms in gaps per step": max(0.0, whole - in_kernels),
        "top kernels, ms per step": {key[:80]: spent[key] / m.steps / 1e3 for key in top},
    }  # fmt: skip


_WARM_UPS = 2  # the second call of a compiled function may record or compile once more
WRITERS = "ours", "transformers eager", "transformers compiled"


def generation(m: Machine, size: str, batch: int, name: str) -> Values:
    """Measure the generated tokens per second of a program in WRITERS, the median of three runs."""
    shape = m.sizes[size]
    prompt = torch.ones(batch, 4, dtype=torch.long, device=m.device)
    if name == "ours":
        model = GPT(shape).to(m.device).eval().requires_grad_(False)
        sampling = SamplingConfig(0.8, max_tokens=m.new_tokens, seed=1, backend="torch")
        write = lambda: sum(1 for _ in generate(model, prompt, sampling, end_of_text=-1))  # noqa: E731
    else:
        write = transformers_generation(m, shape, prompt, static=name.endswith("compiled"))
    times = []
    try:
        for _ in range(_WARM_UPS + 3):
            m.synchronize()
            start = time.perf_counter()
            write()
            m.synchronize()
            times.append(time.perf_counter() - start)
    finally:
        torch.compiler.reset()
    seconds = statistics.median(times[_WARM_UPS:])
    rate = batch * m.new_tokens / seconds
    return {"size": size, "batch": batch, "writer": name, "tokens per second": rate}


def transformers_generation(
    m: Machine, shape: GPTConfig, prompt: Tensor, static: bool = False
) -> Step:
    """Return a function that generates with transformers, which compiles with a static cache."""

    def write() -> Any:
        nonlocal peer
        import transformers

        if peer is None:
            config = transformers.GPT2Config(
                vocab_size=shape.vocab_size, n_positions=shape.context_length,
                n_embd=shape.d_model, n_layer=shape.n_layers, n_head=shape.n_heads,
                n_inner=shape.d_ff, bos_token_id=None, eos_token_id=None,
            )  # fmt: skip
            model: Any = transformers.GPT2LMHeadModel(config)
            peer = model.to(m.device).eval()
        settings = transformers.GenerationConfig(
            do_sample=True, temperature=0.8, top_k=0, max_new_tokens=m.new_tokens,
            min_new_tokens=m.new_tokens, pad_token_id=0,
            cache_implementation="static" if static else None,
        )  # fmt: skip
        mask = torch.ones_like(prompt)
        return peer.generate(prompt, attention_mask=mask, generation_config=settings)

    peer: Any = None
    return write
