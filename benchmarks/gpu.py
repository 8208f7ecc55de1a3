"""Check and measure training and generation on one GPU within a fixed number of minutes.

    python benchmarks/gpu.py --minutes 2 --out gpu-smoke    # the checks, and the first speeds
    python benchmarks/gpu.py --minutes 9 --out gpu-results  # the measurements and the trainings
    python benchmarks/gpu_table.py gpu-results/gpu.json     # a table and a figure

A gpu.json in the output folder is never replaced by a whole run; `--only NAME ...` runs the parts
with these names and keeps the other results in it.

The parts run in the order of their value, in a process of their own. After each one, gpu.json in
the output folder is replaced atomically. A part that does not fit into the time that is left, or
needs another part that has not succeeded, is listed in `not_run`. A part that fails, crashes or
takes three times as long as expected, and more than a minute, has `error`. If CUDA may be unusable
after it, as after a failed recording of a CUDA graph, a new process runs the other parts. At the
end of the time the program stops.

`--device cpu` runs the same code with tiny numbers and in one process, which only shows that it
works. The weights of the trainings are written next to gpu.json, in bfloat16. No network is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.gpu_measures import Values  # noqa: E402
from benchmarks.gpu_plan import (  # noqa: E402
    Part,
    cpu_machine,
    gpu_machine,
    part_names,
    plan,
)
from minigpt.core.files import user_path, write_json  # noqa: E402
from minigpt.core.hardware import cpu_description  # noqa: E402
from minigpt.runs.provenance import source_commit  # noqa: E402


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

    def read(self) -> None:
        """Replace the content by that of the file, which another process has written."""
        with self.lock:
            self.content = json.loads(self.path.read_text(encoding="utf-8"))

    def add(self, name: str, values: Values) -> None:
        """Add a result and write the file."""
        self.set("results", {**self.content["results"], name: values})


# ---------------------------------------------------------------------------- the parts

_RESTART = 3  # exit code of a process whose CUDA may be unusable after an error
# Errors of Python, of torch.compile, of settings and of the processes that train; CUDA is usable
# after them, unless their text is about an error of CUDA.
_HARMLESS = {
    "ImportError", "ModuleNotFoundError", "InductorError", "BackendCompilerFailed", "UserError",
    "SubprocessError", "TimeoutExpired",
}  # fmt: skip
_CUDA_ERRORS = "CUDA error", "Triton Error [CUDA]"
_GRACE = 10.0  # seconds after the end in which the supervisor may stop its process


def run(minutes: float, device: str, out: Path, names: list[str] | None = None) -> dict[str, Any]:
    """Run the parts that fit into the time, and return the content of gpu.json.

    Args:
        minutes: time for everything.
        device: "cuda" or "cpu".
        out: folder of the results.
        names: names of the parts to run; None means all.
    """
    end = time.time() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    report = opened(out / "gpu.json", minutes, device, names)
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        if device == "cpu":
            work(report, end, device, Path(folder), names)
        else:
            supervise(report, end, Path(folder), names)
    return report.content


def opened(path: Path, minutes: float, device: str, names: list[str] | None) -> Report:
    """Return the report of a call that runs the parts `names`; None means all.

    If the file exists, the results of its other parts are kept, with their date and commit.

    Raises:
        SystemExit: the file exists, but all parts are to run or its results are of another device.
    """
    head = {"date": time.strftime("%Y-%m-%d"), "commit": source_commit(), "minutes": minutes}
    if not path.exists():
        return Report(path, {**head, "results": {}})
    if names is None:
        problem = f"error: {path} exists: choose another folder with --out, or repeat some of its "
        raise SystemExit(problem + "parts with --only")
    earlier = json.loads(path.read_text(encoding="utf-8"))
    source = {key: earlier[key] for key in ("date", "commit")}
    repeated = {*names, "start"}  # "start" is the error of a process that ran no part
    results = {k: {**source, **v} for k, v in earlier["results"].items() if k not in repeated}
    if results and earlier["measured_on"] != (name := device_name(device)):
        problem = f"error: {path} was measured on {earlier['measured_on']}, but this is {name}: "
        raise SystemExit(problem + "choose another folder with --out")
    not_run = [name for name in earlier.get("not_run", []) if name not in repeated]
    return Report(path, {**earlier, **head, "results": results, "not_run": not_run})


def device_name(device: str) -> str:
    """Return the name of the device that is measured."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {cpu_description()}"


def supervise(report: Report, end: float, scratch: Path, names: list[str] | None) -> None:
    """Run `work` in a process, and start another one whenever it hangs, crashes or asks for it.

    If a process crashes without a new result, no other one is started.
    """
    if not report.content["results"]:
        report.set("measured_on", "a GPU that was not reached")
    command = [sys.executable, str(Path(__file__).resolve()), "--out", str(report.path.parent)]
    command += ["--worker", str(os.getpid()), str(end), str(scratch)]
    command += ["--only", *names] if names else []
    code: int | None = _RESTART
    while code:
        before = _n_done(report)
        report.set("running", None)
        report.set("finished", False)
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        problem = None
        try:
            while problem is None and process.poll() is None:
                time.sleep(0.5)
                report.read()
                running = report.content["running"] or {"until": end}
                if time.time() > end:
                    problem = "was stopped at the end of the time"
                elif time.time() > running["until"]:
                    problem = "was stopped because it took too long"
        finally:  # also at Ctrl-C
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its trainings, too
        code = process.wait()
        report.read()
        if report.content["finished"]:  # a crash at the exit loses no result
            return
        running, crashed = report.content["running"], code not in (0, _RESTART)
        if crashed and running:
            report.add(running["name"], {"error": problem or f"the process ended with code {code}"})
        stuck = crashed and _n_done(report) == before  # another process would end in the same way
        if stuck:
            report.add("start", {"error": problem or f"the process ended with code {code}"})
        if time.time() > end:
            report.set("stopped", f"after {report.content['minutes']:g} minutes")
        if stuck or time.time() > end:
            return


def end_with(parent: int, end: float, interval: float = 1.0) -> None:
    """End this process and those that it has started when the supervisor ends, or at `end`.

    To be run in a background thread of a process that leads a process group.

    Args:
        parent: process id of the supervisor.
        end: time in seconds since the epoch. The supervisor normally stops this process earlier.
        interval: seconds between two looks.
    """
    while os.getppid() == parent and time.time() < end:
        time.sleep(interval)
    os.killpg(os.getpid(), signal.SIGKILL)


def _n_done(report: Report) -> int:
    """Return how many parts have a result or are listed in `not_run`."""
    return len(report.content["results"]) + len(report.content.get("not_run", []))


def work(report: Report, end: float, device: str, scratch: Path, names: list[str] | None) -> int:
    """Run the parts that have no result yet; return 0, or _RESTART if CUDA may be unusable."""

    def left() -> float:
        return end - time.time()

    on_gpu = device == "cuda"
    report.set("measured_on", device_name(device))
    torch.set_float32_matmul_precision("high" if on_gpu else "highest")
    machine = (gpu_machine if on_gpu else cpu_machine)(scratch)
    for part in plan(machine, report.path.parent, left):
        results, not_run = report.content["results"], report.content.get("not_run", [])
        if part.name in (*results, *not_run) or (names is not None and part.name not in names):
            continue
        if part.repeats and "error" not in results.get(part.repeats, {}):
            continue
        if left() < (part.seconds if on_gpu else 0) or not is_ready(part, results, names):
            report.set("not_run", [*not_run, part.name])
            continue
        start = time.time()
        report.set("running", {"name": part.name, "until": start + part.limit})
        values = outcome(part)
        report.content["running"] = None
        report.add(part.name, {**values, "took": round(time.time() - start, 2)})
        print(f"{part.name:24} {'FAILED' if failed(values) else 'done'}", flush=True)
        if "error" in values:
            if on_gpu and needs_restart(values):
                return _RESTART
            gc.collect()  # the error may still hold the tensors of the part
    report.set("finished", True)
    return 0


def is_ready(part: Part, results: dict[str, Values], names: list[str] | None) -> bool:
    """Return whether the part that `part` needs, if any, has run in this call without error."""
    if part.needs is None:
        return True
    in_this_call = names is None or part.needs in names  # the files of earlier calls are deleted
    return in_this_call and "error" not in results.get(part.needs, {"error": "no result"})


def needs_restart(values: Values) -> bool:
    """Return whether CUDA may be unusable after a part that ended with an error."""
    text = str(values)
    harmless = values["error"].partition(":")[0] in _HARMLESS
    return not harmless or any(error in text for error in _CUDA_ERRORS)


def outcome(part: Part) -> Values:
    """Return the values of a part, or its error; the other parts run in any case."""
    try:
        return part.function()
    except Exception as error:
        lines = traceback.format_exc().strip().splitlines()
        values = {"error": f"{type(error).__name__}: {error}"[:500], "traceback": lines[-8:]}
        first: BaseException = error
        while (earlier := first.__cause__ or first.__context__) is not None:
            first = earlier
        if first is not error:  # such as what has ended the recording of a graph
            values["cause"] = traceback.format_exception(first)[-3:]
        return values | ({"ok": False} if part.name.startswith("check") else {})


def failed(values: Values) -> bool:
    """Return whether a check does not hold or a part raised an exception."""
    return "error" in values or values.get("ok") is False


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Check and measure one GPU.")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=user_path, default=Path("gpu-results"), help="output folder")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME",
        help="names of parts, such as 'check syncs'; other results in --out are kept",
    )  # fmt: skip
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    typed = parser.parse_args(arguments)
    out = typed.out.resolve()
    if typed.worker:
        report = Report(out / "gpu.json", {})
        report.read()
        parent, end, scratch = int(typed.worker[0]), float(typed.worker[1]), Path(typed.worker[2])
        threading.Thread(target=end_with, args=(parent, end + _GRACE), daemon=True).start()
        raise SystemExit(work(report, end, "cuda", scratch, typed.only))
    if typed.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: PyTorch finds no CUDA GPU: try --device cpu")
    known = part_names(typed.device)
    if unknown := [name for name in typed.only or () if name not in known]:
        raise SystemExit(f"error: no part is called {unknown[0]!r}; the parts are: {known}")
    results = run(typed.minutes, typed.device, out, typed.only)["results"]
    ran = [name for name in results if typed.only is None or name in (*typed.only, "start")]
    if bad := [name for name in ran if failed(results[name])]:
        raise SystemExit(f"error: failed: {', '.join(bad)} (see {typed.out / 'gpu.json'})")


if __name__ == "__main__":
    main()
