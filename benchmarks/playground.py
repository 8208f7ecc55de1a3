"""Measure the playground: the time from the slider "Age" to the first words of a story, and the
speed of a training while a page polls it.

    python benchmarks/playground.py --out docs/results/benchmarks

A medium model with random weights has eight snapshots. For each position of the slider, the time
from the request of the browser to the first update with a token of the story is measured over HTTP,
once while the snapshot is not in memory, and then while it is. For the training, runs with and
without a thread that reads the run as the page does take turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml
from training import write_json

from minigpt.cli.compose import load_config
from minigpt.core.process import tune_process
from minigpt.model import GPT
from minigpt.playground.answers import Playground
from minigpt.playground.server import start
from minigpt.playground.training import Job
from minigpt.playground.training_page import POLL_SECONDS
from minigpt.playground.training_view import job_html
from minigpt.runs.checkpoint import write_checkpoint, write_snapshot
from minigpt.runs.folder import Run
from minigpt.tokenizer import Tokenizer
from minigpt.training.loop import train

ROOT = Path(__file__).parents[1]
N_SNAPSHOTS = 8
PROMPT = "Once upon a time, there was a dog"


def write_run(folder: Path) -> Path:
    """Write a run folder of the medium size, with random weights and snapshots."""
    shape = dataclasses.asdict(load_config("train", ["model=medium"]).model)
    for name in ("snapshots", "checkpoints"):
        (folder / name).mkdir(parents=True)
    Tokenizer.load(ROOT / "releases/medium/tokenizer.json").save(folder / "tokenizer.json")
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": shape}))
    config = load_config("train", ["model=medium"]).model
    net = GPT(config)
    for step in range(N_SNAPSHOTS):
        torch.manual_seed(step)
        net = GPT(config)
        values = {"step": step, "tokens": 1000 * step, "train_loss": 8.0}
        path = folder / f"snapshots/step-{step:06d}.safetensors"
        write_snapshot(path, net, {"model": shape}, values)
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    content = {
        "state_dict": state,
        "hyper_parameters": {"model": shape},
        "global_step": N_SNAPSHOTS,
    }
    write_checkpoint(folder / "checkpoints/best.ckpt", content)
    return folder


def first_words(client: httpx.Client, age: int) -> float:
    """Return the seconds from the request to the first update that contains a token."""
    data = [PROMPT, 0.8, 0, 1.0, 0.0, 200, None, age]
    began = time.perf_counter()
    event = client.post("/gradio_api/call/write", json={"data": data}).json()["event_id"]
    with client.stream("GET", f"/gradio_api/call/write/{event}") as answer:
        for line in answer.iter_lines():
            if line.startswith("data: ") and 'class="token' in str(json.loads(line[6:])):
                return time.perf_counter() - began
    raise SystemExit("error: the story has no token")


def measure_slider(folder: Path) -> dict[str, Any]:
    page = start(Playground.load([Run.load(write_run(folder))]), "127.0.0.1", 0)
    with httpx.Client(base_url=str(page.local_url), timeout=60, trust_env=False) as client:
        first_words(client, N_SNAPSHOTS)  # Gradio's own start
        rounds = [[first_words(client, age) for age in range(N_SNAPSHOTS)] for _ in range(6)]
    page.close(verbose=False)
    again = [seconds for times in rounds[1:] for seconds in times]
    return {
        "new_ms": [round(1000 * seconds, 1) for seconds in rounds[0]],
        "loaded_ms": round(1000 * statistics.median(again), 1),
        "slowest_ms": round(1000 * max(*rounds[0], *again), 1),
    }


def measure_training(folder: Path, n_rounds: int) -> dict[str, Any]:
    """Return the tokens per second with and without a page that looks on."""
    rates: dict[bool, list[float]] = {False: [], True: []}
    for i in range(n_rounds):
        for watched in (False, True):
            name = f"{i}-{watched}"
            job = Job(folder / "jobs" / name)
            job.folder.mkdir(parents=True)
            (job.folder / "job.json").write_text('{"state": "started", "names": []}')
            job.report(phase="training", run=str(folder / name), tokens=500_000)
            words = [
                "budget.tokens=5e5", "optimizer.warmup_steps=20", "trainer.n_validations=1",
                "callbacks.progress_bar=false", f"runs_dir={folder}", f"name={name}",
            ]  # fmt: skip
            config = load_config("train", words)
            ended = threading.Event()

            def look(job: Job = job, ended: threading.Event = ended) -> None:
                while not ended.wait(POLL_SECONDS):
                    job_html(job)

            looker = threading.Thread(target=look)
            if watched:
                looker.start()
            rates[watched].append(train(config).summary["tokens_per_second"])
            ended.set()
            if watched:
                looker.join()
    alone, watched = (statistics.median(rates[key]) for key in (False, True))
    return {"alone": alone, "watched": watched, "ratio": round(watched / alone, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    tune_process()
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "slider": measure_slider(Path(folder) / "run"),
            "training": measure_training(Path(folder) / "runs", arguments.rounds),
        }
    write_json(arguments.out / "playground.json", results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
