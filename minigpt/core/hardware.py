"""Detection of accelerator, devices and precision, and measurement of peak FLOP/s."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from minigpt.core.cores import THREADS, usable_cores
from minigpt.core.distributed import Launcher
from minigpt.core.files import read_json, write_json
from minigpt.core.gpu_memory import end_if_out_of_memory, is_out_of_memory
from minigpt.core.settings import UserError


@dataclass(frozen=True)
class Hardware:
    """Devices and precision of a run.

    Attributes:
        accelerator: "cpu", "cuda" or "mps".
        devices: number of devices on each node; each device has one process.
        num_nodes: number of nodes.
        precision: Lightning's name of the precision, such as "bf16-mixed".
        why: reason for this precision, for the log.
    """

    accelerator: str
    devices: int
    num_nodes: int
    precision: str
    why: str

    @property
    def world_size(self) -> int:
        """Number of processes on all nodes."""
        return self.devices * self.num_nodes

    @property
    def emulated(self) -> bool:
        """Whether the run uses bfloat16 on a CPU that emulates it.

        Emulated bfloat16 is a hundred times slower than float32.
        """
        bfloat16_on_cpu = (self.accelerator, self.precision) == ("cpu", "bf16-mixed")
        return bfloat16_on_cpu and not cpu_has_bfloat16()

    @property
    def fast_dtype(self) -> torch.dtype:
        """Dtype for models that are not in training; the precision of the run does not affect it.

        It is the dtype that `trainer.precision=auto` selects on this accelerator.
        """
        precision, _ = _find_precision("auto", self.accelerator)
        return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(
            precision, torch.float32
        )

    @classmethod
    def detect(cls, accelerator: str, devices: str, num_nodes: int, precision: str) -> Hardware:
        """Check the trainer settings on this machine, and replace "auto" with a value.

        Under torchrun or srun, the launcher determines the number of nodes, and the number of
        devices on each node. `devices` must be this number or the default, "auto". `num_nodes` must
        be the launcher's number of nodes or the default, 1.

        Args:
            accelerator: "auto", "cpu", "gpu", "cuda" or "mps".
            devices: number of devices on each node; "auto" means all CUDA GPUs, or 1 device if the
                accelerator is not CUDA.
            num_nodes: number of nodes.
            precision: Lightning's name of the precision; "auto" means the best precision for the
                device.

        Returns:
            Accelerator, devices, nodes and precision, without any "auto".

        Raises:
            UserError: this machine lacks the accelerator or has fewer devices than requested,
                several nodes are requested without torchrun or srun, or the arguments contradict
                the launcher.
        """
        present = _accelerators()
        typed, accelerator = accelerator, "cuda" if accelerator == "gpu" else accelerator
        if accelerator == "auto":
            accelerator = _best_accelerator()
        if not present.get(accelerator, True):
            problem = "PyTorch finds no such device on this machine"
            raise UserError(problem, "accelerator", typed, fix={"accelerator": "auto"})
        n_gpus = torch.cuda.device_count() if accelerator == "cuda" else 0
        n_devices = max(1, n_gpus) if devices == "auto" else int(devices)
        if (launcher := Launcher.detect()) is not None:
            _check_launched(launcher, devices, num_nodes)
            n_devices, num_nodes = launcher.devices, launcher.num_nodes
        elif num_nodes > 1:
            message = "several nodes need torchrun or srun: see docs/scaling-out.md"
            raise UserError(message, "num_nodes", num_nodes)
        if accelerator == "cuda" and n_devices > n_gpus:
            problem = f"this machine has {n_gpus} GPU(s)"
            raise UserError(problem, "devices", n_devices, fix={"devices": "auto"})
        if accelerator == "mps" and n_devices > 1:
            problem = "a Mac has one GPU, but its CPU can run several processes"
            raise UserError(problem, "devices", n_devices, {"accelerator": "cpu"})
        return cls(accelerator, n_devices, num_nodes, *_find_precision(precision, accelerator))

    @classmethod
    def single(cls, precision: str) -> Hardware:
        """Return the best device of this machine, for work that uses one device.

        Unlike in `detect`, it does not matter whether torchrun or srun started this process.

        Args:
            precision: Lightning's name of the precision, as in `detect`.
        """
        accelerator = _best_accelerator()
        return cls(accelerator, 1, 1, *_find_precision(precision, accelerator))


def _accelerators() -> dict[str, bool]:
    """Return the kinds of accelerators, the best first, and whether this machine has each."""
    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}


def _best_accelerator() -> str:
    return next((name for name, is_present in _accelerators().items() if is_present), "cpu")


def _check_launched(launcher: Launcher, devices: str, num_nodes: int) -> None:
    """Raise UserError if the settings contradict the processes that the launcher started."""
    started = f"{launcher.devices} process(es) on each of {launcher.num_nodes} node(s)"
    start = f"{launcher.name} started {started}"
    if devices not in ("auto", str(launcher.devices)):
        raise UserError(f"{start}: leave this setting out", "devices", int(devices))
    if num_nodes not in (1, launcher.num_nodes):  # 1 is the default
        raise UserError(f"{start}: leave this setting out", "num_nodes", num_nodes)


def _find_precision(setting: str, accelerator: str) -> tuple[str, str]:
    """Return the training precision and the reason for it; "auto" avoids slow bfloat16.

    Lightning does not support "16-mixed" on a CPU. There, "16-mixed" has the effect of "auto".
    """
    requested = setting, "as requested"
    if accelerator == "mps":
        return ("32-true", "the safe choice on MPS") if setting == "auto" else requested
    cpu = accelerator == "cpu"
    native = cpu_has_bfloat16() if cpu else torch.cuda.is_bf16_supported(including_emulation=False)
    device, other = ("CPU", "32-true") if cpu else ("GPU", "16-mixed")
    why = f"this {device} {'multiplies' if native else 'does not multiply'} bfloat16 natively"
    slow = cpu and native and setting in ("auto", "16-mixed") and not cpu_bfloat16_is_faster()
    if slow:
        why = "this CPU multiplies bfloat16 no faster than float32"
    if cpu and setting == "16-mixed":
        why = f"16-mixed was requested, but Lightning does not support it on a CPU, and {why}"
    if setting == "auto" or (cpu and setting == "16-mixed"):
        return "bf16-mixed" if native and not slow else other, why
    if cpu and setting == "bf16-mixed" and not native:
        return setting, f"as requested, but {why}: 32-true is a hundred times faster"
    return requested


def cpu_has_bfloat16() -> bool:
    """Return whether the CPU has AVX512-BF16 or AMX."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@functools.cache
def cpu_bfloat16_is_faster() -> bool:
    """Measure whether the CPU multiplies bfloat16 faster than float32; this takes about 20 ms.

    It is measured because the instructions do not tell: a Xeon with AVX512-BF16 whose AMX a virtual
    machine hides multiplies bfloat16 at half the speed of float32, and an EPYC with the same
    instructions at more than twice that speed.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several threads would wait for each other on a busy machine
    try:
        bfloat16, float32 = (_fastest(256, "cpu", d, 20) for d in (torch.bfloat16, torch.float32))
    finally:
        torch.set_num_threads(threads)
    return bfloat16 < float32


_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")  # x86, then ARM


def cpu_name() -> str:
    """Return the name and flags of the CPU, as a cache key for `-march=native` code."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    names = ("model name", "flags", "Features", "CPU part")
    return " ".join(sorted({line for line in lines if line.startswith(names)}))


def cpu_description() -> str:
    """Return the name of the CPU and the instruction sets that affect its speed."""
    text = cpu_name()  # on Linux: lines of /proc/cpuinfo, with the name last
    name = re.search(r"model name\s*: (.*)", text)
    instructions = " ".join(flag for flag in _CPU_FLAGS if re.search(rf"\b{flag}\b", text))
    processor = name[1] if name else platform.processor() or platform.machine()
    return f"{processor}, {instructions or 'instructions unknown'}"


def model_device() -> str:
    """Return the device for a model that is not in training: "cuda" if there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def gpu_memory_for(argument: str, value: int, at_once: int | None = None) -> Iterator[None]:
    """Raise UserError for `argument` if the GPU runs out of memory in the `with` block.

    Args:
        argument: name of the argument that sets how many sequences are computed at a time.
        value: value of this argument.
        at_once: number of sequences that are computed at a time, of which the error suggests half;
            None means `value`.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        problem = "the GPU does not have enough memory for this number of sequences (to use the "
        problem += "CPU, put CUDA_VISIBLE_DEVICES= before the command)"
        number = min(value, at_once or value)
        fix = {argument: number // 2} if number > 1 else None
        raise UserError(problem, argument, value, fix) from None


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy of a CPU tensor on `device`; the host does not wait for copies to CUDA."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def has_c_compiler() -> bool:
    """Return whether torch.compile finds a C compiler, which Triton needs on a CUDA GPU."""
    return bool(os.environ.get("CC")) or any(map(shutil.which, ("gcc", "clang")))


def has_cpp_compiler() -> bool:
    """Return whether torch.compile finds a C++ compiler, which it needs on a CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # slow to import
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def set_threads(threads: int | None, hardware: Hardware) -> None:
    """Set the number of threads of PyTorch, in this process and in those that Lightning starts.

    The environment variable OMP_NUM_THREADS gets the same value. If it were not set, Lightning
    would replace the number with its own.

    Args:
        threads: number of threads of each process. None means the value of OMP_NUM_THREADS. If this
            variable is not set, None means PyTorch's default number, limited to the process's share
            of the usable cores.
        hardware: the devices of the run; each has one process.
    """
    if threads is None:
        if os.environ.get(THREADS):
            return
        n_processes = hardware.devices if Launcher.detect() is None else 1  # srun divides the cores
        threads = min(torch.get_num_threads(), max(1, usable_cores() // n_processes))
    torch.set_num_threads(threads)
    os.environ[THREADS] = str(threads)


PEAK_FILE = "matmul_peak.json"  # in the cache_dir
_SIDE = {"cpu": 2048, "cuda": 8192, "mps": 4096}  # largest side of a matrix; suffices for the peak
_ENOUGH = 0.015  # seconds; if a product takes longer, larger matrices do not change the result
_TRIES = 7
_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": torch.float32}


def matmul_peak(hardware: Hardware, cache_dir: Path, again: bool = False) -> float:
    """Measure the peak FLOP/s of one device with products of square matrices.

    The result is the speed of the fastest of several products. On a CPU, the measurement takes 0.2
    to 0.5 s. The result is cached in `cache_dir`/matmul_peak.json for each host, device, dtype,
    matmul precision and number of threads. If the file cannot be written, each run measures again.

    Args:
        hardware: the device and the precision; the precision determines the dtype.
        cache_dir: folder of the cache.
        again: whether to measure even if there is a cached result. The higher of the two results
            is then cached and returned. A cached result is too low if the machine was busy when it
            was measured.

    Returns:
        Floating-point operations per second, where a multiply-add counts as two.
    """
    accelerator, dtype = hardware.accelerator, _DTYPES[hardware.precision]
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    name = torch.cuda.get_device_name() if accelerator == "cuda" else cpu
    tf32 = torch.get_float32_matmul_precision() if dtype == torch.float32 else ""
    parts = (
        platform.node(),
        "random",
        accelerator,
        name,
        str(dtype),
        tf32,
        str(torch.get_num_threads()),
    )
    key, path = " ".join(filter(None, parts)), cache_dir / PEAK_FILE
    try:
        peaks = {k: v for k, v in read_json(path).items() if isinstance(v, float)}
    except (OSError, ValueError, AttributeError):  # missing or damaged
        peaks = {}
    if again or key not in peaks:
        peaks[key] = max(_measure(accelerator, dtype), peaks.get(key, 0.0))
        with contextlib.suppress(OSError):  # a read-only cache: measure again next time
            cache_dir.mkdir(parents=True, exist_ok=True)
            write_json(path, peaks)
    return peaks[key]


def _measure(accelerator: str, dtype: torch.dtype) -> float:
    # Start with small matrices, because a large product of an emulated dtype may be very slow, and
    # other programs may have left little of a GPU's memory.
    side, peak = 256, 2 * 256**3 / _fastest(256, accelerator, dtype, _TRIES + 1)
    with end_if_out_of_memory():
        while side < _SIDE[accelerator] and 2 * side**3 / peak < _ENOUGH:
            side *= 2
            peak = max(peak, 2 * side**3 / _fastest(side, accelerator, dtype, _TRIES + 1))
    return peak


def _fastest(side: int, accelerator: str, dtype: torch.dtype, tries: int) -> float:
    """Compute `tries` matrix products, and return the seconds that the fastest product took.

    The first product is a warm-up and does not count.
    """
    # Random numbers: a GPU multiplies constants at a higher clock. A generator of its own does not
    # change the random numbers of the training.
    generator = torch.Generator(accelerator).manual_seed(0)
    a = torch.randn((side, side), generator=generator, device=accelerator).to(dtype)
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        torch.mm(a, a)
        if accelerator != "cpu":
            getattr(torch, accelerator).synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
