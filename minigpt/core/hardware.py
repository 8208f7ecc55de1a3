"""What this machine computes on: accelerator, devices and the precision that suits them."""

from __future__ import annotations

import contextlib
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from minigpt.core.distributed import Launcher
from minigpt.core.files import write_json
from minigpt.core.settings import UserError


@dataclass(frozen=True)
class Hardware:
    """What a run computes on, and how precisely."""

    accelerator: str  # cpu, cuda or mps
    devices: int
    num_nodes: int
    precision: str
    why: str  # this precision

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.devices * self.num_nodes

    @property
    def emulated(self) -> bool:
        """Whether this machine only emulates the precision: on a CPU, a hundred times slower."""
        bfloat16_on_cpu = (self.accelerator, self.precision) == ("cpu", "bf16-mixed")
        return bfloat16_on_cpu and not cpu_has_bfloat16()

    @classmethod
    def detect(cls, accelerator: str, devices: str, num_nodes: int, precision: str) -> Hardware:
        """What was asked for, and the best this machine has where that is `auto`.

        Under torchrun or srun the processes are there already, one for each device.

        Raises:
            UserError: this machine has no such accelerator, or not so many; another number of
                devices or nodes than the launcher started processes for.
        """
        present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        asked, accelerator = accelerator, "cuda" if accelerator == "gpu" else accelerator
        if accelerator == "auto":
            accelerator = next((name for name, there in present.items() if there), "cpu")
        if not present.get(accelerator, True):
            raise UserError("this machine has none", "accelerator", asked)
        n_gpus = torch.cuda.device_count() if accelerator == "cuda" else 0
        n_devices = max(1, n_gpus) if devices == "auto" else int(devices)
        launcher = Launcher.detect()
        if launcher is not None:
            _check_launched(launcher, devices, num_nodes)
            n_devices, num_nodes = launcher.devices, launcher.num_nodes
        elif num_nodes > 1:
            message = (
                "start the processes of several nodes by torchrun or srun: docs/scaling-out.md"
            )
            raise UserError(message, "num_nodes", num_nodes)
        if accelerator == "cuda" and n_devices > n_gpus:
            raise UserError(f"this machine has {n_gpus} GPUs", "devices", n_devices)
        if accelerator == "mps" and n_devices > 1:
            fix = {"accelerator": "cpu"}
            raise UserError(
                "a Mac has one GPU; for processes on its CPU", "devices", n_devices, fix
            )
        return cls(accelerator, n_devices, num_nodes, *_find_precision(precision, accelerator))


def _check_launched(launcher: Launcher, devices: str, num_nodes: int) -> None:
    """What was typed must not contradict the processes that are there; 1 node is the default."""
    start = f"{launcher.name} started {launcher.devices} processes on {launcher.num_nodes} nodes"
    if devices not in ("auto", str(launcher.devices)):
        raise UserError(f"{start}: leave it out", "devices", int(devices))
    if num_nodes not in (1, launcher.num_nodes):
        raise UserError(f"{start}: leave it out", "num_nodes", num_nodes)


def _find_precision(wanted: str, accelerator: str) -> tuple[str, str]:
    """The precision to train in, and why. bfloat16 that is emulated would take minutes a step."""
    if accelerator == "mps":
        safe = "32-true", "the safe choice on MPS"
        return safe if wanted == "auto" else (wanted, "as requested")
    cpu = accelerator == "cpu"
    native = cpu_has_bfloat16() if cpu else torch.cuda.is_bf16_supported(including_emulation=False)
    device, other = ("CPU", "32-true") if cpu else ("GPU", "16-mixed")
    why = f"this {device} {'multiplies' if native else 'does not multiply'} bfloat16 natively"
    if wanted == "auto":
        return "bf16-mixed" if native else other, why
    if cpu and wanted == "16-mixed":
        why = f"16-mixed was requested: on CPU autocast has bfloat16 alone, and {why}"
        return "bf16-mixed" if native else other, why
    if cpu and wanted == "bf16-mixed" and not native:
        return wanted, f"as requested, but {why}: 32-true is a hundred times faster"
    return wanted, "as requested"


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has AVX512-BF16 or AMX; torch has no public question for it."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = {k: v for k, v in content.items() if isinstance(v, float)}
    except (OSError, ValueError, AttributeError):  # never measured, or damaged
        known = {}
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
