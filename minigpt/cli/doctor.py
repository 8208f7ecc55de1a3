"""Collect facts for a bug report, and advice on what could be better on this machine."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
from importlib import metadata
from pathlib import Path

import torch

import minigpt
from minigpt.core.hardware import Hardware
from minigpt.core.settings import UserError
from minigpt.data.config import CACHE
from minigpt.generation.decoder import Decoder, decode
from minigpt.model import GPT, GPTConfig
from minigpt.runs.provenance import source_commit

PACKAGES = ("torch", "lightning", "hydra-core", "omegaconf", "tokenizers", "numpy", "wandb")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")  # of x86, then of ARM


def diagnose() -> tuple[dict[str, str], list[str]]:
    """Collect what a bug report needs.

    Returns:
        The facts by topic, in the order to print them, and one line for each thing that could be
        better, with what to do about it.
    """
    n_cores, threads, quota = os.cpu_count() or 1, torch.get_num_threads(), _cpu_quota()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else n_cores
    limit = max(1, int(min(usable, quota or usable)))
    gpus = ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    sysconf = getattr(os, "sysconf", lambda _: 0)  # Windows has none
    free = shutil.disk_usage(".").free / 1e9
    try:
        hardware = Hardware.detect("auto", "auto", 1, "auto")
        precision = f"{hardware.precision} on {hardware.accelerator}: {hardware.why}"
    except UserError as error:
        precision = f"not chosen: {error}"
    generation, private = _generation(), str(Path.home())  # the latter holds the user's name
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minigpt"
    caches = {"data.cache_dir": Path(CACHE), "XDG_CACHE_HOME": home}  # by what moves them
    facts = {
        "minigpt": f"{minigpt.__version__}, source {source_commit()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": f"{usable} usable of {n_cores}, quota {quota or 'none'}, {threads} threads",
        "memory": f"{sysconf('SC_PHYS_PAGES') * sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB",
        "gpu": gpus or "none",
        "precision": precision,
        "generation": generation,
        "caches": ", ".join(f"{path} ({_megabytes(path):.1f} MB)" for path in caches.values()),
        "disk": f"{free:.1f} GB free",
    }
    checks = {  # what could be better, and whether that applies here
        "generation is slower without decode.c: install gcc": generation.startswith("PyTorch"),
        "decode.c has one thread: install gcc": "one thread" in generation,
        "training in float32 is slow: a CPU with AVX512-BF16 or AMX, or a GPU, takes about half "
        "the time": precision.startswith("32-true on cpu"),
        f"{threads} threads share {limit} cores: set OMP_NUM_THREADS={limit}": threads > limit,
        "PyTorch does not see the GPU: install a build of torch for the CUDA version that "
        "nvidia-smi shows": not gpus and shutil.which("nvidia-smi"),
        "less than 2 GB of the disk are free: delete old runs and caches": free < 2,
    }
    for setting, path in caches.items():
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        writable = os.access(existing, os.W_OK)
        checks[f"{path} is not writable: set {setting} to another folder"] = not writable
    facts = {topic: fact.replace(private, "~") for topic, fact in facts.items()}
    return facts, [line.replace(private, "~") for line, applies in checks.items() if applies]


def _cpu() -> str:
    """Return the name of the CPU and the instruction sets that decide its speed."""
    text = decode.cpu_name()  # on Linux lines of /proc/cpuinfo, the name last
    name = re.search(r"model name\s*: (.*)", text)
    instructions = " ".join(flag for flag in FLAGS if re.search(rf"\b{flag}\b", text))
    processor = name[1] if name else platform.processor() or platform.machine()
    return f"{processor}, {instructions or 'instructions unknown'}"


def _cpu_quota() -> float | None:
    """Return how many cores the cgroup of this process may use; None without a limit."""
    for names in ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"):  # v2, then v1
        with contextlib.suppress(OSError, ValueError):  # the other version, or "max"
            text = " ".join(Path("/sys/fs/cgroup", name).read_text() for name in names)
            quota, period = map(int, text.split())
            return quota / period if quota > 0 else None
    return None


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def _generation() -> str:
    """Return what generates text here, tried with a tiny model."""
    model = GPT(GPTConfig(vocab_size=64, context_length=8, d_model=32, n_heads=1, n_layers=1))
    try:
        Decoder(model.eval().requires_grad_(False), [torch.zeros(1, dtype=torch.long)], "c")
    except UserError as error:
        return f"PyTorch ({error.message})"
    version = decode.run([*(decode.compiler() or ()), "--version"]).partition("\n")[0]
    return f"decode.c{'' if decode.is_threaded() else ', one thread,'} by {version}"
