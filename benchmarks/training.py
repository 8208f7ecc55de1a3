"""Measure training speed, compared with transformers' GPT-2 and peak matrix products.

    python benchmarks/training.py --out docs/results/benchmarks
    python benchmarks/training.py --sweep     # also vary batch size, context and width
    python benchmarks/training.py --profile   # only profile the operators of a medium step
    python benchmarks/training.py --teacher   # only measure what a teacher of the same size costs

Each candidate is a separate process that runs one step on request. The candidates can therefore
take turns, and each uses its usual memory allocator. Times are medians. On a CPU without native
bfloat16, only float32 is measured. `--out` is the folder for training.json or, with --teacher,
teacher.json; with --sweep, also for training-sweep.png.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.core.files import user_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
WIDTHS = {"small": 128, "medium": 256, "large": 384}
VOCABULARY = 3000


# ---------------------------------------------------------------------------- one candidate


def worker(kind: str, d_model: int, batch: int, context: int, precision: str) -> None:
    """Run a step for each line on stdin; print its seconds and the peak memory so far as JSON."""
    make = {"ours": _ours, "muon": _muon, "taught": _taught, "peer": _peer, "peak": _peak}[kind]
    step = make(d_model, batch, context, precision)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "memory_mb": peak_memory()}), flush=True)


def peak_memory() -> float | None:
    """Return the peak resident memory of this process in MB, or None on Windows."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(
        peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1
    )  # KiB, but bytes on macOS


def _ours(
    d_model: int, batch: int, context: int, precision: str, name: Any = "adamw",
    taught: bool = False,
) -> Any:  # fmt: skip
    """Return a training step of this project, with AdamW as in the peer or another optimizer.

    With `taught`, a teacher of the same size takes part.
    """
    import torch

    from minigpt.core.process import tune_process
    from minigpt.kernels.cpu import CPU
    from minigpt.kernels.distillation import Distillation
    from minigpt.kernels.microbatch import microbatched_loss
    from minigpt.model import GPT
    from minigpt.training.config import OptimizerConfig
    from minigpt.training.optim import make_optimizer, peak_lrs

    tune_process()
    net = GPT(shape_of(d_model, context)).use(CPU)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    loss = microbatched_loss(net)
    if taught:
        teacher = GPT(shape_of(d_model, context)).use(CPU).eval().requires_grad_(False)
        loss = microbatched_loss(net, loss=Distillation(net, [teacher], dtype=dtype))
    config = OptimizerConfig(name)
    optimizer = make_optimizer(net, config, peak_lrs(config, d_model), dtype=dtype)
    tokens = torch.randint(0, VOCABULARY, (batch, context + 1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    return _step(net, optimizer, lambda: loss(inputs, targets).flatten()[0], precision)


def _muon(d_model: int, batch: int, context: int, precision: str) -> Any:
    """Return the training step of `python train.py`, with Muon, which costs more than AdamW."""
    return _ours(d_model, batch, context, precision, "muon")


def _taught(d_model: int, batch: int, context: int, precision: str) -> Any:
    """Return the training step of a student with a teacher of the same size."""
    return _ours(d_model, batch, context, precision, "muon", taught=True)


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
    """Return a function that multiplies square matrices of side `d_model` ten times."""
    import torch

    a = torch.randn(d_model, d_model).to(torch.bfloat16 if precision == "bf16" else torch.float32)

    def multiply() -> None:
        for _ in range(10):
            torch.mm(a, a)

    return multiply


# ---------------------------------------------------------------------------- comparison


class Candidate:
    """A worker process and its measurements."""

    def __init__(self, kind: str, d_model: int, batch: int, context: int, precision: str) -> None:
        arguments = [kind, str(d_model), str(batch), str(context), precision]
        self.tokens, self.seconds = batch * context, []
        self.memory_mb: float | None = None
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
    """Run the candidates in turns: `warm_up` steps each, then `rounds` measured steps."""
    for i in range(warm_up + rounds):
        for candidate in candidates.values():
            candidate.step(keep=i >= warm_up)
    for candidate in candidates.values():
        candidate.process.communicate("")


def shape_of(d_model: int, context: int) -> Any:
    from minigpt.model import GPTConfig

    return GPTConfig(VOCABULARY, context, d_model, 5, max(1, d_model // 32), 2 * d_model)


def flops_per_token(d_model: int, context: int) -> int:
    from minigpt.model import GPT

    return GPT(shape_of(d_model, context)).flops_per_token()


def peak_flops(candidate: Candidate) -> float:
    return 10 * 2 * 2048**3 / candidate.median


def precisions() -> list[str]:
    """Return the precisions that this CPU supports natively, the fastest last."""
    from minigpt.core.hardware import cpu_has_bfloat16

    return ["float32", "bf16"] if cpu_has_bfloat16() else ["float32"]


def compare(rounds: int) -> dict[str, Any]:
    """Return the measurements of docs/performance.md."""
    best = precisions()[-1]
    c = {f"ours {size}": Candidate("ours", d, 32, 256, best) for size, d in WIDTHS.items()}
    if best != "float32":
        c["ours medium float32"] = Candidate("ours", 256, 32, 256, "float32")
    for precision in precisions():
        c[f"peer medium {precision}"] = Candidate("peer", 256, 32, 256, precision)
        c[f"peak {precision}"] = Candidate("peak", 2048, 1, 1, precision)
    measure(c, rounds)
    peaks = {precision: peak_flops(c[f"peak {precision}"]) for precision in precisions()}
    rate = {name: x.tokens_per_second for name, x in c.items() if not name.startswith("peak")}
    ours, peers = c["ours medium"], {p: c[f"peer medium {p}"] for p in precisions()}
    float32 = rate.get("ours medium float32", rate["ours medium"])
    return {
        **{f"peak {p} GFLOP/s": peak / 1e9 for p, peak in peaks.items()},
        **{f"tokens per second, {name}": value for name, value in rate.items()},
        **{
            f"share of {best} peak, {size}": rate[f"ours {size}"]
            * flops_per_token(d, 256)
            / peaks[best]
            for size, d in WIDTHS.items()
        },
        **{
            f"speed against peer {p}": ours.tokens_per_second / peer.tokens_per_second
            for p, peer in peers.items()
        },
        "float32 against peer float32": float32 / rate["peer medium float32"],
        **{
            f"memory against peer {p}": ours.memory_mb / peer.memory_mb
            for p, peer in peers.items()
            if ours.memory_mb and peer.memory_mb
        },
    }


def teacher_cost(rounds: int) -> dict[str, Any]:
    """Return the time of a student's step, relative to a step without a teacher, by size."""
    best, ratios = precisions()[-1], {}
    for size, d_model in WIDTHS.items():
        both = {kind: Candidate(kind, d_model, 16, 256, best) for kind in ("muon", "taught")}
        measure(both, rounds)
        ratios[f"step with a teacher, {size}"] = both["taught"].median / both["muon"].median
    return ratios


def sweep(rounds: int) -> list[dict[str, Any]]:
    """Return training FLOP/s of the medium model with other batch sizes, contexts and widths."""
    cases = [("batch", 256, b, 256) for b in (8, 16, 32, 64, 128)]
    cases += [("context", 256, 8192 // t, t) for t in (64, 128, 256, 512, 1024)]
    cases += [("d_model", d, 32, 256) for d in (64, 128, 256, 384, 512, 768)]
    rows = []
    for name, d_model, batch, context in cases:
        both = {
            "ours": Candidate("ours", d_model, batch, context, precisions()[-1]),
            "peak": Candidate("peak", 2048, 1, 1, precisions()[-1]),
        }
        measure(both, rounds)
        flops = both["ours"].tokens_per_second * flops_per_token(d_model, context)
        share = flops / peak_flops(both["peak"])
        rows.append(
            {"varied": name, "d_model": d_model, "batch": batch, "context": context,
             "tokens_per_second": both["ours"].tokens_per_second, "share_of_peak": share,
             "memory_mb": both["ours"].memory_mb}
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def sweep_figure(rows: list[dict[str, Any]]) -> Figure:
    """Plot the MFU by batch, context and width; the grey band is within 25 % of the best."""
    from matplotlib.ticker import NullLocator, PercentFormatter

    from minigpt.core.plots import COLOURS, INK, new_figure

    figure = new_figure(8, 3.2, columns=3)
    shares = [row["share_of_peak"] for row in rows]
    best = max(shares)
    panels = {
        "batch": "batch size (256 tokens each)",
        "context": "context (tokens)",
        "d_model": "d_model",
    }
    for axes, (varied, label) in zip(figure.axes, panels.items(), strict=True):
        own = [row for row in rows if row["varied"] == varied]
        sizes = [row[varied] for row in own]
        axes.axhspan(0.75 * best, best, color="#e5e7eb", zorder=0)
        axes.plot(
            sizes, [row["share_of_peak"] for row in own], "o-", color=COLOURS[0], markersize=4
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel=label, ylim=(0, 1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.tick_params(labelleft=varied == "batch")
    figure.axes[0].set_ylabel("share of the peak")
    title = f"Training runs at {min(shares):.0%} to {best:.0%} of the matrix-multiply peak"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def profile(steps: int = 5) -> None:
    """Print the milliseconds per operator of one medium step with one micro-batch and thread."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    torch.set_num_threads(1)  # the profiler does not see the threads of micro-batches
    step = _ours(256, 8, 256, precisions()[-1])
    for _ in range(3):
        step()
    with profiler(activities=[ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            step()
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_cpu_time_total)
    for row in rows[:25]:
        print(f"{row.key:50} {row.self_cpu_time_total / 1e3 / steps:8.1f} {row.count // steps:6}")
    print(f"{'all':50} {sum(row.self_cpu_time_total for row in rows) / 1e3 / steps:8.1f}")


def write_json(path: Path, table: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure training speed.")
    parser.add_argument("--worker", nargs=5)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--sweep", action="store_true", help="also vary batch size, context and width"
    )
    parser.add_argument(
        "--profile", action="store_true", help="only profile the operators of a step"
    )
    parser.add_argument("--teacher", action="store_true", help="only measure the cost of a teacher")
    parser.add_argument("--out", type=user_path, help="output folder")
    arguments = parser.parse_args()
    if arguments.worker:
        kind, d_model, batch, context, precision = arguments.worker
        worker(kind, int(d_model), int(batch), int(context), precision)
        return
    if arguments.profile:
        profile()
        return
    table: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}",
        **(teacher_cost if arguments.teacher else compare)(arguments.rounds),
    }
    for name, value in table.items():
        print(f"{name:45} {value if isinstance(value, str) else f'{value:,.3f}'}")
    if arguments.sweep and not arguments.teacher:
        table["sweep"] = sweep(arguments.rounds)
        shares = [row["share_of_peak"] for row in table["sweep"]]
        table["smallest / largest share of the sweep"] = min(shares) / max(shares)
        print(f"smallest / largest share of the sweep {min(shares) / max(shares):.3f}")
    if arguments.out:
        write_json(arguments.out / f"{'teacher' if arguments.teacher else 'training'}.json", table)
        if "sweep" in table:
            sweep_figure(table["sweep"]).savefig(arguments.out / "training-sweep.png", dpi=160)


if __name__ == "__main__":
    main()
