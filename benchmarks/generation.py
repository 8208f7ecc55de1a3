"""Measure generation speed, compared with other programs that run the same weights.

    python benchmarks/generation.py --out docs/results/benchmarks

The model has the medium size and random weights. First, its logits are compared with those of
transformers' GPT-2 with the same weights. All candidates generate the same number of tokens after
the same prompt, with key/value caches, at temperature 0.8 and without an end-of-text token. They
take turns within one run, and their medians are compared. Each program has a process of its own:
in a process in which PyTorch has computed on several threads, CTranslate2 is ten times slower.

"by PyTorch" means this project without decode.c, as on a machine without a C compiler; "decoder
alone" means forward passes of decode.c without a choice of tokens. CTranslate2 and llama.cpp take
part if they are installed: `pip install ctranslate2 llama-cpp-python gguf`. An engine that is
missing or fails is reported in one line and left out.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from training import write_json

from minigpt.core.files import user_path
from minigpt.core.hardware import cpu_has_bfloat16
from minigpt.exporting.formats import HF, renamed, write_gguf, write_hf
from minigpt.exporting.formats import as_gpt2 as weights_of_gpt2
from minigpt.generation.decoder import Backend, Decoder, c_backend
from minigpt.generation.sampling import (
    SamplingConfig,
    generate,
    sample,
)
from minigpt.kernels import decode
from minigpt.model import GPT, GPTConfig
from minigpt.tokenizer import Tokenizer

PROMPT = 16  # tokens; GPT-2 cannot continue beyond the context, which prompt and new tokens fill
MEDIUM = GPTConfig(d_model=256, n_heads=8, d_ff=512)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PEER = list(DTYPES)
if not cpu_has_bfloat16():  # PyTorch would emulate it, at a hundredth of the speed
    del PEER[1]
if c_backend() is None:
    raise SystemExit("error: decode.c is part of the comparison: install a C compiler")
Candidate = Callable[[], int]  # writes tokens and returns their number


# ---------------------------------------------------------------------------- candidates


def ours(net: GPT, batch: int, prompt: int, new: int, backend: Backend = "c") -> Candidate:
    """Return a candidate that generates with this project's public iterator."""
    ids = random_prompt(batch, prompt)
    sampling = SamplingConfig(0.8, max_tokens=new, backend=backend)
    return lambda: batch * sum(1 for _ in generate(net, ids, sampling, end_of_text=-1))


def decoder_alone(net: GPT, batch: int, new: int) -> Candidate:
    """Return a candidate that only runs decode.c's forward passes, after reading the prompts."""
    ids = random_prompt(batch, PROMPT)
    logits = torch.empty(batch, net.config.vocab_size)

    @torch.inference_mode()
    def write() -> int:
        decoder = Decoder(net, list(ids[:, :-1]), "c")
        assert isinstance(decoder.batch, decode.Batch)
        struct = decoder.batch._single_tokens(PROMPT + new - 1)
        for _ in range(new):
            decoder.batch._read(struct, ids[:, -1], decoder.positions, logits)
            decoder.positions += 1
        return batch * new

    return write


def peer(net: Any, batch: int, new: int) -> Candidate:
    """Return a candidate that samples with `generate` of transformers and its cache."""
    ids = random_prompt(batch, PROMPT)
    settings = transformers.GenerationConfig(
        do_sample=True, temperature=0.8, top_k=0, top_p=1.0, max_new_tokens=new, use_cache=True,
        pad_token_id=0,
    )  # fmt: skip

    mask, untyped = torch.ones_like(ids), cast(Any, net)

    def write() -> int:
        out = untyped.generate(ids, attention_mask=mask, generation_config=settings)
        return batch * (out.shape[1] - PROMPT)

    return write


def ctranslate2_of(generator: Any, batch: int, new: int) -> Candidate:
    """Return a candidate that samples with CTranslate2."""
    names = tokenizer_names()
    prompts = [[names[i] for i in ids] for ids in random_prompt(batch, PROMPT).tolist()]
    sampling = {"sampling_topk": 0, "sampling_temperature": 0.8, "beam_size": 1}
    length = {"max_length": new, "min_length": new, "include_prompt_in_result": False}

    def write() -> int:
        results = generator.generate_batch(prompts, **sampling, **length)
        return sum(len(result.sequences_ids[0]) for result in results)

    return write


def tokenizer() -> Tokenizer:
    """Return the tokenizer of the released medium model, for the exports; weights are random."""
    return Tokenizer.load(Path(__file__).parent.parent / "releases/medium/tokenizer.json")


def tokenizer_names() -> list[str]:
    """Return the text of each token in the tokenizer's file, by id."""
    vocabulary = json.loads(tokenizer().to_json())["model"]["vocab"]
    return sorted(vocabulary, key=vocabulary.__getitem__)


def without_cache(net: GPT, new: int) -> Candidate:
    """Return a candidate that reads the last 256 tokens again for each new token."""
    context, generator = net.config.context_length, torch.Generator().manual_seed(0)
    prompt = random_prompt(1, context)

    @torch.inference_mode()
    def write() -> int:
        ids = prompt
        for _ in range(new):
            logits = net(ids[:, -context:])[:, -1].float()
            ids = torch.cat([ids, sample(logits, SamplingConfig(0.8), generator)[:, None]], dim=1)
        return new

    return write


def weights_once(n_bytes: int) -> Candidate:
    """Return a candidate that only sums the weights, which bounds tokens per second from above."""
    weights = torch.ones(n_bytes // 4)
    return lambda: sum(1 for _ in range(100) if weights.sum() > 0)


def random_prompt(batch: int, length: int) -> Tensor:
    return torch.randint(0, MEDIUM.vocab_size, (batch, length))


def network() -> GPT:
    """Return the model: the same random weights in each process."""
    torch.manual_seed(0)
    return GPT(MEDIUM).eval().requires_grad_(False)  # frozen, as `Run.load_model` returns it


def as_gpt2(net: GPT) -> Any:
    """Return transformers' GPT-2 with the weights of `net`, which gives the same logits."""
    c = net.config
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.context_length, n_embd=c.d_model,
            n_layer=c.n_layers, n_head=c.n_heads, n_inner=c.d_ff, activation_function="gelu",
            bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    weights = {}
    for name, weight in weights_of_gpt2(net).items():
        # GPT-2 keeps the matrices of a layer as (in, out).
        transposed = weight.t() if name.startswith("blocks.") and weight.dim() == 2 else weight
        weights[renamed(name, HF)] = transposed
    peer.load_state_dict(weights, strict=False)  # lm_head is tied to the embedding
    ids = random_prompt(2, c.context_length)
    with torch.no_grad():
        torch.testing.assert_close(peer(ids).logits, net(ids), atol=1e-4, rtol=1e-4)
    return peer


# ------------------------------------------------------------------------------ programs


def decode_c_candidates(folder: Path, new: int) -> dict[str, Candidate]:
    """Return the candidates that use decode.c."""
    net, candidates = network(), dict[str, Candidate]()
    for precision, dtype in DTYPES.items():
        own = copy.deepcopy(net).to(dtype)
        for batch in (1, 32, 64):
            candidates[f"ours {precision} batch {batch}"] = ours(own, batch, PROMPT, new)
            candidates[f"decoder alone {precision} batch {batch}"] = decoder_alone(own, batch, new)
        context = net.config.context_length
        candidates[f"ours {precision} behind a full context"] = ours(own, 1, context, new)
    return candidates


def pytorch_candidates(folder: Path, new: int) -> dict[str, Candidate]:
    """Return the candidates that run this project's model in PyTorch, and the limit by weights."""
    net, candidates = network(), dict[str, Candidate]()
    for precision in PEER:
        own = copy.deepcopy(net).to(DTYPES[precision])
        for batch in (1, 32, 64):
            candidates[f"ours by PyTorch {precision} batch {batch}"] = ours(
                own, batch, PROMPT, new, "torch"
            )
        few = max(1, new // 10)
        candidates[f"without a cache {precision}, full context"] = without_cache(own, few)
    candidates["weights read once for each token"] = weights_once(4 * net.n_parameters)
    return candidates


def transformers_candidates(folder: Path, new: int) -> dict[str, Candidate]:
    """Return the candidates that use transformers."""
    gpt2, candidates = as_gpt2(network()), dict[str, Candidate]()
    for precision in PEER:
        other = copy.deepcopy(gpt2)
        torch.nn.Module.to(other, DTYPES[precision])
        for batch in (1, 32):
            candidates[f"peer {precision} batch {batch}"] = peer(other, batch, new)
    return candidates


def ctranslate2_candidates(
    dtype: str, threads: int | None, folder: Path, new: int
) -> dict[str, Candidate]:
    """Return the candidates that use CTranslate2 with weights of a type; None means all threads."""
    module: Any = importlib.import_module("ctranslate2")
    converted = str(folder / f"ctranslate2-{dtype}-{threads}")
    convert = [sys.executable, "-m", "ctranslate2.converters.transformers", "--quantization", dtype]
    subprocess.run(
        [*convert, "--model", str(folder / "hf"), "--output_dir", converted],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    used = threads or torch.get_num_threads()
    generator = module.Generator(converted, device="cpu", intra_threads=used)
    name = "CTranslate2" if threads is None else f"CTranslate2 on {threads} thread"
    return {
        f"{name} {dtype} batch {batch}": ctranslate2_of(generator, batch, new) for batch in (1, 32)
    }


def llama_cpp_candidates(folder: Path, new: int) -> dict[str, Candidate]:
    """Return the candidate that uses llama.cpp: one sequence."""
    module: Any = importlib.import_module("llama_cpp")
    threads, context = torch.get_num_threads(), MEDIUM.context_length
    path = str(folder / "gguf/model.gguf")
    llama = module.Llama(path, n_ctx=context, n_threads=threads, verbose=False)
    (ids,) = random_prompt(1, PROMPT).tolist()
    sampling = {"temp": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
    return {
        "llama.cpp float32 batch 1": lambda: sum(
            1 for _ in islice(llama.generate(ids, **sampling), new)
        )
    }


CTRANSLATE2 = {"ctranslate2": "ctranslate2"}
PROGRAMS = {
    "decode.c": (decode_c_candidates, {}),
    "PyTorch": (pytorch_candidates, {}),
    "transformers": (transformers_candidates, {}),
    "CTranslate2 float32": (partial(ctranslate2_candidates, "float32", None), CTRANSLATE2),
    "CTranslate2 int8": (partial(ctranslate2_candidates, "int8", None), CTRANSLATE2),
    # On some CPUs its products of integers are slower with several threads than with one.
    "CTranslate2 int8, 1 thread": (partial(ctranslate2_candidates, "int8", 1), CTRANSLATE2),
    "llama.cpp": (llama_cpp_candidates, {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}),
}  # by name: a function that returns the candidates, and the packages that it needs by module


# ---------------------------------------------------------------------------- comparison


def serve(program: str, folder: Path, new: int, pipe: Connection) -> None:
    """Send the names of a program's candidates, then the rate of each candidate that is requested.

    A rate is in tokens per second, over at least one second. If the program fails, the reason is
    sent instead of the names.
    """
    transformers.logging.set_verbosity_error()
    try:
        candidates = PROGRAMS[program][0](folder, new)
    except Exception as error:  # of any kind, in the program of others
        pipe.send(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        return
    pipe.send(list(candidates))
    while name := pipe.recv():
        candidates[name]()  # unmeasured, because the first call after a wait is slower
        tokens, start = 0, time.perf_counter()
        while (seconds := time.perf_counter() - start) < 1:
            tokens += candidates[name]()
        pipe.send(tokens / seconds)


def start_programs(folder: Path, new: int) -> dict[str, Connection]:
    """Start a process for each program that is installed, and return their pipes by candidate."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for program, (_, modules) in PROGRAMS.items():
        missing = [package for module, package in modules.items() if find_spec(module) is None]
        if missing:
            print(f"{program} is left out: pip install {' '.join(missing)}", flush=True)
            continue
        pipe, end = context.Pipe()
        context.Process(target=serve, args=(program, folder, new, end), daemon=True).start()
        end.close()  # so that a process that dies ends the wait for its answer
        try:
            names = pipe.recv()
        except EOFError:
            names = "its process ended"
        if isinstance(names, str):
            print(f"{program} is left out: {names}", flush=True)
        else:
            pipes |= dict.fromkeys(names, pipe)
    return pipes


def compare(rounds: int, new: int, folder: Path) -> dict[str, Any]:
    """Return the medians of all candidates over `rounds`, after a warm-up round, and ratios."""
    for kind, write in {"hf": write_hf, "gguf": write_gguf}.items():
        if kind != "gguf" or find_spec("gguf"):
            (folder / kind).mkdir()
            write(network(), tokenizer(), folder / kind)
    pipes = start_programs(folder, new)
    rates: dict[str, list[float]] = {name: [] for name in pipes}
    for turn in range(rounds + 1):
        for name, pipe in pipes.items():
            pipe.send(name)
            rate = pipe.recv()
            if turn > 0:
                rates[name].append(rate)
    for pipe in set(pipes.values()):
        pipe.send(None)
    rate = {name: statistics.median(values) for name, values in rates.items()}
    return {**{f"tokens per second, {name}": r for name, r in rate.items()}, **ratios(rate)}


ENGINES = (
    "CTranslate2 float32", "CTranslate2 int8", "CTranslate2 on 1 thread int8", "llama.cpp float32"
)  # fmt: skip


def ratios(rate: dict[str, float]) -> dict[str, float]:
    """Return the speed ratios, for each precision and for the best precision of each side."""

    def best(name: str, precisions: Iterable[str]) -> float:
        return max(rate[name.format(p)] for p in precisions)

    result = {}
    for batch in (1, 32):
        ours, peer = f"ours {{}} batch {batch}", f"peer {{}} batch {batch}"
        for p in PEER:
            result[f"ours / peer, {p}, batch {batch}"] = rate[ours.format(p)] / rate[peer.format(p)]
        for p in DTYPES:
            for engine in ENGINES:
                if other := rate.get(f"{engine} batch {batch}"):
                    name = f"ours {p} / {engine}, batch {batch}"
                    result[name] = rate[ours.format(p)] / other
            share = 1 - rate[ours.format(p)] / rate[f"decoder alone {p} batch {batch}"]
            result[f"share of sampling and the loop, {p}, batch {batch}"] = share
        result[f"best of ours / best of peer, batch {batch}"] = best(ours, DTYPES) / best(
            peer, PEER
        )
    full, uncached = "ours {} behind a full context", "without a cache {}, full context"
    for p in PEER:
        result[f"with / without a cache, full context, {p}"] = (
            rate[full.format(p)] / rate[uncached.format(p)]
        )
    result["with / without a cache, full context, best of each"] = best(full, DTYPES) / best(
        uncached, PEER
    )
    for name, precisions in {"ours": list(DTYPES), "ours by PyTorch": PEER}.items():
        for p in precisions:
            many, one = rate[f"{name} {p} batch 64"], rate[f"{name} {p} batch 1"]
            result[f"batch 64 / batch 1, {name} {p}"] = many / one
    result["batch 64 / batch 1, best"] = best("ours {} batch 64", DTYPES) / best(
        "ours {} batch 1", DTYPES
    )
    limit = rate["weights read once for each token"]
    result["share of the limit by weights, float32, batch 1"] = rate["ours float32 batch 1"] / limit
    return result


def speed_table(table: dict[str, Any]) -> str:
    """Return a Markdown table of tokens per second: one row for each program and precision."""
    names = (
        "ours", "ours by PyTorch", "decoder alone", "peer",
        "CTranslate2", "CTranslate2 on 1 thread", "llama.cpp",
    )  # fmt: skip
    rows = ["| tokens per second | batch 1 | batch 32 |", "|---|---|---|"]
    for name in names:
        for dtype in (*DTYPES, "int8"):
            keys = [f"tokens per second, {name} {dtype} batch {batch}" for batch in (1, 32)]
            if any(key in table for key in keys):
                cells = [f"{table[key]:,.0f}" if key in table else "–" for key in keys]
                label = name.replace("peer", "transformers")
                rows.append(f"| {label}, {dtype} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how fast text is generated.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=240, help="new tokens per sequence")
    parser.add_argument("--out", type=user_path, help="output folder")
    arguments = parser.parse_args()
    if not 1 <= arguments.tokens <= 256 - PROMPT:
        parser.error(f"--tokens must be between 1 and {256 - PROMPT}: GPT-2 has no context shift")
    table: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as folder:
        table |= compare(arguments.rounds, arguments.tokens, Path(folder))
    for name, value in table.items():
        print(f"{name:62} {f'{value:,.2f}' if isinstance(value, float) else value}")
    print(f"\n{speed_table(table)}")
    if arguments.out:
        write_json(arguments.out / "generation.json", table)


if __name__ == "__main__":
    main()
