"""`make test-surroundings`: runs that lose their terminal, and programs that are asked to stop."""

import ctypes
import importlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from minigpt.runs.checkpoint import read_checkpoint
from minigpt.runs.names import METRICS
from minigpt.runs.records import read_summary
from tests.conftest import ROOT, tiny_overrides
from tests.killing import assert_same
from tests.processes import Training
from tests.surroundings import (
    LOST_OUTPUTS,
    Terminal,
    has_lines,
    ignore_sighup,
    seconds_until_end,
    slow_validation,
)

STEPS = 160
LIMIT = 5.0  # seconds in which a signal is answered


def overrides(folder: Path) -> list[str]:
    return [
        *tiny_overrides(folder),
        f"budget.tokens={64 * STEPS}",
        "model.dropout=0.1",
        "trainer.log_every_n_steps=3",
        "trainer.n_validations=4",
    ]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an undisturbed run: runs/whole."""
    folder = tmp_path_factory.mktemp("surroundings")
    whole = Training([*overrides(folder), "name=whole"], folder / "whole.txt")
    assert whole.wait() == 0, whole.output_text()
    return folder


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


def log_text(folder: Path) -> str:
    return (folder / "train.log").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------- lost output


@pytest.mark.parametrize("lost", LOST_OUTPUTS)
def test_run_without_output_finishes_with_the_same_weights(lost: str, workspace: Path):
    name = lost.replace(" ", "-")
    command = [*overrides(workspace), f"name={name}", "callbacks.progress_bar=true"]
    run = Training(command, workspace / "lost.txt", before=LOST_OUTPUTS[lost])
    assert run.wait() == 0
    assert_same(workspace / "runs" / name, workspace / "runs/whole")
    assert log_text(workspace / "runs" / name).count(": continuing") == 1
    assert "evaluate.py" in log_text(workspace / "runs" / name)


def test_closed_terminal_does_not_end_a_run(workspace: Path, terminal: Terminal):
    command = [*overrides(workspace), "name=closed-terminal", "callbacks.progress_bar=true"]
    run = Training(
        [*command, "trainer.n_validations=1"], workspace / "terminal.txt", {}, terminal.attach
    )
    folder = workspace / "runs/closed-terminal"
    assert run.wait_until(lambda: run.steps > 20)
    terminal.close()
    assert run.wait() == 0
    last, at_once = (
        read_checkpoint(folder / f"checkpoints/{name}.ckpt")["global_step"]
        for name in ("last", "last-1")
    )
    assert 20 < at_once < last == STEPS  # SIGHUP, then the only validation
    assert log_text(folder).count("terminal is gone") == 1
    assert read_summary(folder)["status"] == "finished"


@pytest.mark.parametrize("lost", LOST_OUTPUTS)
@pytest.mark.parametrize("verb", ["evaluate", "export", "study", "scaling", "probe"])
def test_verb_without_output_completes_its_files(
    verb: str, lost: str, workspace: Path, tmp_path: Path
):
    run, out = workspace / "runs/whole", tmp_path / "out"
    out_option = ["--out", str(out)]
    arguments = {
        "evaluate": [f"ckpt={run}", f"out={out}", "stories.n=1"],
        "export": [str(run), str(out), "--format", "safetensors"],
        "study": [str(ROOT / "releases/small"), "--n", "2", *out_option],
        "scaling": [str(run), *out_option],
        "probe": [str(run), *out_option],
    }[verb]
    files = []
    for before in (None, LOST_OUTPUTS[lost]):
        shutil.rmtree(out, ignore_errors=True)
        process = Training([verb, *arguments], tmp_path / "verb.txt", {}, before, "minigpt")
        assert process.wait() == 0, process.output_text()
        files.append({path.name: path.stat().st_size for path in out.rglob("*")})
    assert files[0].keys() == files[1].keys()


def test_generate_ends_quietly_when_its_reader_ends(workspace: Path, tmp_path: Path):
    command = ["generate", str(workspace / "runs/whole"), "--n", "100000", "--max-tokens", "3"]
    words = [sys.executable, "-m", "minigpt", *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait() != 0
    with open("/dev/full", "w") as full:
        whole = subprocess.run(
            [*words[:-4], "--n", "1"], env=environment, stdout=full, stderr=subprocess.PIPE,
            cwd=tmp_path, text=True,
        )  # fmt: skip
    assert whole.returncode == 1
    assert len(whole.stderr.splitlines()) == 1
    assert "stdout" in whole.stderr


def test_short_result_on_a_full_disk_is_an_error(tmp_path: Path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    environment["PYTHONPATH"] = str(ROOT)
    with open("/dev/full", "w") as full:
        doctor = subprocess.run(
            [sys.executable, "-m", "minigpt", "doctor"], env=environment, stdout=full,
            stderr=subprocess.PIPE, cwd=tmp_path, text=True,
        )  # fmt: skip
    assert doctor.returncode == 1
    assert len(doctor.stderr.splitlines()) == 1
    assert "stdout" in doctor.stderr


# ---------------------------------------------------------------------------- signals


def test_ctrl_c_with_a_broken_pipe_keeps_the_run(workspace: Path):
    """Like `python train.py | tee log`, where Ctrl-C also ends tee."""
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    command = [*overrides(workspace), "name=tee", "resume=auto"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "train.py", *command], cwd=ROOT, env=environment, stdout=writer,
        stderr=writer,
    )  # fmt: skip
    os.close(writer)
    folder = workspace / "runs/tee"
    while not has_lines(folder / METRICS, 4):
        assert process.poll() is None
        time.sleep(0.01)
    os.close(reader)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    step = read_checkpoint(folder / "checkpoints/last.ckpt")["global_step"]
    assert step == read_summary(folder)["steps"] < STEPS
    again = Training(command, workspace / "tee.txt")
    assert again.wait() == 0, again.output_text()
    assert_same(folder, workspace / "runs/whole")


def test_sighup_stops_a_run_whose_terminal_is_open(workspace: Path, terminal: Terminal):
    command = [*overrides(workspace), "name=hangup"]
    run = Training(command, workspace / "hangup.txt", before=terminal.attach)
    assert run.wait_until(lambda: run.steps > 20)
    run.send(signal.SIGHUP)
    assert run.wait() == 129
    folder = workspace / "runs/hangup"
    assert read_checkpoint(folder / "checkpoints/last.ckpt")["global_step"] == run.steps
    assert read_summary(folder)["status"] == "interrupted"


def test_nohup_ignores_sighup(workspace: Path):
    run = Training(
        [*overrides(workspace), "name=nohup"], workspace / "nohup.txt", before=ignore_sighup
    )
    assert run.wait_until(lambda: run.steps > 20)
    run.send(signal.SIGHUP)
    assert run.wait() == 0
    assert "SIGHUP" not in log_text(workspace / "runs/nohup")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("validation", [2, 4])  # the fourth is after the last step
def test_signal_stops_a_validation_and_the_resumed_run_repeats_it(
    number: signal.Signals, validation: int, workspace: Path
):
    name = f"{number.name}-{validation}"
    command = [*overrides(workspace), f"name={name}", "resume=auto"]
    before = partial(slow_validation, STEPS // 4 * validation)
    run = Training(command, workspace / f"{name}.txt", before=before)
    folder = workspace / "runs" / name
    assert run.wait_until(lambda: "busy" in run.output_text())
    run.send(number)
    assert seconds_until_end(run) < LIMIT
    assert run.wait() == 128 + number, run.output_text()
    last = read_checkpoint(folder / "checkpoints/last.ckpt")
    assert last["global_step"] == read_summary(folder)["steps"] == STEPS // 4 * validation
    again = Training(command, workspace / f"{name}.txt")
    assert again.wait() == 0, again.output_text()
    assert again.steps == STEPS - STEPS // 4 * validation
    assert_same(folder, workspace / "runs/whole")


def test_signal_stops_the_samples_of_a_validation(workspace: Path):
    command = [*overrides(workspace), "name=samples", "resume=auto"]
    run = Training(command, workspace / "samples.txt", before=slow_samples)
    folder = workspace / "runs/samples"
    assert run.wait_until(lambda: has_lines(folder / "samples.jsonl", 1))
    run.send(signal.SIGINT)
    assert seconds_until_end(run) < LIMIT
    assert run.wait() == 130
    again = Training(command, workspace / "samples.txt")
    assert again.wait() == 0, again.output_text()
    assert_same(folder, workspace / "runs/whole")


def slow_samples() -> None:
    from minigpt.training import callbacks

    generate = callbacks.generate_stories
    texts: list[Any] = []

    def slow(*arguments: Any) -> Any:
        if texts:
            time.sleep(60)
        texts.append(generate(*arguments))
        return texts[-1]

    callbacks.generate_stories = slow


def block_main_thread() -> None:
    """Block in native code that Python cannot interrupt, like the training of a tokenizer."""
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    print("blocked", flush=True)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def blocked_preparation() -> None:
    from minigpt.tokenizer import Tokenizer

    Tokenizer.train = classmethod(lambda *_: block_main_thread())  # type: ignore[assignment]


def blocked_step() -> None:
    from minigpt.training.module import GPTModule

    step = GPTModule.training_step

    def blocked(self: Any, *arguments: Any) -> Any:
        if self.global_step == 20:
            block_main_thread()
        return step(self, *arguments)

    GPTModule.training_step = blocked  # type: ignore[method-assign]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_a_preparation_in_native_code(
    number: signal.Signals, workspace: Path, tmp_path: Path
):
    command = [*overrides(workspace), f"data.cache_dir={tmp_path}", "name=blocked"]
    run = Training(command, tmp_path / "blocked.txt", before=blocked_preparation)
    assert run.wait_until(lambda: "blocked" in run.output_text())
    run.send(number)
    assert seconds_until_end(run) < LIMIT
    assert run.wait() == 128 + number
    assert run.output_text().split() == ["blocked", "stopped", "by", number.name]
    assert not (workspace / "runs/blocked").exists()


def test_second_ctrl_c_stops_a_run_in_native_code_at_once(workspace: Path, terminal: Terminal):
    command = [*overrides(workspace), "name=second", "callbacks.progress_bar=true"]
    before = partial(both, terminal.attach, blocked_step)
    run = Training(command, workspace / "second.txt", before=before)
    assert run.wait_until(lambda: "blocked" in terminal.text())
    terminal.press_ctrl_c()
    run.process.join(6)
    assert run.process.is_alive()  # the first one waits for the step
    terminal.press_ctrl_c()
    assert seconds_until_end(run) < 1
    assert run.wait() == 130
    assert "Traceback" not in terminal.text()


def two_processes(folder: Path, slow: str, terminal: Terminal) -> Training:
    """Start a run in two processes; `slow` says where they wait."""
    command = [
        *overrides(folder), f"name=two-{slow}", "trainer.devices=2", "trainer.strategy=ddp",
        "model.class_path=tests.slow_model.SlowGPT",
    ]  # fmt: skip
    shutil.rmtree(folder / f"runs/two-{slow}", ignore_errors=True)
    variables = {"SLOW": slow, "PYTHONPATH": str(ROOT)}
    return Training(command, folder / "two.txt", variables, terminal.attach)


def children(run: Training) -> list[Path]:
    """Return the folders in /proc of the processes that a process has started."""
    pid = run.process.pid
    return [
        Path("/proc", child)
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ]


@pytest.mark.parametrize(
    ("slow", "number", "n_presses"),
    [
        ("start", signal.SIGINT, 1),
        ("validation", signal.SIGINT, 1),
        ("validation", signal.SIGTERM, 0),  # to the first process alone
        ("no step", signal.SIGINT, 1),
        ("no step", signal.SIGTERM, 0),
        ("step", signal.SIGINT, 2),
    ],
)
def test_signal_stops_two_processes_with_one_line(
    slow: str, number: signal.Signals, n_presses: int, workspace: Path, terminal: Terminal
):
    run = two_processes(workspace, slow, terminal)
    begun = {
        "start": lambda: "peak" in terminal.text() and children(run),
        "no step": lambda: run.steps > 20,
    }
    assert run.wait_until(begun.get(slow, lambda: "busy" in terminal.text())), terminal.text()
    started = children(run)
    for _ in range(n_presses):
        terminal.press_ctrl_c()
        time.sleep(1)
    if not n_presses:
        run.send(number)
    assert seconds_until_end(run) < LIMIT
    assert run.wait() == 128 + number
    time.sleep(2)  # for the other process, and for the terminal
    text = terminal.text()
    assert "Traceback" not in text
    assert text.count(number.name) == 1 + (n_presses > 0 and slow != "start")  # when and why
    assert text.rstrip().endswith(number.name if n_presses else "tests.slow_model.SlowGPT")
    assert "error" not in text
    folder = workspace / f"runs/two-{slow}"
    assert (folder / "checkpoints/last.ckpt").is_file() == (slow in ("validation", "no step"))
    assert started
    assert not any(process.exists() for process in started)


def test_error_of_the_second_process_is_one_line(workspace: Path, terminal: Terminal):
    run = two_processes(workspace, "error", terminal)
    assert run.wait() == 2
    time.sleep(1)  # for the terminal
    errors = re.findall(r"^error: .*", terminal.text(), re.MULTILINE)
    assert len(errors) == 2  # and a line of the first process
    assert "data.batch_size=4" in errors[0]
    assert "Traceback" not in terminal.text()


def both(*functions: Callable[[], None]) -> None:
    for function in functions:
        function()


def test_ctrl_c_stops_a_download(tmp_path: Path, terminal: Terminal):
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections and is silent
        port = server.getsockname()[1]
        variables = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "NO_PROXY": "*"}
        command = ["data=tinystories", f"data.cache_dir={tmp_path}", f"runs_dir={tmp_path}/runs"]
        run = Training(command, tmp_path / "download.txt", variables, terminal.attach)
        connection, _ = server.accept()
        time.sleep(0.5)
        terminal.press_ctrl_c()
        assert seconds_until_end(run) < LIMIT
        connection.close()
    assert run.wait() == 130
    assert "Traceback" not in terminal.text()
    assert terminal.text().splitlines()[-1].endswith("stopped by SIGINT")


@pytest.mark.timeout(600)
def test_ctrl_c_stops_a_compilation(workspace: Path, tmp_path: Path, terminal: Terminal):
    command = [*overrides(workspace), "name=compiled", "trainer.compile=true"]
    cache = tmp_path / "inductor"
    variables = {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    run = Training(command, tmp_path / "compiled.txt", variables, terminal.attach)
    assert run.wait_until(lambda: "kernels" in terminal.text())
    before = len(list(cache.rglob("*.cpp")))  # from the detection of the CPU
    assert run.wait_until(lambda: len(list(cache.rglob("*.cpp"))) > before)
    terminal.press_ctrl_c()
    assert seconds_until_end(run) < LIMIT
    assert run.wait() == 130
    assert read_summary(workspace / "runs/compiled")["steps"] == 0
    assert "Traceback" not in terminal.text()


@pytest.mark.parametrize("verb", ["evaluate", "export", "study", "generate", "probe", "scaling"])
def test_ctrl_c_ends_a_verb_with_one_line(
    verb: str, workspace: Path, tmp_path: Path, terminal: Terminal
):
    run, out = workspace / "runs/whole", tmp_path / "out"
    arguments = {
        "evaluate": [f"ckpt={run}", f"out={out}", "stories.n=100000"],
        "export": [str(run), str(out), "--format", "safetensors"],
        "study": [str(run), "--n", "100000", "--out", str(out)],
        "generate": [str(run), "--n", "100000"],
        "probe": [str(run), "--out", str(out)],
        "scaling": [str(run), "--out", str(out)],
    }[verb]
    before = partial(both, terminal.attach, slow_files)
    process = Training([verb, *arguments], tmp_path / "verb.txt", {}, before, "minigpt")
    assert process.wait_until(lambda: "busy" in terminal.text())
    terminal.press_ctrl_c()
    assert seconds_until_end(process) < LIMIT
    assert process.wait() == 130
    after = terminal.text().partition("^C")[2].split()
    assert after[-3:] == ["stopped", "by", "SIGINT"]
    assert "Traceback" not in terminal.text()


def slow_files() -> None:
    """Wait where a model is loaded or a record is read."""
    from minigpt.runs import folder
    from minigpt.scaling import results

    def slow(*_: Any) -> None:
        print("busy", flush=True)
        time.sleep(60)

    folder.Run.load_model = slow  # type: ignore[method-assign]
    results.read_summary = slow  # type: ignore[assignment]


def test_ctrl_c_stops_the_playground_with_a_client(workspace: Path, terminal: Terminal):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = ["playground", str(workspace / "runs/whole"), "--port", str(port)]
    output = workspace / "playground.txt"
    process = Training(command, output, {"NO_PROXY": "*"}, terminal.attach, "minigpt")
    assert process.wait_until(lambda: "Ctrl-C" in terminal.text())
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    url = f"http://127.0.0.1:{port}/gradio_api/heartbeat/abc"
    with opener.open(url, timeout=60):  # a connection that stays open
        terminal.press_ctrl_c()
        assert seconds_until_end(process) < LIMIT
    assert process.wait() == 130
    assert terminal.text().partition("^C")[2].split() == ["stopped", "by", "SIGINT"]


# ---------------------------------------------------------------------------- sweeps


def test_stopped_sweep_prints_the_command_that_continues_it(tmp_path: Path, terminal: Terminal):
    command = [
        *tiny_overrides(tmp_path), "budget.tokens=2560", "seed=1,2,3", "name=null",
        "trainer.log_every_n_steps=1", "-m",
    ]  # fmt: skip
    sweep = Training(command, tmp_path / "sweep.txt", before=terminal.attach)
    runs = tmp_path / "runs"
    assert sweep.wait_until(lambda: any(has_lines(p, 5) for p in runs.glob("*/*-1/metrics.csv")))
    terminal.press_ctrl_c()
    assert sweep.wait() == 130
    assert "Traceback" not in terminal.text()
    (line,) = [line for line in terminal.text().splitlines() if line.startswith("sweep:")]
    words = shlex.split(line.partition(":")[2])
    assert [Path(word).name for word in words[:2]] == ["python", "train.py"]
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/*-0/summary.json")}
    again = Training(words[2:], tmp_path / "again.txt")
    assert again.wait() == 0, again.output_text()
    summaries = sorted(runs.glob("*/*/summary.json"))
    assert len(summaries) == 3
    assert {read_summary(path.parent)["status"] for path in summaries} == {"finished"}
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert "resume" not in words


LAUNCHERS = {"ray": ("ray", "init"), "submitit_slurm": ("submitit", "AutoExecutor")}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_stopped_sweep_of_a_cluster_prints_the_command_that_continues_it(
    launcher: str, tmp_path: Path, terminal: Terminal
):
    pytest.importorskip(LAUNCHERS[launcher][0])
    words = [*tiny_overrides(tmp_path), "seed=1,2", f"hydra/launcher={launcher}", "-m"]
    before = partial(both, terminal.attach, partial(wait_for_jobs, *LAUNCHERS[launcher]))
    sweep = Training(words, tmp_path / "sweep.txt", before=before)
    assert sweep.wait_until(lambda: "busy" in terminal.text())
    terminal.press_ctrl_c()
    assert seconds_until_end(sweep) < LIMIT
    assert sweep.wait() == 130
    time.sleep(1)  # for the terminal
    assert "Traceback" not in terminal.text()
    (line,) = re.findall(r"sweep:\s+(.*)", terminal.text())
    (folder,) = (tmp_path / "runs").iterdir()
    assert set(words) | {f"hydra.sweep.dir={folder}"} == set(shlex.split(line)[2:])
    assert ("scancel" in terminal.text()) == (launcher == "submitit_slurm")


def wait_for_jobs(package: str, name: str) -> None:
    """Replace a function that a launcher calls: it only waits, as for jobs on a cluster."""

    def wait(*_: Any, **__: Any) -> None:
        print("busy", flush=True)
        time.sleep(60)

    setattr(importlib.import_module(package), name, wait)
