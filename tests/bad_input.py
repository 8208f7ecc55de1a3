"""Mistakes and malicious files, each with the names that the error message must hold.

A case is (command, a function that breaks something before, one name or several). A name is that of
a setting, file or option, or what to type instead, never a sentence. Commands run in a folder with
train.txt, valid.txt, the run runs/tiny and its export, out. TINY stands for the settings of that
run. Cases are grouped by what is wrong: settings, stories, runs and checkpoints, verbs.
"""

import gzip
import io
import json
import lzma
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Break = Callable[[Path], Any]
Names = str | tuple[str, ...]
Case = tuple[str, Break | None, Names]

BEST = "runs/tiny/checkpoints/best.ckpt"
LAST = "runs/tiny/checkpoints/last.ckpt"


# ---------------------------------------------------------------------------- ways to break things


def write(name: str, content: bytes | str) -> Break:
    """Write or replace a file."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda here: (here / name).write_bytes(data)


def remove(name: str) -> Break:
    """Remove a file or folder."""

    def act(here: Path) -> None:
        path = here / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return act


def folder(name: str) -> Break:
    """Put a folder where a file should be."""

    def act(here: Path) -> None:
        (here / name).unlink(missing_ok=True)
        (here / name).mkdir(parents=True)

    return act


def link(name: str, target: str) -> Break:
    """Replace a path by a link; `target` is relative to the folder of the commands."""

    def act(here: Path) -> None:
        remove(name)(here)
        (here / name).symlink_to((here / target).resolve())

    return act


def pipe(name: str) -> Break:
    """Put a named pipe without a writer there, whose reader would wait forever."""

    def act(here: Path) -> None:
        (here / name).unlink(missing_ok=True)
        os.mkfifo(here / name)

    return act


def cut(name: str, share: float) -> Break:
    """Keep the first `share` of a file."""

    def act(here: Path) -> None:
        content = (here / name).read_bytes()
        (here / name).write_bytes(content[: int(share * len(content))])

    return act


def checkpoint(change: Callable[[dict], Any], name: str = BEST) -> Break:
    """Change the content of a checkpoint and save it with torch."""

    def act(here: Path) -> None:
        content = torch.load(here / name, weights_only=True)
        changed = change(content)
        torch.save(content if changed is None else changed, here / name)

    return act


def model_setting(name: str, value: Any) -> Break:
    return checkpoint(lambda c: c["hyper_parameters"]["model"].__setitem__(name, value))


def edit_json(name: str, change: Callable[[dict], Any]) -> Break:
    def act(here: Path) -> None:
        content = json.loads((here / name).read_text(encoding="utf-8"))
        changed = change(content)
        (here / name).write_text(json.dumps(content if changed is None else changed))

    return act


def edit(name: str, old: str, new: str) -> Break:
    """Replace `old` by `new` in a text file."""

    def act(here: Path) -> None:
        text = (here / name).read_text(encoding="utf-8")
        assert old in text
        (here / name).write_text(text.replace(old, new), encoding="utf-8")

    return act


class Payload:
    """An object that writes a file when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch ran-code",)


def zip_bomb(here: Path) -> None:
    """Write a checkpoint of 20 kB whose one tensor unpacks to 20 MB."""
    plain = io.BytesIO()
    torch.save({"state_dict": {}, "hyper_parameters": {}}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(
        here / BEST, "w", zipfile.ZIP_DEFLATED
    ) as new:  # fmt: skip
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
        with new.open("archive/data/0", "w") as file:
            for _ in range(20):
                file.write(bytes(1 << 20))


def overlapping_zip(here: Path) -> None:
    """Write an archive that lists the same bytes a thousand times under different names."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as new:
        new.writestr("archive/data.pkl", bytes(1 << 16))
        (part,) = new.infolist()
        for i in range(1000):
            again = zipfile.ZipInfo(f"archive/data/{i}")
            again.CRC, again.file_size = part.CRC, part.file_size
            again.compress_size, again.header_offset = part.compress_size, part.header_offset
            new.filelist.append(again)
        new._didModify = True  # type: ignore[attr-defined]
    (here / BEST).write_bytes(packed.getvalue())


def packed_bomb(name: str) -> Break:
    """Stories that unpack to 70 MB, one after the other, none of them too long.

    The file is the same compressed megabyte 70 times, which both formats allow.
    """

    def act(here: Path) -> None:
        compress = lzma.compress if name.endswith(".xz") else gzip.compress
        megabyte = (b"a" * 1000 + b"<|endoftext|>") * 1035
        (here / name).write_bytes(70 * compress(megabyte))

    return act


def endless_line(here: Path) -> None:
    """One story of 66 MB without an end."""
    (here / "line.jsonl").write_bytes(b'{"text": "' + bytes([97]) * (66 << 20))


def safetensors_header(header: bytes, length: int | None = None) -> Break:
    size = len(header) if length is None else length
    return write("out/model.safetensors", struct.pack("<Q", size) + header)


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
DEEP = "[" * 200_000


# ---------------------------------------------------------------------------- settings

SETTINGS: list[Case] = [
    ("train.py TINY modle=small", None, ("modle", "model")),
    ("train.py TINY model=tiny", None, ("model=tiny", "model=medium")),
    ("train.py TINY model=../../etc/passwd", None, ("model=../../etc/passwd", "model=large")),
    ("train.py TINY model.d_modle=32", None, ("model.d_modle", "model.d_model")),
    ("train.py TINY +model.extra=1", None, "model.extra"),
    ("train.py TINY ++extra=1", None, "extra"),
    ("train.py TINY model.d_model=abc", None, ("model.d_model", "abc")),
    ("train.py TINY model.d_model=16.5", None, ("model.d_model", "16.5")),
    ("train.py TINY model.d_model=null", None, "model.d_model"),
    ("train.py TINY model.d_model=true", None, "model.d_model"),
    ("train.py TINY model.d_model=[16]", None, ("model.d_model", "[16]")),
    ("train.py TINY model.d_model=15", None, ("d_model", "15", "n_heads")),
    ("train.py TINY model.d_model=0", None, "d_model"),
    ("train.py TINY model.d_model=-16", None, ("d_model", "-16")),
    ("train.py TINY model.d_model=1e12", None, "d_model"),
    ("train.py TINY model.n_layers=1e12", None, "n_layers"),
    ("train.py TINY model.context_length=1e15", None, "context_length"),
    ("train.py TINY model.n_heads=3", None, ("d_model", "n_heads")),
    ("train.py TINY model.dropout=1", None, "dropout"),
    ("train.py TINY model.dropout=nan", None, ("model.dropout", "nan")),
    ("train.py TINY model.embedding_scale=-1", None, "embedding_scale"),
    ("train.py TINY model.residual_init=0", None, ("residual_init", "scaled", "wide", "zero")),
    ("train.py TINY model.attention=sdpa", None, ("model.attention", "trainer.kernels")),
    ("train.py TINY trainer.kernels=flash", None, ("trainer.kernels", "auto", "torch", "cpu")),
    ("train.py TINY 'trainer.kernels=\"a\nb\"'", None, ("trainer.kernels", "auto", "torch", "cpu")),
    ("train.py TINY model.vocab_size=10", None, ("model.vocab_size=10", "300", "data.vocab_size")),
    ("train.py TINY 'name=a/b'", None, ("name", "a/b", "runs_dir")),
    ("train.py TINY 'name=..'", None, ("name", "..", "runs_dir")),
    ("train.py TINY 'name=\"\"'", None, ("name", "200")),
    ("train.py TINY name=tiny", None, ("resume=runs/tiny", "name=")),
    ("train.py TINY 'name=\"a\nb\"'", None, ("name", "200")),
    ("train.py TINY 'name=\"a\x1b[31mb\"'", None, ("name", "200")),
    (f"train.py TINY name={'n' * 300}", None, ("name", "200")),
    ("train.py TINY runs_dir=train.txt", None, ("train.txt", "runs_dir")),
    ("train.py TINY runs_dir=", None, "runs_dir"),
    ("train.py TINY seed=-1", None, ("seed", "-1", "4294967295")),
    ("train.py TINY seed=1e30", None, ("seed", "4294967295")),
    ("train.py TINY seed=one", None, ("seed", "one")),
    ("train.py TINY budget.tokens=0", None, "tokens"),
    ("train.py TINY budget.tokens=10", None, ("budget.tokens=64", "data.batch_size")),
    ("train.py TINY budget.tokens=inf", None, "budget.tokens"),
    ("train.py TINY budget=5", None, ("budget=5", "budget.")),
    ("train.py TINY optimizer.lr=nan", None, ("optimizer.lr", "nan")),
    ("train.py TINY optimizer.lr=-1", None, ("optimizer", "lr")),
    ("train.py TINY optimizer.beta1=1", None, "beta1"),
    ("train.py TINY optimizer.schedule=step", None, ("schedule", "cosine", "linear")),
    ("train.py TINY optimizer.warmup_steps=1000", None, "optimizer.warmup_steps=2"),
    ("train.py TINY optimizer.warmup_tokens=1e6", None, "optimizer.warmup_tokens=128"),
    ("train.py TINY optimizer.warmup_tokens=-1", None, "optimizer.warmup_tokens"),
    ("train.py TINY optimizer.grad_clip=-1", None, "grad_clip"),
    ("train.py TINY optimizer.cycles=-1", None, "optimizer.cycles=-1"),
    (
        "train.py TINY optimizer.cycles=10",
        None,
        ("optimizer.cycles=10", "optimizer.cycle_share=0.05"),
    ),
    ("train.py TINY optimizer.cycles=9", None, "optimizer.warmup_steps=0"),
    (
        "train.py TINY optimizer.cycles=2 optimizer.cycle_share=0.01",
        None,
        ("optimizer.cycle_share=0.01", "optimizer.cycle_share=0.0501"),
    ),
    ("train.py TINY optimizer.cycle_share=1", None, "optimizer.cycle_share=1"),
    ("train.py TINY optimizer.cycle_lr=0", None, ("optimizer.cycle_lr=0", "final_lr", "1")),
    ("train.py TINY callbacks.snapshots=1", None, ("callbacks.snapshots=1", "2")),
    (
        "train.py TINY callbacks.snapshots=22",
        None,
        ("callbacks.snapshots=22", "callbacks.snapshots=21"),
    ),
    ("train.py TINY optimizer.weight_decay=-1", None, "weight_decay"),
    ("train.py TINY optimizer.final_weight_decay=-1", None, "final_weight_decay"),
    ("train.py TINY optimizer.normalize_rows=true", None, ("normalize_rows", "before", "after")),
    ("train.py TINY optimizer=adamw optimizer.normalize_rows=after", None, "normalize_rows"),
    ("train.py TINY optimizer=sgd", None, ("optimizer=sgd", "optimizer=adamw", "optimizer=muon")),
    ("train.py TINY trainer.precision=8", None, ("precision", "32-true", "bf16-mixed", "16-mixed")),
    ("train.py TINY trainer.devices=0", None, ("devices", "auto")),
    ("train.py TINY trainer.accelerator=tpu", None, ("accelerator", "tpu", "cpu", "gpu", "mps")),
    ("train.py TINY trainer.accelerator=gpu", None, "trainer.accelerator=gpu"),
    ("train.py TINY trainer.max_steps=3", None, ("trainer.max_steps", "budget.tokens=192")),
    ("train.py TINY trainer.n_validations=0", None, "n_validations"),
    ("train.py TINY data.batch_size=0", None, "batch_size"),
    ("train.py TINY data.batch_size=1e12", None, "budget.tokens=16000000000000"),
    ("train.py TINY data.vocab_size=3", None, ("data.vocab_size=3000", "257", "65536")),
    ("train.py TINY data.vocab_size=1e6", None, ("data.vocab_size=3000", "257", "65536")),
    ("train.py TINY data.holdout=1", None, "holdout"),
    ("train.py TINY data.noise=2", None, ("data.noise", "2")),
    ("train.py TINY data.noise=-0.1", None, ("noise", "-0.1")),
    ("train.py TINY data.max_stories=0", None, ("max_stories", "0")),
    ("train.py TINY data.separator=", None, ("separator", "<|endoftext|>")),
    ("train.py TINY trainer.max_steps=-1", None, ("max_steps", "budget.tokens")),
    ("train.py TINY 'callbacks.prompts=a, b'", None, "'callbacks.prompts=[\"a, b\"]'"),
    ("train.py TINY callbacks.prompts=[a,,b]", None, "'callbacks.prompts=[a,b]'"),
    ("train.py TINY callbacks.prompts=[Once upon]", None, "'callbacks.prompts=[Once upon]'"),
    ("train.py TINY model=small,large", None, ("model=small,large", "-m")),
    ("train.py TINY größe=3", None, "größe"),
    ("train.py TINY 'name=a${'", None, r"""'name="a\${"'"""),
    (
        "train.py resume=runs/tiny budget.tokens=2560",
        None,
        ("init_from=runs/tiny", "budget.tokens"),
    ),
    ("train.py TINY logger=mlflow", None, ("logger=mlflow", "logger=csv")),
    ("train.py TINY --model large", None, ("model=large", "--model")),
    ("train.py TINY --modle=large", None, ("modle", "model")),
    ("train.py TINY 'a b'", None, ("a b", "key=value")),
    ("train.py TINY -model=large", None, ("model=large", "-model=large")),
    ("train.py TINY model=small=large", None, "model=small=large"),
    ("train.py TINY =5", None, "key=value"),
    ("train.py TINY '${oc.env:HOME}=5'", None, "${oc.env:HOME}"),
    ("train.py TINY 'name=${oc.env:NOT_SET}'", None, "NOT_SET"),
    ("train.py TINY 'name=${nowhere}'", None, ("name", "nowhere", r"\${")),
    ("train.py TINY 'seed=${seed}'", None, "interpolation"),
    ("train.py resume=auto data=text data.train_files=[train.txt]", None, ("resume=auto", "name=")),
    ("train.py resume=runs/tiny seed=5", None, ("resume", "seed=5")),
    ("train.py resume=runs/nobody", None, "runs/nobody"),
    ("train.py resume=", None, "resume"),
    ("train.py TINY init_from=runs/tiny model.d_ff=64", None, ("init_from", "model.d_ff=32")),
    ("train.py TINY init_from=runs/nobody", None, "runs/nobody"),
    ("train.py TINY init_from=train.txt", None, "train.txt"),
    ("train.py TINY init_from=", None, "init_from"),
    ("train.py TINY teacher=runs/nobody", None, "runs/nobody"),
    ("train.py TINY teacher=train.txt", None, ("teacher.runs", "train.txt")),
    ("train.py TINY teacher=", None, "teacher"),
    ("train.py TINY teacher=runs/tiny teacher.weight=2", None, "teacher.weight"),
    ("train.py TINY teacher=runs/tiny teacher.temperature=0", None, "teacher.temperature"),
    ("train.py TINY name=tiny teacher=runs/tiny", None, ("teacher.runs", "runs/tiny")),
    ("train.py resume=runs/tiny teacher=runs/tiny", None, ("teacher.runs", "runs/tiny")),
]

# ---------------------------------------------------------------------------- stories

_FILES = "train.py TINY data.valid_files=[valid.txt] data.train_files"
STORIES: list[Case] = [
    (f"{_FILES}=[nowhere.txt]", None, ("nowhere.txt", "data.train_files")),
    (f"{_FILES}=[*.md]", None, ("*.md", "data.train_files")),
    (f"{_FILES}=[runs]", None, ("runs", "data.train_files", "runs/*.txt")),
    (f"{_FILES}=[]", None, "data.train_files"),
    (f"{_FILES}=[x.pdf]", write("x.pdf", "%PDF"), ("x.pdf", "PDF", ".txt")),
    (f"{_FILES}=[x.zip]", write("x.zip", "PK"), ("x.zip", "zip archive")),
    (f"{_FILES}=[x.docx]", write("x.docx", "PK"), ("x.docx", "Word document")),
    (f"{_FILES}=[x.tar.gz]", write("x.tar.gz", gzip.compress(b"a")), ("x.tar.gz", "tar archive")),
    (f"{_FILES}=[x.log]", write("x.log", "Once"), ("x.log", ".txt", ".parquet")),
    (f"{_FILES}=[x.json]", write("x.json", '["a", "b"'), ("x.json", "2")),
    (f"{_FILES}=[x.csv]", write("x.csv", "a,b\nc,d"), ("x.csv", "a", "b", "data.field")),
    (
        f"{_FILES}=[x.csv] data.field=c",
        write("x.csv", "a,b\nc,d"),
        ("x.csv", "a", "b", "data.field"),
    ),
    (f"{_FILES}=[x.parquet]", write("x.parquet", "PAR1"), "x.parquet"),
    ("train.py data=hf", None, ("data.dataset", "data=hf")),
    (f"{_FILES}=[valid.txt]", None, ("valid.txt", "data.train_files", "data.valid_files")),
    (f"{_FILES}=5", None, "data.train_files"),
    (f"{_FILES}=['a\\0b.txt']", None, ("b.txt", "data.train_files")),
    (f"{_FILES}=[{'n' * 5000}.txt]", None, ("nnnnn", "data.train_files")),
    (f"{_FILES}=[x.txt]", write("x.txt", ""), "x.txt"),
    (f"{_FILES}=[x.txt]", write("x.txt", " \n\n\t<|endoftext|> \n"), "x.txt"),
    (f"{_FILES}=[x.txt]", write("x.txt", b"Tom\xff had"), ("x.txt", "UTF-8", "0xff", "3")),
    (f"{_FILES}=[x.txt]", write("x.txt", "Tom".encode("utf-16")), ("x.txt", "UTF-16")),
    (f"{_FILES}=[x.txt]", write("x.txt", "a\ud800b<|endoftext|>"), ("x.txt", "UTF-8", "0xed")),
    (f"{_FILES}=[x.txt]", write("x.txt", bytes(range(256)) * 50), ("x.txt", "binary", "NUL")),
    (f"{_FILES}=[x.txt]", pipe("x.txt"), ("x.txt", "data.train_files")),
    (f"{_FILES}=[x.jsonl]", write("x.jsonl", "Once upon\n"), ("x.jsonl, line 1", "JSON")),
    (f"{_FILES}=[x.jsonl]", write("x.jsonl", '{"a": 1}\n'), ("x.jsonl, line 1", "story", "text")),
    (f"{_FILES}=[x.jsonl]", write("x.jsonl", '{"text": 5}\n'), ("x.jsonl, line 1", "5")),
    (f"{_FILES}=[x.jsonl]", write("x.jsonl", '"\\ud800"\n'), ("x.jsonl, line 1", "\\ud800")),
    (f"{_FILES}=[x.jsonl]", write("x.jsonl", f"{DEEP}\n"), ("x.jsonl, line 1", "JSON")),
    (f"{_FILES}=[x.jsonl]", write("x.jsonl", "NaN\n"), ("x.jsonl, line 1", "nan")),
    (f"{_FILES}=[x.txt.xz]", write("x.txt.xz", "Once"), "x.txt.xz"),
    (f"{_FILES}=[x.txt.gz]", write("x.txt.gz", b"\x1f\x8b\x08\0"), "x.txt.gz"),
    (f"{_FILES}=[x.txt.gz]", write("x.txt.gz", gzip.compress(b"a" * 99)[:-9]), "x.txt.gz"),
    (f"{_FILES}=[x.txt.xz]", packed_bomb("x.txt.xz"), ("x.txt.xz", "200")),
    (f"{_FILES}=[x.txt.gz]", packed_bomb("x.txt.gz"), ("x.txt.gz", "200")),
    (f"{_FILES}=[line.jsonl]", endless_line, ("line.jsonl", "64")),
    (f"{_FILES}=[x.tar.xz]", write("x.tar.xz", "Once"), "x.tar.xz"),
    ("train.py data=text", None, "data.train_files"),
    ("train.py TINY data.cache_dir=train.txt", None, ("train.txt", "data.cache_dir")),
    ("train.py TINY data.cache_dir=/proc/cache", None, ("/proc/cache", "data.cache_dir")),
]

# ---------------------------------------------------------------------------- runs and checkpoints

_EVALUATE = "evaluate.py ckpt=runs/tiny"
_PICKLED = pickle.dumps(Payload(), protocol=2)
RUNS: list[Case] = [
    ("evaluate.py", None, "ckpt=runs/"),
    ("evaluate.py ckpt=nowhere", None, "nowhere"),
    ("evaluate.py ckpt=", None, "ckpt"),
    ("evaluate.py ckpt=train.txt", None, "train.txt"),
    ("evaluate.py ckpt=cache", None, ("cache", "checkpoints/best.ckpt")),
    ("evaluate.py ckpt=/dev/null", None, "/dev/null"),
    ("evaluate.py hf=nowhere", None, "hf=nowhere"),
    ("train.py logger.log_model=true", None, ("logger.log_model=true", "logger=wandb")),
    (f"{_EVALUATE} hf=cache", None, ("hf=cache", "ckpt")),
    (f"{_EVALUATE} data.valid_files=[a]", None, ("data.valid_files", "data=text")),
    (f"{_EVALUATE} chkpt=x", None, ("chkpt", "ckpt")),
    (f"{_EVALUATE} stride=0", None, ("stride", "16")),
    (f"{_EVALUATE} stride=17", None, ("stride", "17", "16")),
    (f"{_EVALUATE} stride=x", None, "stride"),
    (f"{_EVALUATE} stories.n=-1", None, ("stories", "-1")),
    (f"{_EVALUATE} data=text data.valid_files=[nowhere.txt]", None, ("nowhere.txt", "valid_files")),
    (f"evaluate.py ckpt={BEST}", write(BEST, ""), "best.ckpt"),
    (f"evaluate.py ckpt={BEST}", write(BEST, os.urandom(5000)), "best.ckpt"),
    (f"evaluate.py ckpt={BEST}", write(BEST, b"PK\x03\x04" + bytes(99)), "best.ckpt"),
    (f"evaluate.py ckpt={BEST}", cut(BEST, 0.5), "best.ckpt"),
    (f"evaluate.py ckpt={BEST}", cut(BEST, 0.99), "best.ckpt"),
    (f"evaluate.py ckpt={BEST}", write(BEST, _PICKLED), "best.ckpt"),
    (f"evaluate.py ckpt={BEST}", checkpoint(lambda c: {**c, "a": Payload()}), "best.ckpt"),
    (f"evaluate.py ckpt={BEST}", checkpoint(lambda c: [1]), "best.ckpt"),
    (f"evaluate.py ckpt={BEST}", checkpoint(lambda c: c.pop("state_dict") and None), "best.ckpt"),
    (f"evaluate.py ckpt={BEST}", checkpoint(lambda c: {**c, "state_dict": 5}), "best.ckpt"),
    (f"evaluate.py ckpt={BEST}", checkpoint(lambda c: {**c, "state_dict": {}}), "best.ckpt"),
    (f"evaluate.py ckpt={BEST}", checkpoint(lambda c: {**c, "state_dict": {"a": 1}}), "best.ckpt"),
    (f"evaluate.py ckpt={BEST}", checkpoint(lambda c: {**c, "hyper_parameters": 5}), "best.ckpt"),
    (f"evaluate.py ckpt={BEST}", model_setting("d_model", 32), "best.ckpt"),
    (f"evaluate.py ckpt={BEST}", model_setting("d_model", 2**40), "d_model"),
    (f"evaluate.py ckpt={BEST}", model_setting("n_layers", "two"), ("model.n_layers", "two")),
    (f"evaluate.py ckpt={BEST}", model_setting("unheard", 1), "model.unheard"),
    (f"evaluate.py ckpt={BEST}", zip_bomb, ("best.ckpt", "unpack")),
    (f"evaluate.py ckpt={BEST}", overlapping_zip, ("best.ckpt", "unpack")),
    (f"evaluate.py ckpt={BEST}", folder(BEST), "best.ckpt"),
    (_EVALUATE, link(BEST, "../elsewhere.ckpt"), "best.ckpt"),
    (_EVALUATE, link("runs/tiny/metrics.csv", "../target"), "metrics.csv"),
    ("train.py resume=runs/tiny", link("runs/tiny/train.log", "../target"), "train.log"),
    ("train.py resume=runs/tiny", link(LAST, "../elsewhere.ckpt"), "last.ckpt"),
    ("train.py resume=runs/tiny", remove("runs/tiny/config.yaml"), "config.yaml"),
    ("train.py resume=runs/tiny", write("runs/tiny/config.yaml", "a: ["), "config.yaml"),
    ("train.py resume=runs/tiny", write("runs/tiny/config.yaml", ALIASES), "config.yaml"),
    ("train.py resume=runs/tiny", write("runs/tiny/config.yaml", DEEP), "config.yaml"),
    ("train.py resume=runs/tiny", write("runs/tiny/config.yaml", b"\xff\xfe"), "config.yaml"),
    ("train.py resume=runs/tiny", write("runs/tiny/config.yaml", "a: 1\n" * 14_000), "config.yaml"),
    ("train.py resume=runs/tiny", write("runs/tiny/config.yaml", "a: !!int ''"), "config.yaml"),
    ("train.py resume=runs/tiny", write("runs/tiny/config.yaml", "a: !!bool x"), "config.yaml"),
    (
        "train.py resume=runs/tiny",
        write("runs/tiny/config.yaml", "a: !!python/object/apply:os.system ['touch ran-code']"),
        "config.yaml",
    ),
    (
        "train.py resume=runs/tiny",
        write("runs/tiny/config.yaml", "seed: 1"),
        ("config.yaml", "model"),
    ),
    (_EVALUATE, remove("runs/tiny/tokenizer.json"), "tokenizer.json"),
    (_EVALUATE, write("runs/tiny/tokenizer.json", ""), "tokenizer.json"),
    (_EVALUATE, write("runs/tiny/tokenizer.json", "{}"), "tokenizer.json"),
    (_EVALUATE, write("runs/tiny/tokenizer.json", DEEP), "tokenizer.json"),
    (_EVALUATE, write("runs/tiny/tokenizer.json", b"\xff\xfe{}"), "tokenizer.json"),
    (_EVALUATE, pipe("runs/tiny/tokenizer.json"), "tokenizer.json"),
    (_EVALUATE, folder("runs/tiny/tokenizer.json"), "tokenizer.json"),
    (
        _EVALUATE,
        edit_json("runs/tiny/tokenizer.json", lambda t: t["model"].update(type="WordPiece")),
        "tokenizer.json",
    ),
    (
        _EVALUATE,
        edit_json("runs/tiny/tokenizer.json", lambda t: t["model"].update(merges=[["q", "zzz"]])),
        "tokenizer.json",
    ),
    (
        _EVALUATE,
        edit_json("runs/tiny/tokenizer.json", lambda t: t["model"]["vocab"].update(extra=9**9)),
        "tokenizer.json",
    ),
    (
        _EVALUATE,
        edit_json("runs/tiny/tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"})),
        ("tokenizer.json", "BPE"),
    ),
    ("evaluate.py ckpt=out", write("out/model.safetensors", ""), "model.safetensors"),
    ("evaluate.py ckpt=out", cut("out/model.safetensors", 0.7), "model.safetensors"),
    ("evaluate.py ckpt=out", safetensors_header(b"{}", 2**62), "model.safetensors"),
    ("evaluate.py ckpt=out", safetensors_header(b"{}"), "model.safetensors"),
    ("evaluate.py ckpt=out", safetensors_header(b"not json"), "model.safetensors"),
    (
        "evaluate.py ckpt=out",
        safetensors_header(b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,99999]}}'),
        "model.safetensors",
    ),
    ("evaluate.py ckpt=out", remove("out/config.yaml"), ("out", "config.yaml")),
]

# ---------------------------------------------------------------------------- verbs

_GENERATE = "minigpt generate runs/tiny"
VERBS: list[Case] = [
    ("minigpt generat runs/tiny", None, "generate"),
    ("minigpt generate", None, ("run", "generate --help")),
    ("minigpt generate nowhere", None, "nowhere"),
    (f"{_GENERATE} --topk 5", None, ("--topk", "--top-k")),
    (f"{_GENERATE} --top-k", None, "--top-k"),
    (f"{_GENERATE} --top-k five", None, "--top-k"),
    (f"{_GENERATE} --top-k 0", None, "--top-k"),
    (f"{_GENERATE} --top-p nan", None, ("--top-p", "nan")),
    (f"{_GENERATE} --min-p -1", None, "--min-p"),
    (f"{_GENERATE} --temperature -1", None, "--temperature"),
    (f"{_GENERATE} --temperature inf", None, ("--temperature", "inf")),
    (f"{_GENERATE} --temperature 0 --top-p 0.5", None, ("--temperature", "--top-p")),
    (f"{_GENERATE} --temperature 0 --n 3", None, ("--temperature", "--n 3")),
    (f"{_GENERATE} --repetition-penalty 0", None, ("--repetition-penalty", "0.01", "100")),
    (f"{_GENERATE} --max-tokens -5", None, ("--max-tokens", "-5")),
    (f"{_GENERATE} --max-tokens 1e3", None, "--max-tokens"),
    (f"{_GENERATE} --n 0", None, "--n"),
    (f"{_GENERATE} --seed 1e99", None, "--seed"),
    (f"{_GENERATE} --seed 99999999999999999999999999", None, ("--seed", "99999999")),
    (f"{_GENERATE} --prompt \udcff", None, "xff"),
    (f"{_GENERATE} --prompt -", write("../x.stdin", b"a\xff"), ("UTF-8", "1")),
    (f"{_GENERATE} --dtype int8", None, ("--dtype", "int8", "float32", "bfloat16")),
    (f"{_GENERATE} Once upon", None, "--prompt 'Once upon'"),
    ("minigpt probe runs/tiny --k 0", None, "--k"),
    ("minigpt probe runs/tiny --analogy princess", None, "princess - girl + boy"),
    ("minigpt probe runs/tiny --analogy 'a - b'", None, ("a - b", "princess - girl + boy")),
    ("minigpt probe runs/tiny --analogy princess - girl + boy", None, "probe --help"),
    ("minigpt probe runs/tiny --out train.txt", None, ("--out", "train.txt")),
    ("minigpt scaling nowhere", None, "nowhere"),
    ("minigpt scaling cache", None, ("cache", "train")),
    (
        "minigpt scaling runs",
        write("runs/tiny/metrics.csv", "step,tokens\n1,x\n"),
        ("metrics.csv", "2"),
    ),
    ("minigpt scaling runs", write("runs/tiny/metrics.csv", b"\xff\n"), "metrics.csv"),
    ("minigpt scaling runs", write("runs/tiny/summary.json", DEEP), "summary.json"),
    ("minigpt scaling runs", write("runs/tiny/summary.json", "[]"), "summary.json"),
    (
        "minigpt scaling runs",
        write("runs/tiny/summary.json", '{"val/loss": "low"}'),
        ("summary.json", "val/loss", "low"),
    ),
    ("minigpt scaling runs", link("runs/tiny/summary.json", "../target"), ("summary.json", "link")),
    ("minigpt study runs/tiny --n 0", None, ("n", "0")),
    ("minigpt study nowhere", None, "nowhere"),
    ("minigpt export runs/tiny", None, ("out", "export --help")),
    ("minigpt export runs/tiny new --format pt", None, ("--format", "safetensors", "onnx", "gguf")),
    ("minigpt export runs/tiny new --dtype int8", None, ("--dtype", "int8", "bfloat16")),
    ("minigpt export runs/tiny new --format onnx --dtype bfloat16", None, ("dtype", "safetensors")),
    ("minigpt export runs/tiny train.txt", None, "train.txt"),
    ("minigpt export runs/tiny runs/tiny", None, ("runs/tiny", ".lock")),
    ("minigpt export runs/tiny runs", None, ("runs", "tiny")),
    ("minigpt export runs/tiny new --dry-run", None, ("--dry-run", "--push user/name")),
    ("minigpt export runs/tiny new --push ../../x --dry-run", None, ("push", "user/name")),
    ("minigpt export runs/tiny out", write("out/export.json", DEEP), "README.md"),
    ("minigpt export runs/tiny out", write("out/export.json", '{"files": [[1]]}'), "README.md"),
    ("minigpt export runs/tiny out", write("out/export.json", '{"files": 1}'), "README.md"),
    ("minigpt export out new", edit("out/config.yaml", "source: text", "source: [1]"), "source"),
    ("minigpt export out new", edit("out/config.yaml", "source:", "sauce:"), "data.source"),
    ("minigpt playground nowhere", None, "nowhere"),
    ("minigpt playground runs/tiny --port 70000", None, ("--port", "65535")),
    ("minigpt playground runs/tiny --auth name", None, ("--auth", "user:password")),
    (
        "minigpt playground runs/tiny --host 0.0.0.0 --allow-training",
        None,
        ("--allow-training", "--auth user:password"),
    ),
    ("minigpt playground runs/tiny --auth :secret", None, ("--auth", "user:password")),
]

CASES = SETTINGS + STORIES + RUNS + VERBS
