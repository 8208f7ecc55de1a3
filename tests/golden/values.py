"""Compute the golden values: logits, stories, loss curves, a resumed run, composed settings.

`make golden` compares them with those beside this file, which commit c2cfd24 gave. Logits and
stories are those of the released weights, recorded again when the weights change. Equal bit for
bit where the machine is the one that recorded them, to a tolerance elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt.cli.compose import compose_values, load_config
from minigpt.core.settings import plain
from minigpt.evaluation import EvaluationConfig, StoriesConfig, evaluate
from minigpt.generation.decoder import Decoder, c_backend
from minigpt.generation.sampling import SamplingConfig, stream_text
from minigpt.runs.checkpoint import read_checkpoint
from minigpt.runs.folder import Run, last_checkpoint
from minigpt.runs.records import read_metrics
from minigpt.training.loop import train
from tests.conftest import ROOT

HERE = Path(__file__).parent
STORIES = HERE / "stories.txt.xz"
KEPT_RUN = HERE / "run"  # of c2cfd24, stopped at step 12 of 20
RELEASES = ("small", "medium", "large")
CURVES = tuple((size, name) for size in ("w32", "small", "medium") for name in ("muon", "adamw"))
STEPS = 20


def machine() -> str:
    """What bit equality depends on: the CPU and its instructions, and the version of PyTorch."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    kind = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    cpu = hashlib.blake2b("".join(kind).encode(), digest_size=8).hexdigest()
    return f"{cpu} {torch.backends.cpu.get_cpu_capability()} {torch.__version__}"


@contextlib.contextmanager
def two_threads() -> Iterator[None]:
    """Run operators on two threads, whatever the environment asks for."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def digest(tensors: dict[str, Tensor]) -> str:
    """A hash of the bits of all tensors, by name."""
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode())
        total.update(tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


# ---------------------------------------------------------------------------- logits and stories


def fixed_ids() -> Tensor:
    """(2, 96) ids of the releases' vocabulary."""
    return torch.randint(1, 3000, (2, 96), generator=torch.Generator().manual_seed(7))


def release(name: str) -> Run:
    return Run.load(ROOT / "releases" / name)


@torch.inference_mode()
def forward_logits(name: str) -> Tensor:
    """Logits (2, 96, 3000) of one pass over `fixed_ids`."""
    with two_threads():
        return release(name).load_model()(fixed_ids())


@torch.inference_mode()
def decoded_logits(name: str) -> Tensor:
    """Logits (2, 8, 3000) of the last eight of `fixed_ids`, decoded one by one by decode.c."""
    ids, net = fixed_ids(), release(name).load_model()
    decoder = Decoder(net, list(ids[:, :-8]), "c")
    return torch.stack([decoder.read(new) for new in ids[:, -8:].unbind(1)], dim=1)


def has_c_backend() -> bool:
    """Whether decode.c can be compiled here."""
    return c_backend() is not None


def stories(name: str) -> dict[str, str]:
    """A greedy and a seeded story of a release, by PyTorch."""
    run = release(name)
    net, tokenizer = run.load_model(), run.tokenizer
    how = {
        "greedy": SamplingConfig(temperature=0, max_tokens=120, backend="torch"),
        "seed 1": SamplingConfig(temperature=0.8, max_tokens=120, seed=1, backend="torch"),
    }
    with two_threads():
        return {
            key: "".join(stream_text(net, tokenizer, "Once upon a time", sampling))
            for key, sampling in how.items()
        }


# ---------------------------------------------------------------------------- training


def overrides(size: str, optimizer: str, folder: Path) -> list[str]:
    """A run of STEPS steps on the text beside this file, in float32 on the CPU."""
    return [
        f"model={size}",
        f"optimizer={optimizer}",
        "data=text",
        f"data.train_files=['{STORIES}']",
        f"data.cache_dir='{folder / 'cache'}'",
        "data.vocab_size=1000",
        "data.shuffle=windows",
        f"runs_dir='{folder / 'runs'}'",
        f"budget.tokens={STEPS * 8 * 256}",
        "optimizer.warmup_steps=5",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        "trainer.log_every_n_steps=1",
        "trainer.n_validations=1",
        "callbacks=quiet",
    ]


def curve(size: str, optimizer: str, folder: Path, precision: str = "32-true") -> list[float]:
    """Training losses of the first STEPS steps, and the validation loss behind them."""
    more = [f"trainer.precision={precision}", f"name={size}-{optimizer}-{precision}"]
    with two_threads():
        run = train(load_config("train", [*overrides(size, optimizer, folder), *more]))
    rows = read_metrics(run.folder)
    return [row[key] for key in ("train/loss", "val/loss") for row in rows if key in row]


@contextlib.contextmanager
def kept_run(folder: Path) -> Iterator[str]:
    """A copy of KEPT_RUN in `folder`, which becomes the current one: config.yaml is relative."""
    shutil.copytree(KEPT_RUN, folder / "run")
    shutil.copy(STORIES, folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        with two_threads():
            yield "run"
    finally:
        os.chdir(before)


def resumed(folder: Path) -> str:
    """The hash of the weights of KEPT_RUN after it was resumed to its end, in `folder`."""
    with kept_run(folder) as run:
        train(load_config("train", [f"resume={run}"]))
        content = read_checkpoint(last_checkpoint(Path(run)))
    assert content["global_step"] == STEPS
    return digest(content["state_dict"])


def evaluated(folder: Path) -> dict[str, Any]:
    """Perplexity, bits per byte and a greedy story of KEPT_RUN as it is, in `folder`."""
    few = StoriesConfig(prompts=("Once upon a time",), temperatures=(0.0,), n=1, max_tokens=40)
    with kept_run(folder) as run:
        evaluation = evaluate(Run.load(run), EvaluationConfig(stories=few))
    return {
        "perplexity": evaluation.perplexity,
        "bits_per_byte": evaluation.bits_per_byte,
        "story": evaluation.temperatures[0].stories[0]["text"],
    }


# ---------------------------------------------------------------------------- settings


def settings() -> dict[str, Any]:
    """What `--cfg job --resolve` prints, without and with each experiment, with nulls resolved."""
    names = sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml"))
    return {name: _resolved([f"experiment={name}"] if name else []) for name in ("", *names)}


def _resolved(words: list[str]) -> dict[str, Any]:
    """Composed settings in which the dataclasses have replaced None by what it stands for."""
    config, values = plain(load_config("train", words)), compose_values("train", words)[0]
    for section, own in values.items():
        for name, value in own.items() if isinstance(own, dict) else ():
            own[name] = config[section].get(name) if value is None else value
    return values
