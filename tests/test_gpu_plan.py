"""The order of the parts of benchmarks/gpu.py, their time, and how their results are compared."""

import os
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_measures, gpu_plan, gpu_table, gpu_trainings
from minigpt.model import GPT
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Return the parts of a run on a GPU by name, in their order."""
    folder = tmp_path_factory.mktemp("plan")
    plan = gpu_plan.plan(gpu_plan.gpu_machine(folder), folder, lambda: 540.0)
    return {part.name: part for part in plan}


def test_gpu_plan_fits_the_documented_nine_minutes(parts):
    text = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    assert "benchmarks/gpu.py --minutes 9 " in text
    seconds = accumulate(part.seconds for part in parts.values())
    ends = dict(zip(parts, seconds, strict=True))
    assert max(ends["sharing 1"], ends["sharing 8"]) <= 9 * 60


def test_gpu_plan_has_the_order_of_the_values(parts):
    order = [
        "machine", "check batches", "check resume", "speed medium 128", "speed medium 16",
        "training medium", "training large", "training student", "training small",
        "training large-32-true", "training large-16-mixed", "generation 1", "generation 256",
        "sharing 1", "sharing 8", "generation 1024", "training medium-compiled", "sharing 4",
        "sharing 2", "speed medium 128: ours without graph", "kernels medium 128",
    ]  # fmt: skip
    names = list(parts)
    firsts = [
        next(i for i, name in enumerate(names) if name == start or name.startswith(f"{start}:"))
        for start in order
    ]
    assert firsts == sorted(firsts)
    assert names[-2:] == ["kernels medium 128", "kernels medium 16"]  # a profiler stays attached


def test_gpu_plan_measures_each_peer_at_its_best_before_the_trainings(parts):
    names = list(parts)
    peers = [name for name in gpu_measures.CANDIDATES if not name.startswith("ours")]
    assert sum("CUDA graphs" in name for name in peers) == 2
    last = max(names.index(f"speed medium {n}: {peer}") for n in (128, 16) for peer in peers)
    assert last < names.index("training medium")


def test_gpu_results_are_at_most_eight_files_of_16_mb(tmp_path, monkeypatch):
    kept = []

    def training(m, name, overrides, timeout, out):
        kept.extend([name] if out is not None else [])
        return {}

    monkeypatch.setattr(gpu_trainings, "training", training)
    machine = gpu_plan.gpu_machine(tmp_path)
    for part in gpu_plan.plan(machine, tmp_path, lambda: 540.0):
        if part.name.startswith("training"):
            part.function()
    assert set(kept) == {"medium", "large", "student", "small"}
    assert len(kept) + len(["gpu.json", "gpu.png"]) <= 8
    sizes = [2 * GPT(shape).n_parameters for shape in machine.sizes.values()]
    assert max(sizes) + 100_000 <= 16e6  # with a header


def test_gpu_table_ratios_name_the_best_program_and_the_best_peer():
    speeds = {
        "ours": 5.0, "ours compiled": 6.0, "nanoGPT compiled": 2.0,
        "nanoGPT compiled, CUDA graphs": 3.0, "transformers eager": 1.0,
    }  # fmt: skip
    results = {f"speed medium 16: {n}": {"tokens per second": v} for n, v in speeds.items()}
    eager, compiled = gpu_table.ratios(results)
    assert (eager[1], compiled[1]) == (6.0, 2.0)
    assert eager[0].startswith("speed medium 16: ours compiled, ")
    assert eager[0].endswith(", transformers eager")
    assert compiled[0].endswith(", nanoGPT compiled, CUDA graphs")


WORKER = """
import json, os, sys
path = sys.argv[sys.argv.index("--out") + 1] + "/gpu.json"
content = json.load(open(path))
results = content["results"]
content["starts"] = content.get("starts", 0) + 1
if {adds}:
    results["second" if "first" in results else "first"] = {{"value": 1}}
content["finished"] = "second" in results
open(path + ".new", "w").write(json.dumps(content))
os.replace(path + ".new", path)
os.abort()
"""


@pytest.mark.parametrize(
    ("adds", "names", "starts"), [(True, ["first", "second"], 2), (False, ["start"], 1)]
)
def test_gpu_benchmark_goes_on_after_a_crash_between_parts(
    adds, names, starts, tmp_path, monkeypatch
):
    (tmp_path / "worker.py").write_text(WORKER.format(adds=adds), encoding="utf-8")
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "worker.py"))
    content = gpu.run(2, "cuda", tmp_path)
    assert list(content["results"]) == names
    assert content["starts"] == starts
    assert any(map(gpu.failed, content["results"].values())) is not adds


@pytest.mark.filterwarnings("ignore:.*CUDA.*")  # there is no GPU to profile
def test_gpu_profile_without_kernels_is_an_error(tmp_path, monkeypatch):
    class Machine(gpu_measures.Machine):
        on_gpu = True  # type: ignore[assignment]

        def synchronize(self) -> None:
            pass

    machine = Machine(**vars(gpu_plan.cpu_machine(tmp_path)))
    monkeypatch.setattr(gpu_measures, "our_step", lambda *_: lambda: torch.ones(2) + 1)
    with pytest.raises(RuntimeError, match="CUPTI"):
        gpu_measures.kernels_of_a_step(machine, "medium", 2)


def test_gpu_generation_is_the_median_of_three_runs_after_two(tmp_path, monkeypatch):
    machine = gpu_plan.cpu_machine(tmp_path)
    clock, durations = [0.0], iter([100.0, 50.0, 1.0, 7.0, 2.0])  # the first two are warm-ups

    def generate(*_, **__):
        clock[0] += next(durations)
        return iter(())

    monkeypatch.setattr(gpu_measures, "generate", generate)
    monkeypatch.setattr(gpu_measures.time, "perf_counter", lambda: clock[0])
    values = gpu_measures.generation(machine, "medium", 3, "ours")
    assert values["tokens per second"] == pytest.approx(3 * machine.new_tokens / 2.0)
    assert next(durations, None) is None


def test_gpu_plan_gives_each_part_a_minute(parts):
    limits = {name: part.limit for name, part in parts.items()}
    assert limits["machine"] == limits["check batches"] == 60
    assert limits["training medium"] == 3 * parts["training medium"].seconds


@pytest.mark.parametrize("fails", [True, False])
def test_gpu_benchmark_repeats_the_machine_only_after_an_error(fails, tmp_path, monkeypatch):
    values = {"copy GB/s": 3000.0, "bfloat16 TFLOP/s": 800.0}
    answers = iter([{"error": "was stopped"} if fails else values, values])
    describe = lambda _: next(answers)  # noqa: E731
    monkeypatch.setattr(gpu_measures, "describe", describe)
    names = [name for name in gpu.part_names("cpu") if name.startswith("machine")]
    content = gpu.run(1, "cpu", tmp_path, names)
    assert ("machine again" in content["results"]) is fails
    assert "not_run" not in content
    assert "800 TFLOP/s" in gpu_table.device(content)


def test_gpu_table_says_that_the_machine_was_not_measured():
    content = {"measured_on": "GPU X", "results": {"machine": {"error": "was stopped"}}}
    names = gpu_table.device(content).split(", ")
    assert [name.split()[0] for name in names] == ["GPU", "copy", "bfloat16"]
    assert not any(character.isdigit() for character in names[1])


# A supervisor, whose worker has a training; both do nothing.
SUPERVISOR = """
import os, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())],
                          start_new_session=True, env=dict(os.environ))
time.sleep(600)
"""
IDLE_WORKER = """
import os, subprocess, sys, threading, time
from benchmarks.gpu import end_with
training = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
end = time.time() + {seconds}
print(os.getpid(), training.pid, flush=True)
threading.Thread(target=end_with, args=(int(sys.argv[1]), end, 0.1), daemon=True).start()
time.sleep(600)
"""


@pytest.mark.long
@pytest.mark.parametrize("killed", [True, False], ids=["supervisor killed", "time over"])
def test_gpu_worker_and_its_training_end_with_the_supervisor_or_the_time(killed):
    worker = IDLE_WORKER.format(seconds=600 if killed else 0)
    command = [sys.executable, "-c", SUPERVISOR, worker]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as supervisor:
        try:
            assert supervisor.stdout is not None
            processes = [int(word) for word in supervisor.stdout.readline().split()]
            assert len(processes) == 2
            if killed:
                supervisor.kill()
            patience = time.monotonic() + 60
            while any(map(is_running, processes)) and time.monotonic() < patience:
                time.sleep(0.1)
            assert not any(map(is_running, processes))
        finally:
            supervisor.kill()


def is_running(process: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        os.kill(process, 0)
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except (ProcessLookupError, FileNotFoundError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("second_seed", [True, False])
def test_gpu_table_has_the_difference_of_two_seeds(second_seed):
    common = {
        "tokens_per_second": 1.0, "seconds from the shell": 1.0, "seconds to perplexity": None,
        "perplexity to reach": 5.87, "val/perplexity": 6.0, "median tokens per second": 2.0,
    }  # fmt: skip
    losses = {"32-true": 1.8, "bf16-mixed": 1.8125} | ({"32-true-2": 1.81} if second_seed else {})
    results = {
        f"training large-{name}": {"val/loss": loss, **common} for name, loss in losses.items()
    }
    rows = gpu_table.table({"measured_on": "GPU X", "results": results}).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    here = [
        cell for cell in cells if cell[0].startswith("training large-32-true-2: validation loss")
    ]
    elsewhere = [cell for cell in cells if "LOG.md" in cell[2]]
    assert [cell[1] for cell in here] == (["+0.0100"] if second_seed else [])
    assert len(elsewhere) == (not second_seed)
    assert not any("GPU X" in cell[2] for cell in elsewhere)


@pytest.mark.parametrize(
    ("perplexities", "numbers"),
    [([7.0, 6.0, 5.8, 5.7], ["30.0", "20.0"]), ([5.8, 5.7], ["10.0"]), ([7.0, 6.0], [])],
)
def test_gpu_table_has_the_validations_around_the_crossing(perplexities, numbers):
    validations = [
        {"perplexity": value, "seconds": 10.0 * (i + 1)} for i, value in enumerate(perplexities)
    ]
    reached = [v["seconds"] for v in validations if v["perplexity"] <= 5.87]
    values = {"seconds to perplexity": reached[0] if reached else None, "validations": validations}
    words = gpu_table.crossing(values).replace(",", "").split()
    assert [word for word in words if word[0].isdigit()] == numbers
