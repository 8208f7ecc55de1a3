"""Collect facts for a bug report, and give advice for this machine."""

from __future__ import annotations

import os
import platform
import re
import shutil
from importlib import metadata
from pathlib import Path

import torch

import minigpt
from minigpt.core.cores import allowed_cores, cpu_quota, usable_cores
from minigpt.core.hardware import Hardware, cpu_description
from minigpt.core.settings import UserError
from minigpt.data.config import CACHE
from minigpt.generation.decoder import Decoder, decode
from minigpt.model import GPT, GPTConfig
from minigpt.runs.provenance import source_commit

PACKAGES = ("torch", "lightning", "hydra-core", "omegaconf", "tokenizers", "numpy", "wandb")


def diagnose() -> tuple[dict[str, str], list[str]]:
    """Collect the facts that a bug report needs, and advice for this machine.

    Returns:
        The facts by topic, in printing order, and a list with one line of advice for each problem.
    """
    threads, quota, limit = torch.get_num_threads(), cpu_quota(), usable_cores()
    gpus = ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    sysconf = getattr(os, "sysconf", lambda _: 0)  # missing on Windows
    free = shutil.disk_usage(".").free / 1e9
    try:
        hardware = Hardware.detect("auto", "auto", 1, "auto")
        precision = f"{hardware.precision} on {hardware.accelerator}: {hardware.why}"
    except UserError as error:
        precision = f"not chosen: {error}"
    generation = _generation()
    private = os.path.expanduser("~")  # the path contains the user's name
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path(private, ".cache")) / "minigpt"
    caches = {"data.cache_dir": Path(CACHE), "XDG_CACHE_HOME": home}  # setting: folder
    sizes = {p: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in caches.values()}
    facts = {
        "minigpt": f"{minigpt.__version__}, source {source_commit()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        "system": platform.platform(),
        "cpu": cpu_description(),
        "cores": f"{allowed_cores()} usable of {os.cpu_count()}, quota {quota or 'none'}, "
        f"{threads} threads",
        "memory": f"{sysconf('SC_PHYS_PAGES') * sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB",
        "gpu": gpus or "none",
        "precision": precision,
        "generation": generation,
        "caches": ", ".join(f"{path} ({size / 1e6:.1f} MB)" for path, size in sizes.items()),
        "disk": f"{free:.1f} GB free",
    }
    checks = {  # advice, and whether it applies here
        "generation is slower without decode.c: install gcc": decode is not None
        and generation.startswith("PyTorch"),
        "decode.c uses a single thread: install gcc": "one thread" in generation,
        "training in float32 is slow: a CPU with fast AVX512-BF16 or AMX takes half the time, "
        "and a GPU less": precision.startswith("32-true on cpu"),
        f"{threads} threads share {limit} cores: set OMP_NUM_THREADS={limit}": threads > limit,
        "PyTorch does not see the GPU: install a build of torch for the CUDA version that "
        "nvidia-smi shows": not gpus and shutil.which("nvidia-smi"),
        # The checkpoints and the prepared stories of a large run take several hundred MB.
        "less than 2 GB of disk space is free: delete old runs and caches": free < 2,
    }
    for setting, path in caches.items():
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        writable = os.access(existing, os.W_OK)
        checks[f"{path} is not writable: set {setting} to another folder"] = not writable
    facts = {topic: _without_home(fact, private) for topic, fact in facts.items()}
    return facts, [_without_home(line, private) for line, applies in checks.items() if applies]


def _without_home(text: str, home: str) -> str:
    """Return `text` with ~ in place of the home folder at the beginning of each path."""
    return text if home == "/" else re.sub(rf"{re.escape(home)}(?![^/\s])", "~", text)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _generation() -> str:
    """Try decode.c with a tiny model, and describe the backend that generates text."""
    model = GPT(GPTConfig(vocab_size=64, context_length=8, d_model=32, n_heads=1, n_layers=1))
    try:
        Decoder(model.eval().requires_grad_(False), [torch.zeros(1, dtype=torch.long)], "c")
    except UserError as error:
        return f"PyTorch ({error.message})"
    assert decode is not None
    version = decode.run([*(decode.compiler() or ()), "--version"]).partition("\n")[0]
    return f"decode.c{'' if decode.is_threaded() else ', one thread'}, compiled by {version}"
