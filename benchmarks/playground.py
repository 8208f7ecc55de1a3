"""Measure the playground: the time from the slider "Age" to the first words of a story, and the
speed of a training while a browser shows it.

    python benchmarks/playground.py --out docs/results/benchmarks

A medium model with random weights has eight snapshots. For each position of the slider, the time
from the request of the browser to the first update with a token of the story is measured over HTTP,
once while the snapshot is not in memory, and then while it is. For the training, Chromium shows the
page and an empty page in turns; make test-browser installs what that needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import tempfile
import threading
import time
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml
from training import write_json

from minigpt.cli.compose import load_config
from minigpt.core.files import user_path
from minigpt.core.process import tune_process
from minigpt.data.sources import bundled_sample
from minigpt.model import GPT
from minigpt.playground.access import Access
from minigpt.playground.answers import Playground
from minigpt.playground.server import Training, start
from minigpt.playground.training import TrainingQueue
from minigpt.runs.checkpoint import write_checkpoint, write_snapshot
from minigpt.runs.folder import Run
from minigpt.runs.records import read_metrics
from minigpt.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
N_SNAPSHOTS = 8
SEGMENT, SETTLE = 15, 3  # seconds of training per measurement, and before it
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


def measure_slider(run: Path) -> dict[str, Any]:
    page = start(Playground.load([Run.load(run)]), "127.0.0.1", 0)
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


def rate_of(run: Path, seconds: float) -> float:
    """Return the tokens per second of a run in the next `seconds`, from the rows of its metrics."""
    n_before = len(read_metrics(run))
    time.sleep(seconds)
    tokens = elapsed = 0.0
    for before, row in pairwise(read_metrics(run)[n_before - 1 :]):
        if "tokens_per_second" in row:
            tokens += row["tokens"] - before["tokens"]
            elapsed += (row["tokens"] - before["tokens"]) / row["tokens_per_second"]
    return tokens / elapsed


def measure_training(run: Path, folder: Path, n_rounds: int) -> dict[str, Any]:
    """Return the tokens per second of one training, while a browser shows its page and while not.

    The training is started as the page starts it. Segments in which Chromium shows the tab Train,
    and segments in which it shows an empty page, take turns, so that both meet the same noise.
    """
    # The extra browser, which make test-browser installs with Chromium, is not part of dev.
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    training = Training(TrainingQueue(folder / "jobs", folder / "runs"), Access())
    models, ended = Playground.load([Run.load(run)]), threading.Event()
    server = start(models, "127.0.0.1", 0, training=training)
    threading.Thread(target=training.watch, args=(models, ended), daemon=True).start()
    text = "\n<|endoftext|>\n".join(islice(bundled_sample().stories("train"), 4000))
    minutes = 2 + 2 * n_rounds * (SEGMENT + SETTLE) / 60
    job = training.queue.add(text, [], "small", minutes)
    while job.status.get("phase") != "training" or not read_metrics(Path(job.status["run"])):
        time.sleep(1)
    rates: dict[bool, list[float]] = {False: [], True: []}
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        for _ in range(n_rounds):
            for watched in (False, True):
                page.goto(training.access.url(str(server.local_url)) if watched else "about:blank")
                if watched:
                    page.get_by_role("tab", name="Train").click()
                    page.get_by_text("tokens/s").wait_for(timeout=60_000)
                time.sleep(SETTLE)
                rates[watched].append(rate_of(Path(job.status["run"]), SEGMENT))
        chromium.close()
    training.queue.stop(job.name)
    while job.state == "running":
        time.sleep(1)
    ended.set()
    server.close(verbose=False)
    alone, watched = (statistics.median(rates[key]) for key in (False, True))
    return {"alone": alone, "watched": watched, "ratio": round(watched / alone, 3), "all": rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=user_path, required=True)
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    tune_process()
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder) / "run")
        results = {
            "slider": measure_slider(run),
            "training": measure_training(run, Path(folder), arguments.rounds),
        }
    write_json(arguments.out / "playground.json", results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
