"""The parts of benchmarks/ that depend on the system; `make bench` runs the benchmarks."""

import importlib
import io
import json
import multiprocessing
import runpy
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from minigpt.cli.compose import load_config
from minigpt.model import GPT, GPTConfig
from minigpt.training.loop import train
from tests.conftest import ROOT

training = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks/training.py")))


@pytest.mark.parametrize(("platform", "megabytes"), [("linux", 2048.0), ("darwin", 2.0)])
def test_peak_memory_is_in_megabytes_on_every_system(platform, megabytes, monkeypatch):
    usage = SimpleNamespace(ru_maxrss=2_000_000)
    resource = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: usage)
    monkeypatch.setitem(sys.modules, "resource", resource)
    monkeypatch.setattr(sys, "platform", platform)
    assert training.peak_memory() == megabytes


def test_worker_measures_steps_without_the_resource_module(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    training.worker("peak", 8, 1, 1, "float32")
    answer = json.loads(capsys.readouterr().out)
    assert answer["seconds"] > 0
    assert answer["memory_mb"] is None


def test_cost_of_a_teacher_is_written_to_a_file_of_its_own(monkeypatch, tmp_path):
    class Steps(SimpleNamespace):
        def __init__(self, kind: str, *shape: object) -> None:
            super().__init__(median={"muon": 2.0, "taught": 2.5}[kind])

    names = training.main.__globals__
    monkeypatch.setitem(names, "Candidate", Steps)
    monkeypatch.setitem(names, "measure", lambda candidates, rounds: None)
    out = tmp_path / "results"
    monkeypatch.setattr(sys, "argv", ["training.py", "--teacher", "--sweep", "--out", str(out)])
    training.main()
    (path,) = out.iterdir()
    table = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == "teacher.json"
    assert table.keys() >= {"date", "machine"}
    ratios = {name: value for name, value in table.items() if name not in ("date", "machine")}
    sizes = ("small", "medium", "large")
    assert ratios == {f"step with a teacher, {size}": 1.25 for size in sizes}


def test_generation_leaves_out_missing_and_failing_engines(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    generation = importlib.import_module("generation")

    def fail(*_: object) -> None:
        raise RuntimeError("unsupported\nmodel")

    def half_a_second() -> int:
        time.sleep(0.5)
        return 10

    def work(*_: object) -> dict[str, object]:
        return {"an engine": half_a_second}

    monkeypatch.setattr(generation, "PROGRAMS", {"a": (work, {}), "b": (fail, {})})
    ours, end = multiprocessing.Pipe()
    generation.serve("b", tmp_path, 1, end)
    assert ours.recv() == "RuntimeError: unsupported"
    ours.send("an engine")
    ours.send(None)
    generation.serve("a", tmp_path, 1, end)
    assert ours.recv() == ["an engine"]
    assert 10 < ours.recv() <= 20  # tokens per second

    monkeypatch.setattr(generation, "PROGRAMS", {"llama.cpp": (work, {"no_module": "a-package"})})
    assert generation.start_programs(tmp_path, 1) == {}
    (line,) = capsys.readouterr().out.splitlines()
    assert "llama.cpp" in line
    assert "a-package" in line

    monkeypatch.setattr(generation, "PROGRAMS", {"CTranslate2": (work, {})})
    monkeypatch.setattr(generation, "serve", print)  # the process ends without an answer
    assert generation.start_programs(tmp_path, 1) == {}
    assert "CTranslate2" in capsys.readouterr().out
    rate = "tokens per second, {} float32 batch 1"
    table = generation.speed_table({rate.format("ours"): 5000.4, rate.format("llama.cpp"): 1.0})
    assert table.splitlines()[2:] == [
        "| ours, float32 | 5,000 | – |",
        "| llama.cpp, float32 | 1 | – |",
    ]


@pytest.fixture(scope="module")
def gpu_results(tmp_path_factory):
    """Return the folder of a run of benchmarks/gpu.py on a CPU, with trainings in this process."""
    from benchmarks import gpu, gpu_trainings

    one_at_a_time = threading.Lock()

    def shell(command, timeout, **environment):
        assert command[1].endswith("train.py")
        with one_at_a_time:
            train(load_config("train", command[2:]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_trainings, "shell", shell)
        out = tmp_path_factory.mktemp("gpu")
        gpu.main(["--minutes", "60", "--device", "cpu", "--out", str(out)])
    return out


# torch.compile itself instantiates the autograd function of the loss, and reads gradients.
COMPILES = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)


@COMPILES
@pytest.mark.long
def test_gpu_benchmark_runs_every_part_on_a_cpu(gpu_results):
    from benchmarks import gpu_measures

    content = json.loads((gpu_results / "gpu.json").read_text(encoding="utf-8"))
    assert content["measured_on"].startswith("CPU")
    results = content["results"]
    checks = {name: values for name, values in results.items() if name.startswith("check")}
    assert len(checks) == 5
    assert all(values["ok"] for values in checks.values())
    assert results["check syncs"]["syncs"] == 0
    assert results["check syncs"]["syncs by precision"] == {"bf16-mixed": 0, "32-true": 0}
    assert results["check syncs"]["steps"] > 40
    assert not any("error" in values for values in results.values())
    for windows in (4, 2):
        for name in (*gpu_measures.CANDIDATES, *gpu_measures.MORE_CANDIDATES):
            assert results[f"speed medium {windows}: {name}"]["tokens per second"] > 0
        assert results[f"kernels medium {windows}"]["kernels per step"] > 0
    for name in ("medium", "medium-compiled", "student"):
        values = results[f"training {name}"]
        assert values["val/perplexity"] > 1
        assert values["median tokens per second"] > 0
        assert values["windows"] == 4
        assert 0 < values["seconds to perplexity"] < values["seconds from the shell"]
    assert results["sharing 2"]["tokens per second"] > 0
    for batch in (1, 3):
        for name in gpu_measures.WRITERS:
            assert results[f"generation {batch}: {name}"]["tokens per second"] > 0
    assert "not_run" not in content
    weights = {path.stem: path for path in gpu_results.glob("*.safetensors")}
    assert set(weights) == {"small", "medium", "large", "student"}
    for path in weights.values():
        with safe_open(path, "pt") as file:
            hyper_parameters = json.loads(file.metadata()["hyper_parameters"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        expected = GPT(GPTConfig(**hyper_parameters["model"])).n_parameters
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert sum(tensor.numel() for tensor in tensors.values()) == expected


@COMPILES
@pytest.mark.long
def test_gpu_table_and_figure_name_the_device(gpu_results, capsys):
    from benchmarks import gpu_table

    gpu_table.main([str(gpu_results / "gpu.json")])
    rows = capsys.readouterr().out.splitlines()
    for measure in (
        "training medium: tokens/s", "perplexity", "best compiled peer", "2 runs at once",
        "generation 3: ours, relative to the best eager peer, transformers eager", "bare step",
        "speed medium 2: ours compiled, max-autotune", "sharing 2", "launches per step",
        "training large-bf16-mixed: speed relative to 32-true",
    ):  # fmt: skip
        assert any(measure in row and "| CPU" in row and "GB/s" in row for row in rows), measure
    assert (gpu_results / "gpu.png").stat().st_size > 1000


@pytest.mark.parametrize(("windows", "expected"), [(128, {"0.960", "0.800"}), (16, set())])
def test_gpu_table_compares_a_training_with_the_step_of_its_batch(windows, expected):
    from benchmarks import gpu_table

    failed = 128 if windows == 16 else 16
    results = {
        "speed medium 16: ours": {"tokens per second": 10.0},
        "speed medium 128: ours": {"tokens per second": 100.0},
        f"speed medium {failed}: ours": {"error": "x"},
        "training medium": {
            "windows": 128, "tokens_per_second": 80.0, "median tokens per second": 96.0,
            "seconds from the shell": 1.0, "seconds to perplexity": None,
            "perplexity to reach": 5.87, "val/perplexity": 6.0,
        },
    }  # fmt: skip
    rows = gpu_table.measures({"measured_on": "GPU", "results": results})
    assert {value for name, value in rows if "bare step" in name} == expected
    values = {value for name, value in rows if name.startswith("training medium: tokens/s")}
    assert values == {"80", "96"}


def test_gpu_table_compares_precisions_with_float32():
    from benchmarks import gpu_table

    common = {
        "tokens_per_second": 1.0, "seconds from the shell": 1.0, "seconds to perplexity": None,
        "perplexity to reach": 5.87, "val/perplexity": 6.0,
    }  # fmt: skip
    results = {
        f"training large-{precision}": {"median tokens per second": speed, "val/loss": loss}
        | common
        for precision, speed, loss in [
            ("16-mixed", 30.0, 1.79), ("32-true", 20.0, 1.8), ("bf16-mixed", 50.0, 1.8125)
        ]
    }  # fmt: skip
    rows = dict(gpu_table.measures({"measured_on": "GPU", "results": results}))
    relative = {name: value for name, value in rows.items() if "32-true" in name.partition(": ")[2]}
    assert list(relative.values()) == ["1.50×", "-0.0100", "2.50×", "+0.0125"]
    assert all("16-mixed" in name for name in relative)
    results["training large-32-true"] = {"error": "x"}
    rows = dict(gpu_table.measures({"measured_on": "GPU", "results": results}))
    assert not any("relative" in name for name in rows)


def test_gpu_benchmark_compares_precisions_with_equal_batches_and_tokens(tmp_path, monkeypatch):
    from benchmarks import gpu, gpu_trainings

    words = {}

    def training(m, name, overrides, limit, out):
        differing = ("trainer.precision=", "seed=")
        words[name] = {word for word in overrides if not word.startswith(differing)}
        return {}

    monkeypatch.setattr(gpu_trainings, "training", training)
    for part in gpu.plan(gpu.gpu_machine(tmp_path), tmp_path, lambda: 60.0):
        if part.name.startswith("training large-"):
            part.function()
    names = ("32-true", "bf16-mixed", "16-mixed", "32-true-2")
    assert set(words) == {f"large-{name}" for name in names}
    expected = {"model=large", "data.batch_size=16", "budget.tokens=10000000"}
    assert all(expected <= overrides for overrides in words.values())
    assert len(set(map(frozenset, words.values()))) == 1


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_gpu_check_of_syncs_needs_none_in_each_precision(precision, tmp_path, monkeypatch):
    from benchmarks import gpu, gpu_checks

    def run_in_process(m, name, overrides, callbacks):
        if f"trainer.precision={precision}" in overrides:
            callbacks[0].counter.names.append("item")

    monkeypatch.setattr(gpu_checks, "run_in_process", run_in_process)
    values = gpu_checks.check_syncs(gpu.cpu_machine(tmp_path))
    assert values["ok"] is False
    assert values["syncs by precision"] == {"bf16-mixed": 0, "32-true": 0} | {precision: 1}
    assert values["names"] == ["item"]


def test_gpu_benchmark_reports_the_error_of_a_part_and_runs_the_others():
    from benchmarks import gpu

    values = gpu.outcome(gpu.Part("check x", 0, lambda: 1 / 0))  # type: ignore[arg-type]
    assert values["ok"] is False
    assert "ZeroDivisionError" in values["error"]


@pytest.mark.parametrize(
    ("name", "message", "restarts"),
    [
        ("ImportError", "transformers", False),
        ("InductorError", "RuntimeError: Failed to find C compiler", False),
        ("BackendCompilerFailed", "backend='inductor' raised", False),
        ("UserError", "the GPU does not have enough memory", False),
        ("TimeoutExpired", "train.py", False),
        ("InductorError", "AcceleratorError: CUDA error: misaligned address", True),
        ("AcceleratorError", "CUDA error: an illegal memory access was encountered", True),
        ("RuntimeError", "recording has ended", True),
    ],
)
def test_gpu_benchmark_restarts_only_if_cuda_may_be_unusable(
    name, message, restarts, tmp_path, monkeypatch
):
    from benchmarks import gpu

    def fail():
        raise type(name, (Exception,), {})(message)

    parts = [gpu.Part("fails", 0, fail), gpu.Part("last", 0, lambda: {})]
    monkeypatch.setattr(gpu, "plan", lambda *_: parts)
    monkeypatch.setattr(gpu, "device_name", lambda _: "GPU")
    monkeypatch.setattr(gpu.torch, "set_float32_matmul_precision", lambda _: None)
    report = gpu.Report(tmp_path / "gpu.json", {"results": {}})
    code = gpu.work(report, time.time() + 60, "cuda", tmp_path, None)
    assert (code != 0) is restarts
    assert ("last" in report.content["results"]) is not restarts
    assert name in report.content["results"]["fails"]["error"]


def test_gpu_benchmark_names_the_first_error_of_a_chain():
    from benchmarks import gpu

    def record():
        try:
            raise RuntimeError("wait within the recording")
        finally:
            raise RuntimeError("recording has ended")

    values = gpu.outcome(gpu.Part("speed x", 0, record))
    assert "recording has ended" in values["error"]
    assert "wait within the recording" in "".join(values["cause"])


def test_gpu_benchmark_lists_what_does_not_fit_into_the_time(tmp_path, monkeypatch):
    from benchmarks import gpu

    content = gpu.run(-1, "cpu", tmp_path)
    assert {"machine", "check syncs", "training medium"} <= set(content["not_run"])
    assert content["results"] == {}


def test_gpu_benchmark_trains_no_student_without_its_teacher(tmp_path):
    from benchmarks import gpu

    content = gpu.run(1, "cpu", tmp_path, ["training student"])
    assert content["not_run"] == ["training student"]
    assert content["results"] == {}


@pytest.mark.parametrize("teacher_fails", [True, False])
def test_gpu_benchmark_runs_a_part_if_what_it_needs_has_succeeded(
    teacher_fails, tmp_path, monkeypatch
):
    from benchmarks import gpu

    teacher = gpu.Part("teacher", 0, lambda: {"value": 1 / (0 if teacher_fails else 1)})
    student = gpu.Part("student", 0, lambda: {}, needs="teacher")
    monkeypatch.setattr(gpu, "plan", lambda *_: [teacher, student])
    content = gpu.run(1, "cpu", tmp_path)
    assert content.get("not_run", []) == (["student"] if teacher_fails else [])
    assert ("student" in content["results"]) is not teacher_fails


def test_gpu_benchmark_refuses_unknown_parts(tmp_path):
    from benchmarks import gpu

    with pytest.raises(SystemExit, match="check sync"):
        gpu.main(["--device", "cpu", "--out", str(tmp_path), "--only", "check sync"])
    assert not (tmp_path / "gpu.json").exists()


@pytest.fixture
def earlier_results(tmp_path):
    """Return the path of a gpu.json of a CPU, with a failed part and one that was not run."""
    from benchmarks import gpu

    content = {
        "date": "2026-01-01", "commit": "abc", "minutes": 9, "running": None,
        "measured_on": gpu.device_name("cpu"), "not_run": ["check syncs", "training small"],
        "results": {
            "check batches": {"ok": False, "error": "x"}, "check resume": {"ok": False},
            "machine": {"copy GB/s": 1.0}, "start": {"error": "x"},
        },
    }  # fmt: skip
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_gpu_benchmark_with_only_keeps_the_other_results(earlier_results):
    from benchmarks import gpu

    out = str(earlier_results.parent)
    gpu.main(["--device", "cpu", "--out", out, "--only", "check batches"])
    content = json.loads(earlier_results.read_text(encoding="utf-8"))
    source = {"date": "2026-01-01", "commit": "abc"}
    results = content["results"]
    assert results["check batches"]["ok"]
    assert results["check resume"] == {"ok": False, **source}
    assert results["machine"] == {"copy GB/s": 1.0, **source}
    assert set(results) == {"machine", "check resume", "check batches"}
    assert content["not_run"] == ["check syncs", "training small"]
    assert content["date"] != "2026-01-01"


def test_gpu_benchmark_with_only_takes_no_teacher_of_an_earlier_call(earlier_results):
    from benchmarks import gpu

    content = json.loads(earlier_results.read_text(encoding="utf-8"))
    content["results"]["training large"] = {"tokens": 1}
    earlier_results.write_text(json.dumps(content), encoding="utf-8")
    content = gpu.run(1, "cpu", earlier_results.parent, ["training student"])
    assert "training student" in content["not_run"]
    assert "training large" in content["results"]


@pytest.mark.parametrize(
    ("device", "arguments", "named"),
    [("cpu", [], "--out"), ("GPU X", ["--only", "check batches"], "GPU X")],
)
def test_gpu_benchmark_refuses_to_mix_or_replace_results(
    device, arguments, named, earlier_results, monkeypatch
):
    from benchmarks import gpu

    before = earlier_results.read_bytes()
    monkeypatch.setattr(gpu, "device_name", lambda _: device)
    with pytest.raises(SystemExit, match=named) as error:
        gpu.main(["--device", "cpu", "--out", str(earlier_results.parent), *arguments])
    assert "\n" not in str(error.value)
    assert earlier_results.read_bytes() == before


def test_gpu_benchmark_with_only_needs_a_name(tmp_path):
    from benchmarks import gpu

    with pytest.raises(SystemExit) as error:
        gpu.main(["--device", "cpu", "--out", str(tmp_path), "--only"])
    assert error.value.code == 2


WORKER = """
import json, os, sys, time
path = sys.argv[sys.argv.index("--out") + 1] + "/gpu.json"
content = json.load(open(path))
def put(**values):
    content.update(values)
    open(path + ".new", "w").write(json.dumps(content))
    os.replace(path + ".new", path)
done = content["results"]
time.sleep(1)  # imports
if "hangs" not in done:
    put(running={"name": "hangs", "until": time.time() + 1})
    time.sleep(60)
elif "crashes" not in done:
    put(running={"name": "crashes", "until": time.time() + 60})
    os.abort()
elif "fails" not in done:
    put(running=None, results={**done, "fails": {"error": "x"}})
    sys.exit(3)
put(running=None, results={**done, "last": {"ok": True}})
"""


@pytest.mark.long
def test_gpu_benchmark_survives_parts_that_hang_crash_or_fail(tmp_path, monkeypatch):
    from benchmarks import gpu

    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "worker.py"))
    content = gpu.run(1, "cuda", tmp_path)
    results = content["results"]
    assert list(results) == ["hangs", "crashes", "fails", "last"]
    assert [gpu.failed(values) for values in results.values()] == [True, True, True, False]
    assert "stopped" not in content
    content = gpu.run(0.02, "cuda", tmp_path / "short")
    assert "stopped" in content


@pytest.mark.long
def test_gpu_benchmark_with_only_keeps_results_beside_a_worker(
    earlier_results, tmp_path, monkeypatch
):
    from benchmarks import gpu

    device, content = gpu.device_name("cpu"), json.loads(earlier_results.read_text("utf-8"))
    names = {"hangs", "crashes", "fails"}  # the worker then runs only "last"
    content["results"] = {name: {"ok": name in names} for name in (*names, "last")}
    earlier_results.write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "worker.py"))
    monkeypatch.setattr(gpu, "device_name", lambda _: device)
    content = gpu.run(1, "cuda", tmp_path, ["last"])
    assert set(content["results"]) == {*names, "last"}
    assert all(values["ok"] for values in content["results"].values())
    assert content["measured_on"] == device
