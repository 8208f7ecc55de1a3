"""Check and measure training and generation on one GPU within a fixed number of minutes.

    python benchmarks/gpu.py --minutes 2 --out gpu-smoke    # the checks, and the first speeds
    python benchmarks/gpu.py --minutes 9 --out gpu-results  # the measurements and the trainings
    python benchmarks/gpu_table.py gpu-results/gpu.json     # a table and a figure

The parts run in the order of their value. After each one, gpu.json in the output folder is replaced
atomically. A part that does not fit into the time that is left is listed in `not_run`; a part that
raises an exception has `error`. At the end of the time the program stops, whatever it is doing.
`--device cpu` runs the same code with tiny numbers, which only shows that it works. The weights of
the trainings are written next to gpu.json, in bfloat16. No network is needed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import gpu_checks as checks  # noqa: E402
from benchmarks import gpu_measures as measures  # noqa: E402
from benchmarks import gpu_trainings as trainings  # noqa: E402
from benchmarks.gpu_measures import Machine, Values  # noqa: E402
from minigpt.core.files import write_json  # noqa: E402
from minigpt.core.hardware import cpu_description  # noqa: E402
from minigpt.model import GPTConfig  # noqa: E402
from minigpt.runs.provenance import source_commit  # noqa: E402


@dataclass(frozen=True)
class Part:
    """One check or measurement, and the seconds that it takes at most on a fast GPU."""

    name: str
    seconds: float
    function: Callable[[], Values]


@dataclass
class Report:
    """The content of gpu.json, which is written after every change."""

    path: Path
    content: dict[str, Any]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def set(self, key: str, value: Any) -> None:
        """Set an entry and write the file."""
        with self.lock:
            self.content[key] = value
            write_json(self.path, self.content)

    def add(self, name: str, values: Values) -> None:
        """Add a result and write the file."""
        self.set("results", {**self.content["results"], name: values})


# ---------------------------------------------------------------------------- machines


def gpu_machine(scratch: Path) -> Machine:
    """Return the sizes of the models of the README, for one CUDA GPU."""
    widths = {"small": 128, "medium": 256, "large": 384}
    sizes = {name: GPTConfig(3000, 256, d, 5, d // 32, 2 * d, 0.0) for name, d in widths.items()}
    return Machine(
        torch.device("cuda"), scratch, sizes, batches=(128, 16), rounds=5, steps=20,
        precisions=("float32", "bfloat16", "float16"),
        overrides=("trainer.accelerator=cuda", "trainer.devices=1"),
        side=8192, sequences=(1, 256, 1024), new_tokens=200, shared=(1, 8, 4, 2), perplexity=5.87,
    )  # fmt: skip


def cpu_machine(scratch: Path) -> Machine:
    """Return tiny sizes, with which the script takes seconds on a CPU."""
    shape = GPTConfig(280, 16, d_model=16, n_layers=1, n_heads=2, d_ff=32)
    names = ("Tom", "Lily", "Max", "Anna")
    scratch.mkdir(parents=True, exist_ok=True)
    for split, ends in (("train", ("happy", "sad", "tired", "kind")), ("valid", ("good",))):
        stories = [
            f"One day, {a} met {b}. {a} was {c}." for a in names for b in names for c in ends
        ]
        text = "\n<|endoftext|>\n".join(stories)
        (scratch / f"{split}.txt").write_text(text, encoding="utf-8")
    overrides = (
        "trainer.accelerator=cpu", "data=text", f"data.train_files=[{scratch / 'train.txt'}]",
        f"data.valid_files=[{scratch / 'valid.txt'}]", f"data.cache_dir={scratch / 'cache'}",
        "data.vocab_size=280", "model.context_length=16", "model.d_model=16", "model.n_layers=1",
        "model.n_heads=2", "model.d_ff=32", "optimizer.warmup_steps=2", "callbacks=quiet",
    )  # fmt: skip
    return Machine(
        torch.device("cpu"), scratch, {"medium": shape}, batches=(4, 2), rounds=1, steps=2,
        precisions=("float32", "bfloat16"), overrides=overrides, side=64, sequences=(1, 3),
        new_tokens=6, shared=(1, 2), perplexity=1e9,
    )  # fmt: skip


# ---------------------------------------------------------------------------- the plan


def plan(m: Machine, out: Path, left: Callable[[], float]) -> list[Part]:
    """Return all parts, the most valuable first."""
    parts = [
        Part("machine", 5, lambda: measures.describe(m)),
        Part("data", 15, lambda: trainings.data_is_ready(m)),
        Part("check batches", 5, lambda: checks.check_batches(m)),
        Part("check gradients", 25, lambda: checks.check_gradients(m)),
        Part("check syncs", 20, lambda: checks.check_syncs(m)),
        Part("check generation", 10, lambda: checks.check_generation(m)),
        Part("check resume", 20, lambda: checks.check_resume(m)),
    ]
    for batch in m.batches:
        name = f"speed medium {batch}"
        parts.append(Part(name, 110, lambda batch=batch: measures.speed(m, "medium", batch)))

    def training(name: str, seconds: float, *overrides: str, keep: bool = True) -> None:
        def run() -> Values:
            return trainings.training(m, name, overrides, left(), out if keep else None)

        parts.append(Part(f"training {name}", seconds, run))

    budgets = {
        "medium": 104e6, "large": 60e6, "student": 60e6, "small": 60e6, "precision": 10e6,
        "shared": 20e6,
    }  # fmt: skip
    many, few = ["data.batch_size=128", "optimizer.warmup_tokens=1e6"], ["data.batch_size=8"]
    if not m.on_gpu:
        budgets, many, few = (
            dict.fromkeys(budgets, 640),
            ["data.batch_size=4"],
            ["data.batch_size=4"],
        )
    sizes = {name: [f"model={name}"] if m.on_gpu else [] for name in ("small", "medium", "large")}
    b = {name: f"budget.tokens={budget:.0f}" for name, budget in budgets.items()}
    medium = [*sizes["medium"], *many, b["medium"]]
    training("medium", 75, *medium)
    for windows in m.batches:
        parts.append(
            Part(
                f"kernels medium {windows}", 10,
                lambda n=windows: measures.kernels_of_a_step(m, "medium", n),
            )
        )  # fmt: skip
    training("large", 60, *sizes["large"], *many, b["large"])
    teacher = f"teacher.runs=[{m.scratch / 'runs/large'}]"
    training("student", 45, *sizes["small"], *many, b["student"], teacher)
    for precision in ("32-true", "bf16-mixed", "16-mixed") if m.on_gpu else ("32-true",):
        words = [*sizes["large"], *few, b["precision"], f"trainer.precision={precision}"]
        training(f"large-{precision}", 35, *words, keep=False)
    parts.append(Part("generation", 30, lambda: measures.generation(m, "medium")))
    compiled = ["trainer.compile=true"] if m.on_gpu else []
    training("medium-compiled", 90, *medium, *compiled, keep=False)
    small = [*sizes["small"], *few, b["shared"]]
    for n in m.shared:
        parts.append(Part(f"sharing {n}", 60, lambda n=n: trainings.sharing(m, n, small, left())))
    training("small", 40, *sizes["small"], *many, b["small"])
    for windows in m.batches:
        parts.append(
            Part(
                f"compile variants medium {windows}", 120,
                lambda n=windows: measures.compile_variants(m, "medium", n),
            )
        )  # fmt: skip
    return parts


def run(minutes: float, device: str, out: Path, names: list[str] | None = None) -> dict[str, Any]:
    """Run the parts that fit into the time, and return the content of gpu.json.

    Args:
        minutes: time for everything.
        device: "cuda" or "cpu".
        out: folder of the results.
        names: names of the parts to run; None means all.
    """
    end = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {cpu_description()}"
    head = {"measured_on": name, "date": time.strftime("%Y-%m-%d"), "commit": source_commit()}
    report = Report(out / "gpu.json", {**head, "minutes": minutes, "results": {}})
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")

    def left() -> float:
        return end - time.monotonic()

    def stop() -> None:
        report.set("stopped", f"after {minutes} minutes, within the part that follows the last")
        os._exit(1)

    timer = threading.Timer(60 * minutes, stop)
    timer.daemon = True
    timer.start()
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        machine = (gpu_machine if device == "cuda" else cpu_machine)(Path(folder))
        skipped = []
        for part in plan(machine, out, left):
            if names is not None and part.name not in names:
                continue
            if left() < (part.seconds if device == "cuda" else 0):
                skipped.append(part.name)
                report.set("not_run", skipped)
                continue
            start = time.monotonic()
            values = outcome(part)
            report.add(part.name, {**values, "took": round(time.monotonic() - start, 2)})
            print(f"{part.name:24} {'FAILED' if failed(values) else 'done'}", flush=True)
    timer.cancel()
    return report.content


def outcome(part: Part) -> Values:
    """Return the values of a part, or its error; the other parts run in any case."""
    try:
        return part.function()
    except Exception as error:
        lines = traceback.format_exc().strip().splitlines()
        values = {"error": f"{type(error).__name__}: {error}"[:500], "traceback": lines[-8:]}
        return values | ({"ok": False} if part.name.startswith("check") else {})


def failed(values: Values) -> bool:
    """Return whether a check does not hold or a part raised an exception."""
    return "error" in values or values.get("ok") is False


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Check and measure one GPU.")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="output folder")
    parser.add_argument("--only", nargs="*", help="names of parts, such as 'check syncs'")
    typed = parser.parse_args(arguments)
    if typed.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: PyTorch finds no CUDA GPU: try --device cpu")
    content = run(typed.minutes, typed.device, typed.out.resolve(), typed.only)
    if bad := [name for name, values in content["results"].items() if failed(values)]:
        raise SystemExit(f"error: failed: {', '.join(bad)} (see {typed.out / 'gpu.json'})")


if __name__ == "__main__":
    main()
