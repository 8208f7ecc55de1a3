"""How fast training is on this machine, beside transformers' GPT-2 and the matrix-multiply peak.

    python benchmarks/training.py --json docs/results/training.json
    python benchmarks/training.py --sweep     # over batch size, context and width as well

Every candidate is a process of its own that makes one step whenever it is told to, so that they
take turns within one run, each with the memory allocator it has in real use. Times are medians.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WIDTHS = {"small": 128, "medium": 256, "large": 384}
VOCABULARY = 3000


# ---------------------------------------------------------------------------- one candidate


def worker(kind: str, d_model: int, batch: int, context: int, precision: str) -> None:
    """Make a step for each line on stdin; answer with its seconds and the peak memory so far."""
    import resource

    step = {"ours": _ours, "peer": _peer, "peak": _peak}[kind](d_model, batch, context, precision)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kB to MB on Linux
        print(json.dumps({"seconds": seconds, "memory_mb": memory}), flush=True)


def _ours(d_model: int, batch: int, context: int, precision: str) -> Any:
    import torch

    from minigpt.fast import accelerate
    from minigpt.hardware import keep_freed_memory
    from minigpt.model import GPT, GPTConfig

    keep_freed_memory()
    shape = GPTConfig(VOCABULARY, context, d_model, 5, max(1, d_model // 32), 2 * d_model)
    net = accelerate(GPT(shape))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(0, VOCABULARY, (batch, context + 1))
    return _step(net, optimizer, lambda: net.loss(tokens[:, :-1], tokens[:, 1:]), precision)


def _peer(d_model: int, batch: int, context: int, precision: str) -> Any:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    shape = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=context, n_embd=d_model, n_layer=5,
        n_head=max(1, d_model // 32), n_inner=2 * d_model, activation_function="gelu",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    net = transformers.GPT2LMHeadModel(shape)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    ids = torch.randint(0, VOCABULARY, (batch, context))
    return _step(net, optimizer, lambda: net(ids, labels=ids).loss, precision)


def _step(net: Any, optimizer: Any, loss_of: Any, precision: str) -> Any:
    import torch

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _peak(d_model: int, batch: int, context: int, precision: str) -> Any:
    """Ten products of square matrices of side `d_model`."""
    import torch

    a = torch.randn(d_model, d_model).to(torch.bfloat16 if precision == "bf16" else torch.float32)

    def multiply() -> None:
        for _ in range(10):
            torch.mm(a, a)

    return multiply


# ---------------------------------------------------------------------------- all of them


class Candidate:
    """A worker process, and what it has measured."""

    def __init__(self, kind: str, d_model: int, batch: int, context: int, precision: str) -> None:
        arguments = [kind, str(d_model), str(batch), str(context), precision]
        self.tokens, self.seconds, self.memory_mb = batch * context, [], 0.0
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip

    def step(self, keep: bool = True) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self.memory_mb = answer["memory_mb"]
        if keep:
            self.seconds.append(answer["seconds"])

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.median


def measure(candidates: dict[str, Candidate], rounds: int, warm_up: int = 3) -> None:
    """Steps in turn: `warm_up` that do not count, then `rounds` that do."""
    for i in range(warm_up + rounds):
        for candidate in candidates.values():
            candidate.step(keep=i >= warm_up)
    for candidate in candidates.values():
        candidate.process.communicate("")


def flops_per_token(d_model: int, context: int) -> int:
    from minigpt.model import GPT, GPTConfig

    shape = GPTConfig(VOCABULARY, context, d_model, 5, max(1, d_model // 32), 2 * d_model)
    return GPT(shape).flops_per_token()


def peak_flops(candidate: Candidate) -> float:
    return 10 * 2 * 2048**3 / candidate.median


def compare(rounds: int) -> dict[str, Any]:
    """The table of docs/performance.md."""
    c = {f"ours {size}": Candidate("ours", d, 32, 256, "bf16") for size, d in WIDTHS.items()}
    c["ours medium float32"] = Candidate("ours", 256, 32, 256, "float32")
    c["peer medium float32"] = Candidate("peer", 256, 32, 256, "float32")
    c["peer medium bf16"] = Candidate("peer", 256, 32, 256, "bf16")
    c["peak bf16"] = Candidate("peak", 2048, 1, 1, "bf16")
    c["peak float32"] = Candidate("peak", 2048, 1, 1, "float32")
    measure(c, rounds)
    peak, ours = peak_flops(c["peak bf16"]), c["ours medium"]
    rate = {name: x.tokens_per_second for name, x in c.items() if not name.startswith("peak")}
    return {
        "peak bf16 GFLOP/s": peak / 1e9,
        "peak float32 GFLOP/s": peak_flops(c["peak float32"]) / 1e9,
        **{f"tokens per second, {name}": value for name, value in rate.items()},
        **{
            f"share of bf16 peak, {size}": rate[f"ours {size}"] * flops_per_token(d, 256) / peak
            for size, d in WIDTHS.items()
        },
        "speed against peer float32": ours.tokens_per_second / rate["peer medium float32"],
        "speed against peer bf16": ours.tokens_per_second / rate["peer medium bf16"],
        "float32 against peer float32": rate["ours medium float32"] / rate["peer medium float32"],
        "memory against peer float32": ours.memory_mb / c["peer medium float32"].memory_mb,
        "memory against peer bf16": ours.memory_mb / c["peer medium bf16"].memory_mb,
    }


def train_against_bare_step(rounds: int) -> dict[str, float]:
    """`python train.py`, all of it switched on, against its step in a loop."""
    bare = Candidate("ours", 256, 32, 256, "bf16")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "model=medium", "data.batch_size=32", "name=bench"]
        command += [f"budget.tokens={8192 * 24}", "optimizer.warmup_steps=2", f"runs_dir={folder}"]
        command += ["trainer.n_validations=1", "trainer.log_every_n_steps=4"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        with (Path(folder) / "bench/metrics.csv").open(encoding="utf-8") as file:
            logged = [r["tokens_per_second"] for r in csv.DictReader(file)]
    measure({"bare": bare}, rounds)
    whole = statistics.median(float(value) for value in logged[1:] if value)
    return {"train.py against the bare step": whole / bare.tokens_per_second}


def sweep(rounds: int) -> list[dict[str, Any]]:
    """FLOP rate of training over batch size, context and width around the medium size."""
    cases = [("batch", 256, b, 256) for b in (8, 16, 32, 64, 128)]
    cases += [("context", 256, 8192 // t, t) for t in (64, 128, 256, 512, 1024)]
    cases += [("d_model", d, 32, 256) for d in (64, 128, 256, 384, 512, 768)]
    rows = []
    for name, d_model, batch, context in cases:
        both = {
            "ours": Candidate("ours", d_model, batch, context, "bf16"),
            "peak": Candidate("peak", 2048, 1, 1, "bf16"),
        }
        measure(both, rounds)
        flops = both["ours"].tokens_per_second * flops_per_token(d_model, context)
        share = flops / peak_flops(both["peak"])
        rows.append(
            {"varied": name, "d_model": d_model, "batch": batch, "context": context,
             "tokens_per_second": both["ours"].tokens_per_second, "share_of_peak": share}
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast training is on this machine.")
    parser.add_argument("--worker", nargs=5)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sweep", action="store_true", help="batch size, context and width too")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    arguments = parser.parse_args()
    if arguments.worker:
        kind, d_model, batch, context, precision = arguments.worker
        worker(kind, int(d_model), int(batch), int(context), precision)
        return
    table: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}",
        **compare(arguments.rounds),
        **train_against_bare_step(arguments.rounds),
    }
    for name, value in table.items():
        print(f"{name:45} {value if isinstance(value, str) else f'{value:,.3f}'}")
    if arguments.sweep:
        table["sweep"] = sweep(arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
