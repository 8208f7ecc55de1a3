"""Measure whole runs: start-up time of train.py, overhead over its bare step, snapshots, loss.

    python benchmarks/runs.py --out docs/results/benchmarks

- Start-up time: from the shell command to the first row of metrics.csv, which is written at the
  first step, with prepared data in the cache. `python -c "import torch, lightning"` is timed for
  comparison.
- Tokens per second of `python train.py` with everything enabled (log file, CSV logger, checkpoints,
  progress bar), in turns with its bare step in a loop with the same optimizer.
- Speed of a run of 10M tokens with twelve snapshots, relative to one without.
- Training loss of the small model after 200 steps on the bundled stories, with the CPU kernels in
  bfloat16 (float32 on a CPU without native bfloat16) and with plain PyTorch in float32, for the
  same seed and batches.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from training import ROOT, WIDTHS, Candidate, measure, precisions, shape_of, write_json

from minigpt.core.files import user_path

STEPS, LAST = 200, 20  # steps of a run; number of last steps to average


def train(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, "train.py", f"runs_dir={folder}", "name=bench", *overrides]


# ---------------------------------------------------------------------------- start-up


def start_up(rounds: int) -> dict[str, float]:
    """Return median start-up times; the first round fills the caches and is not counted."""
    imports, first_steps = [], []
    for turn in range(rounds + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch, lightning"], check=True)
        import_seconds = time.perf_counter() - start
        step_seconds = _seconds_to_first_step()
        if turn > 0:
            imports.append(import_seconds)
            first_steps.append(step_seconds)
    return {
        "seconds, import torch and lightning": statistics.median(imports),
        "seconds, train.py to its first step": statistics.median(first_steps),
        "start-up against the imports": statistics.median(first_steps) / statistics.median(imports),
    }


def _seconds_to_first_step() -> float:
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "bench/metrics.csv"
        start = time.perf_counter()
        process = subprocess.Popen(
            train(Path(folder), "trainer.log_every_n_steps=1"),
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            while not (metrics.is_file() and metrics.read_bytes().count(b"\n") > 1):
                if process.poll() is not None:
                    raise RuntimeError("train.py ended before its first step")
                time.sleep(0.005)
            return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()


# ---------------------------------------------------------------------------- speed


def against_bare_step(rounds: int) -> dict[str, float]:
    """Return tokens per second of `rounds` runs of 24 steps, each followed by nine bare steps."""
    bare, logged = Candidate("muon", 256, 32, 256, precisions()[-1]), []
    for _ in range(3):
        bare.step(keep=False)
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            command = train(
                Path(folder), "model=medium", "data.batch_size=32", f"budget.tokens={8192 * 24}",
                "optimizer.warmup_steps=2", "trainer.n_validations=1",
                "trainer.log_every_n_steps=4",
            )  # fmt: skip
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            with (Path(folder) / "bench/metrics.csv").open(encoding="utf-8") as file:
                rates = [row["tokens_per_second"] for row in csv.DictReader(file)]
        logged += [float(rate) for rate in rates[1:] if rate]  # the first rows warm up
        for _ in range(9):
            bare.step()
    bare.process.communicate("")
    whole = statistics.median(logged)
    return {
        "tokens per second, bare step, medium, batch 32": bare.tokens_per_second,
        "tokens per second, train.py": whole,
        "train.py against the bare step": whole / bare.tokens_per_second,
    }


def with_snapshots(rounds: int) -> dict[str, float]:
    """Return the speed of a run of 10M tokens with twelve snapshots, relative to one without.

    It follows from the median times of a step and of a snapshot: twelve snapshots take less time
    than the difference between two equal runs.
    """
    from minigpt.model import GPT
    from minigpt.runs.checkpoint import write_snapshot

    speeds = {}
    for size, d_model in WIDTHS.items():
        step = Candidate("muon", d_model, 8, 256, precisions()[-1])
        measure({size: step}, 3 * rounds)
        net, writes = GPT(shape_of(d_model, 256)), list[float]()
        with tempfile.TemporaryDirectory() as folder:
            for i in range(3 * rounds):
                start = time.perf_counter()
                write_snapshot(Path(folder) / f"step-{i:06d}.safetensors", net, {}, {"step": i})
                writes.append(time.perf_counter() - start)
        run, snapshots = 10e6 / step.tokens_per_second, 12 * statistics.median(writes)
        speeds[f"speed with twelve snapshots, {size}"] = run / (run + snapshots)
    return speeds


# ---------------------------------------------------------------------------- loss


def curves() -> dict[str, float]:
    """Return the mean training loss of the last 20 of 200 steps, with and without CPU kernels."""
    fast, plain = (statistics.fmean(_losses(fast)[-LAST:]) for fast in (True, False))
    return {
        f"training loss, fast pieces, {precisions()[-1]}": fast,
        "training loss, plain pieces, float32": plain,
        "difference of the training losses": abs(fast - plain) / plain,
    }


def _losses(fast: bool) -> list[float]:
    import torch

    from minigpt.data.config import DataConfig
    from minigpt.data.datamodule import DataModule
    from minigpt.kernels.cpu import CPU
    from minigpt.kernels.microbatch import microbatched_loss
    from minigpt.model import GPT
    from minigpt.training.config import OptimizerConfig
    from minigpt.training.optim import lr_factor, make_optimizer, peak_lrs

    data = DataModule(DataConfig(batch_size=8), 256, n_steps=STEPS, seed=1)
    data.setup("fit")
    torch.manual_seed(1)
    net = GPT(shape_of(128, 256))
    loss_of = microbatched_loss(net.use(CPU)) if fast else net.loss
    config = OptimizerConfig(warmup_steps=20)
    half = fast and precisions()[-1] == "bf16"
    dtype = torch.bfloat16 if half else torch.float32
    optimizer = make_optimizer(net, config, peak_lrs(config, 128), dtype=dtype)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, STEPS, config.warmup_steps, 0.0, "linear")
    )
    losses = []
    for ids, targets in data.train_dataloader():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = loss_of(ids, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


# ---------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure start-up, overhead, snapshots and loss of whole runs."
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=user_path, help="output folder")
    arguments = parser.parse_args()
    out = arguments.out and arguments.out.resolve()
    os.chdir(ROOT)  # the data cache is there
    table: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}",
        **start_up(arguments.rounds),
        **against_bare_step(arguments.rounds),
        **with_snapshots(arguments.rounds),
        **curves(),
    }
    for name, value in table.items():
        print(f"{name:50} {value if isinstance(value, str) else f'{value:,.4f}'}")
    if out:
        write_json(out / "runs.json", table)


if __name__ == "__main__":
    main()
