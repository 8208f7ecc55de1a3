"""Measure how fast stories become token files, and how much memory that takes.

    python benchmarks/preparation.py --megabytes 40 400

For each size, the bundled training stories are repeated up to that many megabytes. A new process
then trains the tokenizer on the first 100 MB and encodes all stories, starting with an empty cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training import peak_memory, write_json

from minigpt.data.config import DataConfig
from minigpt.data.preparation import prepare_split, prepare_tokenizer
from minigpt.data.sources import Corpus, bundled_sample


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure speed and memory of preparing a corpus.")
    parser.add_argument("--megabytes", type=float, nargs="+", default=[40.0])
    parser.add_argument("--out", type=Path, help="output folder")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a worker's story file and cache
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(prepare(*arguments.one)))
        return
    rows = [measure(megabytes) for megabytes in arguments.megabytes]
    table = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "rows": rows,
    }
    print(json.dumps(table, indent=2))
    if arguments.out:
        write_json(arguments.out / "preparation.json", table)


def measure(megabytes: float) -> dict[str, Any]:
    """Prepare a corpus of `megabytes` in a new process, cache and folder; return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "stories.txt"
        with text.open("w", encoding="utf-8", newline="\n") as file:
            for story in repeated(megabytes * 1e6):
                file.write(f"{story}\n<|endoftext|>\n")
        command = [sys.executable, __file__, "--one", str(text), str(Path(folder) / "cache")]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def repeated(n_bytes: float) -> Iterator[str]:
    """Yield the bundled training stories repeatedly, up to `n_bytes` in UTF-8."""
    while n_bytes > 0:
        for story in bundled_sample().stories("train"):
            yield story
            n_bytes -= len(story.encode())
            if n_bytes <= 0:
                return


def prepare(text: str, cache_dir: str) -> dict[str, Any]:
    """Prepare the story file `text`; return speed and memory."""
    # A validation file avoids a pass that counts the stories in order to hold some out.
    corpus = Corpus((Path(text),), bundled_sample().valid_files)
    config = DataConfig(cache_dir=cache_dir)
    start = time.perf_counter()
    tokenizer = prepare_tokenizer(corpus, config)
    after_training = time.perf_counter()
    tokens = prepare_split(corpus, "train", tokenizer, cache_dir)
    end = time.perf_counter()
    return {
        "megabytes": round(tokens.n_bytes / 1e6, 1),
        "tokens": tokens.n_tokens,
        "tokenizer_seconds": round(after_training - start, 2),
        "encoding_seconds": round(end - after_training, 2),
        "megabytes_per_second": round(tokens.n_bytes / 1e6 / (end - start), 2),
        "peak_memory_megabytes": peak_memory(),
    }


if __name__ == "__main__":
    main()
