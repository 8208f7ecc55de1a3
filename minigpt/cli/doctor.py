"""Collect facts for a bug report, and advice for this machine."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
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
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")  # x86, then ARM
MIN_FREE_GB = 2.0  # the checkpoints of a large run and its prepared stories take some hundred MB


def diagnose() -> tuple[dict[str, str], list[str]]:
    """Collect the facts that a bug report needs, and advice for this machine.

    Returns:
        The facts by topic, in the order to print them, and one line of advice for each problem.
    """
    n_cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else n_cores
    quota, threads = _cpu_quota(), torch.get_num_threads()
    limit = max(1, int(min(usable, quota or usable)))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    posix = hasattr(os, "sysconf")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9 if posix else 0.0
    free = shutil.disk_usage(".").free / 1e9
    try:
        hardware = Hardware.detect("auto", "auto", 1, "auto")
        precision = f"{hardware.precision} on {hardware.accelerator}: {hardware.why}"
    except UserError as error:
        precision = f"not chosen: {error}"
    generation, advice = _generation()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minigpt"
    caches = {"data.cache_dir": Path(CACHE), "XDG_CACHE_HOME": home}  # by setting to change
    facts = {
        "minigpt": f"{minigpt.__version__}, source {source_commit()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": f"{usable} usable of {n_cores}, quota {quota or 'none'}, {threads} threads",
        "memory": f"{memory:.1f} GB",
        "gpu": ", ".join(gpus) or "none",
        "precision": precision,
        "generation": generation,
        "caches": ", ".join(f"{path} ({_megabytes(path):.1f} MB)" for path in caches.values()),
        "disk": f"{free:.1f} GB free",
    }
    checks = {  # advice, and whether it applies here
        advice: advice,
        "training in float32 is slow: a CPU with AVX512-BF16 or AMX, or a GPU, takes about half "
        "the time": precision.startswith("32-true on cpu"),
        f"{threads} threads share {limit} cores: set OMP_NUM_THREADS={limit}": threads > limit,
        "PyTorch does not see the GPU: install a build of torch for the CUDA version that "
        "nvidia-smi shows": not gpus and shutil.which("nvidia-smi"),
        "less than 2 GB of disk space is free: delete old runs and caches": free < MIN_FREE_GB,
    }
    for setting, path in caches.items():
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        writable = os.access(existing, os.W_OK)
        checks[f"{path} is not writable: set {setting} to another folder"] = not writable
    private = str(Path.home())  # it contains the user's name
    facts = {topic: fact.replace(private, "~") for topic, fact in facts.items()}
    return facts, [line.replace(private, "~") for line, applies in checks.items() if applies]


def _cpu() -> str:
    """Return the name of the CPU and the instruction sets that affect its speed."""
    path = Path("/proc/cpuinfo")  # Linux only
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    name = re.search(r"model name\s*: (.*)", text)
    flags = "".join(re.findall(r"(?:flags|Features)\s*:(.*)", text)[:1]).split()
    instructions = " ".join(flag for flag in FLAGS if flag in flags) or "instructions unknown"
    return f"{name[1] if name else platform.processor() or platform.machine()}, {instructions}"


def _cpu_quota() -> float | None:
    """Return the number of cores that the cgroup of this process may use; None means no limit."""
    for names in ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"):  # v2, then v1
        with contextlib.suppress(OSError, ValueError):  # the other version, or "max"
            text = " ".join(Path("/sys/fs/cgroup", name).read_text() for name in names)
            quota, period = map(int, text.split())
            return quota / period if quota > 0 else None
    return None


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def _generation() -> tuple[str, str]:
    """Try a tiny model; return the backend that generates text, and advice or ""."""
    model = GPT(GPTConfig(vocab_size=64, context_length=8, d_model=32, n_heads=1, n_layers=1))
    try:
        Decoder(model.eval().requires_grad_(False), [torch.zeros(1, dtype=torch.long)], "c")
    except UserError as error:
        return f"PyTorch ({error.message})", "generation is slower without decode.c: install gcc"
    command = [*(decode.compiler() or ()), "--version"]
    version = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]  # noqa: S603
    if not decode.is_threaded():
        return f"decode.c, one thread, {version}", "decode.c uses a single thread: install gcc"
    return f"decode.c, compiled by {version}", ""
