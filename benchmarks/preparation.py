"""Measure the speed and the peak memory of preparing stories as token files.

    python benchmarks/preparation.py english:40 english:400 chinese:100 words:48:one base64:48:one

A case is a text (english, or a name in scripts.py) and its size in MB; `one` makes it a single
story. Each case is prepared with an empty cache, in a separate process that has imported what
training needs: a tokenizer is trained on at most the first 100 MB, and the stories are encoded.
Memory is the sum over the process tree, sampled twenty times per second. With `--rounds` the
encoding is repeated, in turns with the batch encoder of the `tokenizers` library on the same
stories.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts import stories
from training import write_json

from minigpt.core.files import user_path
from minigpt.data.config import DataConfig
from minigpt.data.preparation import prepare_split, prepare_tokenizer
from minigpt.data.sources import Corpus, bundled_sample
from minigpt.tokenizer import END_OF_TEXT

CASES = ("english:400", "chinese:100", "words:48:one", "base64:48:one")
_BATCH = 1000  # stories per call of the library


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure speed and memory of preparation.")
    parser.add_argument("cases", nargs="*", default=CASES, help="text:megabytes[:one]")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of encoding to compare")
    parser.add_argument("--vocab-size", type=int, default=DataConfig.vocab_size)
    parser.add_argument("--out", type=user_path, help="output folder")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # story file and cache folder
    arguments = parser.parse_args()
    size, rounds = arguments.vocab_size, arguments.rounds
    if arguments.child:
        text, cache_dir = arguments.child
        print(json.dumps(prepare(text, cache_dir, size, rounds)))
        return
    rows: list[dict[str, Any]] = []
    table = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "rows": rows,
    }
    for case in arguments.cases:
        rows.append(measure(case, size, rounds))
        if arguments.out:
            write_json(arguments.out / "preparation.json", table)
    print(json.dumps(table, indent=2))


def measure(case: str, vocab_size: int, rounds: int) -> dict[str, Any]:
    """Return the measurements of one case, prepared in a new process with an empty cache."""
    name, megabytes, *one = case.split(":")
    n_bytes = float(megabytes) * 1e6
    story_bytes = round(n_bytes) if one else 2000
    texts = repeated(n_bytes) if name == "english" else stories(name, n_bytes, story_bytes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("stories.txt" if name == "english" else "stories.jsonl")
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for story in texts:
                line = json.dumps({"text": story}, ensure_ascii=False)
                file.write(f"{story}\n{END_OF_TEXT}\n" if name == "english" else f"{line}\n")
        command = [sys.executable, __file__, "--child", str(path), str(Path(folder) / "cache")]
        command += ["--vocab-size", str(vocab_size)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        figures = {"peak_memory_megabytes": peak_of_tree(process)}
        figures |= read_answer(process)
        if rounds:  # in another process, because the library needs gigabytes for one long story
            command += ["--rounds", str(rounds)]
            figures |= read_answer(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    return {"case": case, **figures}


def read_answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return the JSON that a process prints; exit if the process fails."""
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(process.returncode)
    return json.loads(output)


def peak_of_tree(process: subprocess.Popen[str]) -> float | None:
    """Wait for a process; return the peak resident memory of it and its children in MB."""
    if not Path("/proc").is_dir():
        return None
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(resident, tree(process.pid))))
        time.sleep(0.05)
    return round(peak / 1e3, 1)


def tree(pid: int) -> Iterator[int]:
    """Yield the ids of a process and all its descendants."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return  # it has ended
    for child in children:
        yield from tree(int(child))


def resident(pid: int) -> int:
    """Return the resident memory of a process in kB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)


def repeated(n_bytes: float) -> Iterator[str]:
    """Yield the bundled training stories, repeated until they have `n_bytes` in UTF-8."""
    while n_bytes > 0:
        for story in bundled_sample().stories("train"):
            yield story
            n_bytes -= len(story.encode())
            if n_bytes <= 0:
                return


def prepare(text: str, cache_dir: str, vocab_size: int, rounds: int) -> dict[str, Any]:
    """Return the measurements of one preparation, or of `rounds` rounds of encoding."""
    import minigpt.training.loop  # noqa: F401  training has this in memory

    # A validation file is named, because holding stories out would read all of them to count.
    corpus = Corpus((Path(text),), bundled_sample().valid_files)
    config = DataConfig(cache_dir=cache_dir, vocab_size=vocab_size)
    start = time.perf_counter()
    tokenizer = prepare_tokenizer(corpus, config)
    trained = time.perf_counter()
    if rounds:
        texts = list(corpus.stories("train"))
        megabytes = sum(len(story.encode()) for story in texts) / 1e6

        def ours(n: int) -> None:
            prepare_split(corpus, "train", tokenizer, f"{cache_dir}/{n}")

        def library(_: int) -> None:
            for first in range(0, len(texts), _BATCH):
                tokenizer.encode_batch(texts[first : first + _BATCH])

        speeds: dict[Callable[[int], None], list[float]] = {ours: [], library: []}
        for n in range(rounds):
            for encode, measured in speeds.items():
                start = time.perf_counter()
                encode(n)
                measured.append(megabytes / (time.perf_counter() - start))
        median, of_library = (statistics.median(measured) for measured in speeds.values())
        return {
            "encoding_megabytes_per_second": round(median, 2),
            "library_megabytes_per_second": round(of_library, 2),
            "ratio": round(median / of_library, 3),
        }
    tokens = prepare_split(corpus, "train", tokenizer, cache_dir)
    end = time.perf_counter()
    return {
        "megabytes": round(tokens.n_bytes / 1e6, 1),
        "tokens": tokens.n_tokens,
        "tokenizer_seconds": round(trained - start, 2),
        "encoding_seconds": round(end - trained, 2),
        "megabytes_per_second": round(tokens.n_bytes / 1e6 / (end - start), 2),
    }


if __name__ == "__main__":
    main()
