"""The checks and measurements of benchmarks/gpu.py, one function each.

A function takes the numbers of the machine and returns plain values for the JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from benchmarks.peers import Compile, Step, nanogpt_step, transformers_step
from minigpt.cli.compose import load_config
from minigpt.core.hardware import Hardware
from minigpt.data.datamodule import DataModule
from minigpt.data.device import DeviceBatches
from minigpt.data.windows import BudgetSampler, StoryWindows, TrainingBatches
from minigpt.generation.sampling import SamplingConfig, generate
from minigpt.kernels.choice import kernels_for
from minigpt.kernels.cuda_graph import graphed_loss
from minigpt.model import GPT, GPTConfig
from minigpt.runs.folder import Run
from minigpt.runs.records import read_metrics, read_summary
from minigpt.training.config import OptimizerConfig
from minigpt.training.loop import train
from minigpt.training.optim import CombinedOptimizer, Muon, make_optimizer
from tests.syncs import SyncCounter

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
    compile: Compile | None = None, optimizer_too: bool = False,
) -> Step:  # fmt: skip
    """Return a step with batches on the device, Muon and clipping.

    `compile` is applied to forward pass, loss and backward pass, and if `optimizer_too` is set,
    also to Muon's products.
    """
    model = GPT(shape).to(m.device).use(kernels_for("cuda"))
    loss, dtype = training_loss(model, graph, compile), DTYPES[precision]
    settings = OptimizerConfig()
    products = dtype or torch.float32
    optimizer = make_optimizer(model, settings, shape.d_model, dtype=products, graphed=graph)
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


# ---------------------------------------------------------------------------- checks


def check_gradients(m: Machine) -> Values:
    """Compare loss and gradients of each size and precision with float32 on the CPU."""
    rows, ok = [], True
    for name, shape in m.sizes.items():
        torch.manual_seed(0)
        reference = GPT(shape)
        ids, targets = torch.randint(0, shape.vocab_size, (2, 2, shape.context_length)).unbind()
        expected = _gradients(reference, reference.loss, ids, targets, None)
        model = GPT(shape).to(m.device).use(kernels_for("cuda"))
        model.load_state_dict(reference.state_dict())
        for precision in m.precisions:
            loss = training_loss(model, precision != "float16")
            actual = _gradients(model, loss, ids.to(m.device), targets.to(m.device), precision)
            errors = {k: _distance(actual[k], expected[k]) for k in ("loss", "gradients")}
            limits = (1e-4, 3e-3) if precision == "float32" else (5e-3, 5e-2)
            good = errors["loss"] < limits[0] and errors["gradients"] < limits[1]
            rows.append({"size": name, "precision": precision, **errors, "ok": good})
            ok = ok and good
    return {"ok": ok, "rows": rows}


def _gradients(
    model: GPT, loss: Any, ids: Tensor, targets: Tensor, precision: str | None
) -> dict[str, Tensor]:
    dtype = DTYPES[precision or "float32"]
    scale = 1024.0 if dtype == torch.float16 else 1.0
    with torch.autocast(ids.device.type, dtype, dtype is not None):
        value = loss(ids, targets)
    gradients = torch.autograd.grad(value * scale, list(model.parameters()))
    flat = torch.cat([g.float().flatten() for g in gradients]).cpu() / scale
    return {"loss": value.detach().float().cpu(), "gradients": flat}


def _distance(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the norm; infinity for NaN."""
    return float(((actual - expected).norm() / expected.norm()).nan_to_num(torch.inf))


def check_batches(m: Machine) -> Values:
    """Compare the batches that the device gathers with those of the host, bit for bit."""
    shape, tokens = next(iter(m.sizes.values())), m.tokens(20_000)
    order = BudgetSampler(
        len(tokens), shape.context_length, 4, 100, 1, random_offset=True, stories=True
    )
    windows = StoryWindows(tokens, shape.context_length, 1)
    batches = TrainingBatches(windows, order, 0.2, shape.vocab_size)
    on_device = DeviceBatches(batches, m.device)
    same = all(
        torch.equal(a.cpu(), b)
        for step in range(100)
        for a, b in zip(on_device[step], batches[step], strict=True)
    )
    return {"ok": same, "steps": 100}


def check_generation(m: Machine) -> Values:
    """Compare the tokens of a seed with those of the CPU, and count the waits for the device."""
    shape = next(iter(m.sizes.values()))
    model = GPT(shape).eval().requires_grad_(False)
    sampling = SamplingConfig(0.8, max_tokens=40, seed=1, backend="torch")

    def tokens() -> Tensor:
        prompts = torch.arange(1, 7, device=model.embedding.weight.device).view(2, 3)
        steps = generate(model, prompts, sampling, end_of_text=-1)
        return torch.stack([step.ids for step in steps])

    expected, precision = tokens(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 would change some tokens
    try:
        model.to(m.device)
        syncs = _Syncs(m.on_gpu)
        with syncs.names() as names:
            syncs.watch(True)
            actual = tokens()
            syncs.watch(False)
    finally:
        torch.set_float32_matmul_precision(precision)
    same = torch.equal(actual.cpu(), expected)
    return {"ok": same, "steps": len(actual), "waits, with those of the start": len(names)}


class _Syncs(Callback):
    """Count the waits for the device in steps without a row in metrics.csv."""

    def __init__(self, on_gpu: bool) -> None:
        self.counter, self.on_gpu, self.active, self.steps = SyncCounter(), on_gpu, False, 0
        self.counter.active = False

    def watch(self, active: bool) -> None:
        if self.on_gpu:
            torch.cuda.set_sync_debug_mode("warn" if active else "default")
        self.counter.active = active

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
        # The first steps allocate, record the graph and load libraries.
        active = trainer.global_step >= 5 and not pl_module.has_row(trainer.global_step + 1)
        self.steps += active
        self.watch(active)

    def on_validation_start(self, *_: Any, **__: Any) -> None:
        self.watch(False)

    on_train_end = on_exception = on_validation_start  # type: ignore[assignment]

    @contextlib.contextmanager
    def names(self) -> Iterator[list[str]]:
        """Collect the names of operations, or on a GPU the warnings of PyTorch."""
        names = self.counter.names
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with contextlib.nullcontext() if self.on_gpu else self.counter:
                yield names
        names += [
            str(w.message) for w in caught if "synchronizing CUDA operation" in str(w.message)
        ]


def check_syncs(m: Machine) -> Values:
    """Count the waits for the device in a short training with noise."""
    syncs = _Syncs(m.on_gpu)
    kernels = [] if m.on_gpu else ["trainer.kernels=torch"]
    length = next(iter(m.sizes.values())).context_length
    budget = [f"budget.tokens={40 * 4 * length}", "data.batch_size=4", "data.noise=0.1"]
    budget.append("optimizer.warmup_steps=2")
    rows = ["trainer.log_every_n_steps=10", "trainer.n_validations=2"]
    with syncs.names() as names:
        run_in_process(m, "syncs", [*kernels, *budget, *rows], [syncs])
    return {"ok": not names, "syncs": len(names), "steps": syncs.steps, "names": names[:5]}


def check_resume(m: Machine) -> Values:
    """Compare a run that was stopped and resumed with one that was not."""
    length = next(iter(m.sizes.values())).context_length
    short = [
        f"budget.tokens={20 * 4 * length}", "data.batch_size=4", "trainer.n_validations=1",
        "optimizer.warmup_steps=2", "trainer.log_every_n_steps=1",
    ]  # fmt: skip
    whole = run_in_process(m, "whole", short)
    stopped = m.scratch / "runs/stopped"
    with contextlib.suppress(_StopError):
        run_in_process(
            m, "stopped", [*short, "callbacks.checkpoint_steps=8"], [_StopAt(12)]
        )  # fmt: skip
    train(load_config("train", [f"resume={stopped}"]))
    a, b = (_losses(folder) for folder in (whole, stopped))
    difference = max(abs(a[step] - b[step]) for step in a) if a.keys() == b.keys() else None
    ok = difference is not None and difference < 0.01
    return {"ok": ok, "steps": len(a), "largest difference of the loss": difference}


class _StopError(Exception):
    pass


class _StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step:
            raise _StopError


def _losses(folder: Path) -> dict[int, float]:
    rows = read_metrics(folder)
    return {int(row["step"]): row["train/loss"] for row in rows if "train/loss" in row}


# ---------------------------------------------------------------------------- speed


def speed(m: Machine, size: str, batch: int) -> Values:
    """Measure our step and those of the peers, in tokens per second."""
    shape, tokens = m.sizes[size], m.tokens()
    args = shape, tokens, batch, m.device
    compile, with_graphs = m.compile(), m.compile("reduce-overhead")
    candidates: dict[str, Callable[[], Step]] = {
        "ours": lambda: our_step(m, shape, batch),
        "ours compiled": lambda: our_step(m, shape, batch, compile=compile),
        "nanoGPT compiled": lambda: nanogpt_step(*args, compile),
        "transformers eager": lambda: transformers_step(*args),
        "transformers compiled": lambda: transformers_step(*args, compile),
        "nanoGPT compiled, CUDA graphs": lambda: nanogpt_step(*args, with_graphs),
        "transformers compiled, CUDA graphs": lambda: transformers_step(*args, with_graphs),
        "ours without graph": lambda: our_step(m, shape, batch, graph=False),
        "ours float32": lambda: our_step(m, shape, batch, "float32"),
    }
    values = rates_of(m, size, batch, candidates)
    rates = values["tokens per second"]
    best = max((r for name, r in rates.items() if name.startswith("ours")), default=None)
    ratios = {}
    for kind in ("eager", "compiled"):
        peers = [r for name, r in rates.items() if not name.startswith("ours") and kind in name]
        if best and peers:
            ratios[kind] = best / max(peers)
    flops = GPT(shape).flops_per_token()
    model_flops = best and best * flops / 1e12
    return {**values, "best against peers": ratios, "model TFLOP/s": model_flops}


def compile_variants(m: Machine, size: str, batch: int) -> Values:
    """Measure our step with other ways to compile it, in tokens per second."""
    step, tuned = partial(our_step, m, m.sizes[size], batch), "max-autotune-no-cudagraphs"
    candidates: dict[str, Callable[[], Step]] = {
        "ours compiled, optimizer too": lambda: step(compile=m.compile(), optimizer_too=True),
        "ours compiled, graphs of torch.compile": lambda: step(
            graph=False, compile=m.compile("reduce-overhead"), optimizer_too=True
        ),
        "ours compiled, max-autotune": lambda: step(compile=m.compile(tuned)),
    }
    return rates_of(m, size, batch, candidates)


def rates_of(
    m: Machine, size: str, batch: int, candidates: dict[str, Callable[[], Step]]
) -> Values:
    """Return speed and memory of each candidate; one that fails does not stop the others."""
    n, rates, memory, failures = batch * m.sizes[size].context_length, {}, {}, {}
    for name, make in candidates.items():
        if m.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with recorded_failure(failures, name):
            rates[name] = n / m.seconds(make())
        if m.on_gpu:
            memory[name] = torch.cuda.max_memory_allocated() / 1e6
        torch.compiler.reset()
    return {
        "size": size, "windows": batch, "tokens per second": rates, "memory MB": memory,
        "failures": failures,
    }  # fmt: skip


@contextlib.contextmanager
def recorded_failure(failures: dict[str, str], name: str) -> Iterator[None]:
    """Add an exception to `failures`; a missing package or compiler concerns one candidate."""
    try:
        yield
    except Exception as error:
        failures[name] = f"{type(error).__name__}: {error}"[:300]


def kernels_of_a_step(m: Machine, size: str, batch: int) -> Values:
    """Profile our step: its kernels, which take most of the time, and the time without a kernel."""
    step = our_step(m, m.sizes[size], batch)
    whole = 1e3 * m.seconds(step)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if m.on_gpu else []
    with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
        for _ in range(m.steps):
            step()
        m.synchronize()
    device = "CUDA" if m.on_gpu else "CPU"
    events = [e for e in profile.key_averages() if e.device_type.name == device]
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


def generation(m: Machine, size: str) -> Values:
    """Measure generated tokens per second, ours and transformers', by batch size."""
    shape, rates, failures, ratios = m.sizes[size], {}, {}, {}
    model = GPT(shape).to(m.device).eval().requires_grad_(False)
    sampling = SamplingConfig(0.8, max_tokens=m.new_tokens, seed=1, backend="torch")
    for batch in m.sequences:
        prompt = torch.ones(batch, 4, dtype=torch.long, device=m.device)
        candidates = {
            "ours": lambda p=prompt: sum(1 for _ in generate(model, p, sampling, end_of_text=-1)),
            "transformers eager": transformers_generation(m, shape, prompt),
            "transformers compiled": transformers_generation(m, shape, prompt, static=True),
        }
        names = {kind: f"{kind}, batch {batch}" for kind in candidates}
        for kind, write in candidates.items():
            with recorded_failure(failures, names[kind]):
                write()
                m.synchronize()
                start = time.perf_counter()
                write()
                m.synchronize()
                seconds = time.perf_counter() - start
                rates[names[kind]] = batch * m.new_tokens / seconds
        ours = rates.get(names.pop("ours"))
        ratios |= {name: ours / rates[name] for name in names.values() if ours and name in rates}
    return {
        "size": size, "tokens per second": rates, "ours against": ratios, "failures": failures
    }  # fmt: skip


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


# ---------------------------------------------------------------------------- trainings


def run_in_process(
    m: Machine, name: str, overrides: Sequence[str], callbacks: Sequence[Callback] = ()
) -> Path:
    """Train a short run and return its folder."""
    words = [*m.overrides, f"runs_dir={m.scratch / 'runs'}", f"name={name}", *overrides]
    return train(load_config("train", words), callbacks=callbacks).folder


def shell(command: Sequence[str], timeout: float, **environment: str) -> None:
    """Run a command; raise if it fails or takes too long."""
    result = subprocess.run(
        command, cwd=ROOT, timeout=timeout, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    if result.returncode:
        raise RuntimeError(f"{' '.join(command[1:4])} failed: {result.stdout[-800:]}")


def training(
    m: Machine, name: str, overrides: Sequence[str], timeout: float, out: Path | None = None
) -> Values:
    """Train with train.py from the shell; keep the final weights in bfloat16 in `out`.

    The process has empty caches of compiled code.
    """
    folder = m.scratch / "runs" / name
    words = [*m.overrides, f"runs_dir={folder.parent}", f"name={name}", *overrides]
    caches = {v: str(m.scratch / "compiled" / name / v) for v in COMPILE_CACHES}
    start, epoch = time.perf_counter(), time.time()
    shell([sys.executable, str(ROOT / "train.py"), *words], timeout, **caches)
    seconds = time.perf_counter() - start
    summary = read_summary(folder)
    names = (
        "steps", "tokens", "seconds", "tokens_per_second", "precision", "train/loss",
        "val/perplexity",
    )  # fmt: skip
    if out is not None:
        _keep_weights(Run.load(folder), out / f"{name}.safetensors")
    rows = [row for row in read_metrics(folder) if "val/perplexity" in row]
    validations = [
        {"tokens": row["tokens"], "perplexity": row["val/perplexity"], "seconds": time - epoch}
        for row, time in zip(rows, _validation_times(folder), strict=True)
    ]
    target = [v["seconds"] for v in validations if v["perplexity"] <= m.perplexity]
    return {
        "name": name, "overrides": list(overrides), "seconds from the shell": seconds,
        **{key: summary[key] for key in names if key in summary},
        "validations": validations,  # seconds: from the shell until the result was logged
        "perplexity to reach": m.perplexity,
        "seconds to perplexity": target[0] if target else None,
    }  # fmt: skip


def _validation_times(folder: Path) -> list[float]:
    """Return when train.log got each validation result, in seconds since the epoch."""
    lines = (folder / "train.log").read_text(encoding="utf-8").splitlines()
    stamps = [line[:23] for line in lines if "validation perplexity" in line]
    return [datetime.strptime(s, "%Y-%m-%d %H:%M:%S,%f").timestamp() for s in stamps]


def _keep_weights(run: Run, path: Path) -> None:
    from minigpt.runs.checkpoint import write_snapshot

    model, summary = run.load_model(), read_summary(run.folder)
    values = {"step": summary["steps"], "tokens": summary["tokens"]}
    write_snapshot(path, model, {"model": dataclasses.asdict(model.config)}, values)


def sharing(m: Machine, n: int, overrides: Sequence[str], timeout: float) -> Values:
    """Train `n` runs at the same time on one device; return their tokens per second in all.

    The time is from the shell to the end of the last run, because the runs do not start together.
    """
    names = [f"shared-{n}-{i}" for i in range(n)]
    start = time.perf_counter()
    with ThreadPoolExecutor(n) as pool:
        runs = [pool.submit(training, m, name, overrides, timeout) for name in names]
        tokens = sum(run.result()["tokens"] for run in runs)
    seconds = time.perf_counter() - start
    return {"runs": n, "seconds from the shell": seconds, "tokens per second": tokens / seconds}


def data_is_ready(m: Machine) -> Values:
    """Prepare the training data once, so that no training is measured with its preparation."""
    config = load_config("train", list(m.overrides))
    data = DataModule(config.data, config.model.context_length, 1, config.seed)
    start = time.perf_counter()
    data.setup()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "train_tokens": data.train.n_tokens}


def precision_of(m: Machine) -> str:
    """Return Lightning's name of the default precision."""
    return Hardware.detect(m.device.type, "1", 1, "auto").precision
