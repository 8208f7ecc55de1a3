"""Two ways to write many texts on two cores: each product on both, or half of the rows on each.

    python benchmarks/generation_threads.py

Tokens per second of the bare steps of the medium shape with random weights, 240 tokens behind a
prompt of 16, medians of rounds that take turns. Halves are two `Decoder`s, each in a thread of its
own that computes on one core; PyTorch lets go of Python's lock while it multiplies.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from minigpt.decoding import Decoder
from minigpt.generation import SamplingConfig, sample, seeded_generator
from minigpt.model import GPT, GPTConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROMPT = 16  # tokens


class Halves:
    """A `Decoder` whose rows are dealt to `n` threads of one core each."""

    def __init__(self, net: GPT, texts: list[Tensor], n: int, pool: ThreadPoolExecutor) -> None:
        self.pool, size = pool, len(texts) // n
        parts = [texts[first : first + size] for first in range(0, len(texts), size)]
        self.decoders = list(pool.map(lambda part: alone(Decoder, net, part), parts))

    def read(self, ids: Tensor) -> Tensor:
        parts = ids.chunk(len(self.decoders))
        logits = self.pool.map(
            lambda decoder, part: alone(decoder.read, part), self.decoders, parts
        )
        return torch.cat(list(logits))


def alone(function: Callable[..., Any], *arguments: object) -> Any:
    with torch.inference_mode():  # each thread has its own
        return function(*arguments)


@torch.inference_mode()
def rate(make: Callable[[list[Tensor]], Decoder | Halves], batch: int, new: int) -> float:
    texts = list(torch.randint(0, 3000, (batch, PROMPT)))
    sampling, generator = SamplingConfig(0.8), seeded_generator(0, torch.device("cpu"))
    start, decoder, ids = time.perf_counter(), make(texts), torch.zeros(batch, dtype=torch.long)
    for _ in range(new):
        ids = sample(decoder.read(ids), sampling, generator)
    return batch * new / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description="Two ways to write many texts on two cores.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=240, help="new ones for each text")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 64])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    n = arguments.threads
    # A thread's own number: that of the main thread, set afterwards, does not reach the pool.
    pool = ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,))
    list(pool.map(lambda _: time.sleep(0.01), range(n)))  # all of them are there
    torch.manual_seed(0)
    found: dict[str, list[float]] = {}
    for turn in range(arguments.rounds + 1):
        for precision, dtype in DTYPES.items():
            torch.manual_seed(0)
            net = GPT(GPTConfig()).eval().requires_grad_(False).to(dtype)
            for batch in arguments.batches:
                ways: dict[str, tuple[int, Callable[[list[Tensor]], Decoder | Halves]]] = {
                    "one thread": (1, lambda texts, net=net: Decoder(net, texts)),
                    f"products on {n} threads": (n, lambda texts, net=net: Decoder(net, texts)),
                }
                if batch >= n:
                    ways[f"rows on {n} threads"] = (
                        n, lambda texts, net=net: Halves(net, texts, n, pool),
                    )  # fmt: skip
                for way, (threads, make) in ways.items():
                    torch.set_num_threads(threads)
                    make([torch.zeros(1, dtype=torch.long)] * batch)  # prepares the weights
                    tokens = rate(make, batch, arguments.tokens)
                    if turn > 0:
                        found.setdefault(f"{precision}, batch {batch}, {way}", []).append(tokens)
    for name, rates in found.items():
        print(f"{name:50} {statistics.median(rates):9,.0f} tokens per second")


if __name__ == "__main__":
    main()
