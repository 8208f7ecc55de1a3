"""How fast this machine multiplies matrices: what the share of peak (`mfu`) is a share of."""

from __future__ import annotations

import contextlib
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from minigpt.hardware import Hardware
from minigpt.runs import write_json

PEAK_FILE = "matmul_peak.json"  # in the cache_dir
_SIDE = {"cpu": 2048, "cuda": 8192, "mps": 4096}  # of the matrices: large enough to reach the peak
_ENOUGH = 0.015  # seconds of one product: larger matrices would tell no more
_TRIES = 7
_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": torch.float32}


def matmul_peak(hardware: Hardware, cache_dir: Path) -> float:
    """FLOP/s of one device, multiplying square matrices in the dtype that the run multiplies in.

    Measured once for each host, device, dtype and number of threads: the fastest of a few
    products, a fifth to half a second on a CPU. Kept in matmul_peak.json below `cache_dir`; delete
    it to measure again. Where nothing can be written, each run measures anew.
    """
    accelerator, dtype = hardware.accelerator, _DTYPES[hardware.precision]
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    name = torch.cuda.get_device_name() if accelerator == "cuda" else cpu
    tf32 = torch.get_float32_matmul_precision() if dtype == torch.float32 else ""
    parts = (platform.node(), accelerator, name, str(dtype), tf32, str(torch.get_num_threads()))
    key, path = " ".join(filter(None, parts)), cache_dir / PEAK_FILE
    known = _read(path)
    if key not in known:
        known[key] = _measure(accelerator, dtype)
        with contextlib.suppress(OSError):  # a cache that others share: measured again next time
            cache_dir.mkdir(parents=True, exist_ok=True)
            write_json(path, known)
    return known[key]


def _measure(accelerator: str, dtype: torch.dtype) -> float:
    # From small to large, so that a dtype the device only emulates does not take minutes.
    side = 256
    while side < _SIDE[accelerator] and _fastest(side, accelerator, dtype, 2) < _ENOUGH:
        side *= 2
    return 2 * side**3 / _fastest(side, accelerator, dtype, _TRIES + 1)


def _fastest(side: int, accelerator: str, dtype: torch.dtype, tries: int) -> float:
    """Seconds of the fastest of some products of square matrices; the first one warms up."""
    a = torch.full((side, side), 0.5, dtype=dtype, device=accelerator)
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        torch.mm(a, a)
        if accelerator != "cpu":
            getattr(torch, accelerator).synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # never measured, or damaged: it is measured (again)
        return {}
    return (
        {k: v for k, v in known.items() if isinstance(v, float)} if isinstance(known, dict) else {}
    )
