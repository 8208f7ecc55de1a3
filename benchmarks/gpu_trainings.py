"""The trainings of benchmarks/gpu.py: whole runs, one at a time and several on one GPU."""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

from lightning.pytorch.callbacks import Callback

from benchmarks.gpu_measures import COMPILE_CACHES, ROOT, Machine, Values
from minigpt.cli.compose import load_config
from minigpt.core.hardware import Hardware
from minigpt.data.datamodule import DataModule
from minigpt.runs.folder import Run
from minigpt.runs.records import read_metrics, read_summary, series
from minigpt.training.loop import train


def run_in_process(
    m: Machine, name: str, overrides: Sequence[str], callbacks: Sequence[Callback] = ()
) -> Path:
    """Train a short run and return its folder."""
    words = [*m.overrides, f"runs_dir={m.scratch / 'runs'}", f"name={name}", *overrides]
    return train(load_config("train", words), callbacks=callbacks).folder


def shell(command: Sequence[str], timeout: float, **environment: str) -> None:
    """Run a command; raise if it fails or takes too long."""
    result = subprocess.run(
        command, cwd=ROOT, timeout=timeout, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    if result.returncode:
        problem = f"{' '.join(command[1:4])} failed: {result.stdout[-800:]}"
        raise subprocess.SubprocessError(problem)


def training(
    m: Machine, name: str, overrides: Sequence[str], timeout: float, out: Path | None = None
) -> Values:
    """Train with train.py from the shell; keep the final weights in bfloat16 in `out`.

    The process has empty caches of compiled code.
    """
    folder = m.scratch / "runs" / name
    words = [*m.overrides, f"runs_dir={folder.parent}", f"name={name}", *overrides]
    caches = {v: str(m.scratch / "compiled" / name / v) for v in COMPILE_CACHES}
    start, epoch = time.perf_counter(), time.time()
    shell([sys.executable, str(ROOT / "train.py"), *words], timeout, **caches)
    seconds = time.perf_counter() - start
    summary = read_summary(folder)
    names = (
        "steps", "tokens", "seconds", "tokens_per_second", "precision", "train/loss", "val/loss",
        "val/perplexity",
    )  # fmt: skip
    run, metrics = Run.load(folder), read_metrics(folder)
    if out is not None:
        _keep_weights(run, out / f"{name}.safetensors")
    rows = [row for row in metrics if "val/perplexity" in row]
    validations = [
        {"tokens": row["tokens"], "perplexity": row["val/perplexity"], "seconds": time - epoch}
        for row, time in zip(rows, _validation_times(folder), strict=True)
    ]
    target = [v["seconds"] for v in validations if v["perplexity"] <= m.perplexity]
    return {
        "name": name, "overrides": list(overrides), "seconds from the shell": seconds,
        **{key: summary[key] for key in names if key in summary},
        "windows": run.config["data"]["batch_size"],
        # Of the rows of metrics.csv, as for a step alone; the mean includes start-up and files.
        "median tokens per second": statistics.median(series(metrics, "tokens_per_second")[1]),
        "validations": validations,  # seconds: from the shell until the result was logged
        "perplexity to reach": m.perplexity,
        "seconds to perplexity": target[0] if target else None,
    }  # fmt: skip


def _validation_times(folder: Path) -> list[float]:
    """Return when train.log got each validation result, in seconds since the epoch."""
    lines = (folder / "train.log").read_text(encoding="utf-8").splitlines()
    stamps = [line[:23] for line in lines if "validation perplexity" in line]
    return [datetime.strptime(s, "%Y-%m-%d %H:%M:%S,%f").timestamp() for s in stamps]


def _keep_weights(run: Run, path: Path) -> None:
    from minigpt.runs.checkpoint import write_snapshot

    model, summary = run.load_model(), read_summary(run.folder)
    values = {"step": summary["steps"], "tokens": summary["tokens"]}
    write_snapshot(path, model, {"model": dataclasses.asdict(model.config)}, values)


def sharing(m: Machine, n: int, overrides: Sequence[str], timeout: float) -> Values:
    """Train `n` runs at the same time on one device; return their tokens per second in all.

    The time is from the shell to the end of the last run, because the runs do not start together.
    """
    names = [f"shared-{n}-{i}" for i in range(n)]
    start = time.perf_counter()
    with ThreadPoolExecutor(n) as pool:
        runs = [pool.submit(training, m, name, overrides, timeout) for name in names]
        tokens = sum(run.result()["tokens"] for run in runs)
    seconds = time.perf_counter() - start
    return {"runs": n, "seconds from the shell": seconds, "tokens per second": tokens / seconds}


def data_is_ready(m: Machine) -> Values:
    """Prepare the training data once, so that no training is measured with its preparation."""
    config = load_config("train", list(m.overrides))
    data = DataModule(config.data, config.model.context_length, 1, config.seed)
    start = time.perf_counter()
    data.setup()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "train_tokens": data.train.n_tokens}


def precision_of(m: Machine) -> str:
    """Return Lightning's name of the default precision."""
    return Hardware.detect(m.device.type, "1", 1, "auto").precision
