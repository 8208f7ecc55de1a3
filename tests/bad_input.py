"""What people get wrong and what enemies send: each with the words that must be in the answer.

A case is (command, what is broken before, words of the message). Commands run in a folder with
train.txt, valid.txt, the run runs/tiny and an export of it, out; TINY stands for the settings of
that run. Rows are grouped by what is wrong: settings, stories, runs and checkpoints, verbs.
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
Case = tuple[str, Break | None, str]

BEST = "runs/tiny/checkpoints/best.ckpt"
LAST = "runs/tiny/checkpoints/last.ckpt"


# ---------------------------------------------------------------------------- ways to break things


def write(name: str, content: bytes | str) -> Break:
    """A file with that content, in place of what was there."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda here: (here / name).write_bytes(data)


def remove(name: str) -> Break:
    """No such file or folder any more."""

    def act(here: Path) -> None:
        path = here / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return act


def folder(name: str) -> Break:
    """A folder where a file should be."""

    def act(here: Path) -> None:
        (here / name).unlink(missing_ok=True)
        (here / name).mkdir(parents=True)

    return act


def link(name: str, target: str) -> Break:
    """A link in place of what was there; `target` is taken from the folder above."""

    def act(here: Path) -> None:
        remove(name)(here)
        (here / name).symlink_to((here / target).resolve())

    return act


def pipe(name: str) -> Break:
    """A named pipe that nobody writes to: reading it would wait for ever."""

    def act(here: Path) -> None:
        (here / name).unlink(missing_ok=True)
        os.mkfifo(here / name)

    return act


def cut(name: str, share: float) -> Break:
    """The first part of a file."""

    def act(here: Path) -> None:
        content = (here / name).read_bytes()
        (here / name).write_bytes(content[: int(share * len(content))])

    return act


def checkpoint(change: Callable[[dict], Any], name: str = BEST) -> Break:
    """A checkpoint whose content was changed, well written by torch."""

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
    """A text file in which `old` became `new`."""

    def act(here: Path) -> None:
        text = (here / name).read_text(encoding="utf-8")
        assert old in text
        (here / name).write_text(text.replace(old, new), encoding="utf-8")

    return act


class Payload:
    """Unpickled, it makes a file that gives it away."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch ran-code",)


def zip_bomb(here: Path) -> None:
    """A checkpoint of 20 kB whose one tensor unpacks to 20 MB."""
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
    """An archive that lists the same bytes a thousand times under other names."""
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
    """Stories that unpack to 70 MB, one after the other, none of them too long."""

    def act(here: Path) -> None:
        opener: Any = lzma.open if name.endswith(".xz") else gzip.open
        fast: Any = {"preset": 0} if name.endswith(".xz") else {}
        with opener(here / name, "wb", **fast) as file:
            for _ in range(70):
                file.write((b"a" * 1000 + b"<|endoftext|>") * 1035)

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
    ("train.py TINY modle=small", None, "unknown setting 'modle': did you mean model"),
    ("train.py TINY model=tiny", None, "unknown option 'model=tiny'"),
    ("train.py TINY model=../../etc/passwd", None, "unknown option 'model=../../etc"),
    ("train.py TINY model.d_modle=32", None, "did you mean model.d_model"),
    ("train.py TINY +model.extra=1", None, "unknown setting 'model.extra'"),
    ("train.py TINY ++extra=1", None, "unknown setting 'extra'"),
    ("train.py TINY ~model", None, "model"),
    ("train.py TINY model.d_model=abc", None, "model.d_model='abc': expected a whole number"),
    ("train.py TINY model.d_model=16.5", None, "expected a whole number"),
    ("train.py TINY model.d_model=null", None, "expected a whole number"),
    ("train.py TINY model.d_model=true", None, "expected a whole number"),
    ("train.py TINY model.d_model=[16]", None, "expected a whole number"),
    ("train.py TINY model.d_model=15", None, "not divisible by n_heads"),
    ("train.py TINY model.d_model=0", None, "must be at least 1"),
    ("train.py TINY model.d_model=-16", None, "must be at least 1"),
    ("train.py TINY model.d_model=1e12", None, "more than 1e+09: take a smaller d_model"),
    ("train.py TINY model.n_layers=1e12", None, "more than 1e+09"),
    ("train.py TINY model.context_length=1e15", None, "more than 1e+09"),
    ("train.py TINY model.n_heads=3", None, "not divisible by n_heads 3"),
    ("train.py TINY model.dropout=1", None, "dropout 1.0 is not in [0, 1)"),
    ("train.py TINY model.dropout=nan", None, "expected a finite number"),
    ("train.py TINY model.embedding_scale=-1", None, "must be positive"),
    ("train.py TINY model.attention=flash", None, "choose from auto, sdpa, matmul"),
    ("train.py TINY 'model.attention=\"a\nb\"'", None, "choose from auto, sdpa, matmul"),
    ("train.py TINY model.vocab_size=10", None, "less than the"),
    ("train.py TINY 'name=a/b'", None, "is a folder's name under runs_dir, not a path"),
    ("train.py TINY 'name=..'", None, "is a folder's name under runs_dir, not a path"),
    ("train.py TINY 'name=\"\"'", None, "must be a folder's name"),
    ("train.py TINY name=tiny", None, "exists: go on with it by resume="),
    ("train.py TINY 'name=\"a\nb\"'", None, "name"),
    ("train.py TINY 'name=\"a\x1b[31mb\"'", None, "name"),
    (f"train.py TINY name={'n' * 300}", None, "name"),
    ("train.py TINY runs_dir=train.txt", None, "train.txt"),
    ("train.py TINY runs_dir=", None, "runs_dir"),
    ("train.py TINY seed=-1", None, "seed -1 must be between 0"),
    ("train.py TINY seed=1e30", None, "seed"),
    ("train.py TINY seed=one", None, "expected a whole number"),
    ("train.py TINY budget.tokens=0", None, "must be at least 1"),
    ("train.py TINY budget.tokens=10", None, "is less than one step of 64 tokens"),
    ("train.py TINY budget.tokens=inf", None, "expected"),
    ("train.py TINY budget=5", None, "budget"),
    ("train.py TINY optimizer.lr=nan", None, "expected a finite number"),
    ("train.py TINY optimizer.lr=-1", None, "lr"),
    ("train.py TINY optimizer.beta1=1", None, "beta1"),
    ("train.py TINY optimizer.schedule=step", None, "choose from cosine, linear"),
    ("train.py TINY optimizer.warmup_steps=1000", None, "type optimizer.warmup_steps=2 or"),
    ("train.py TINY optimizer.grad_clip=-1", None, "grad_clip"),
    ("train.py TINY optimizer.weight_decay=-1", None, "weight_decay"),
    ("train.py TINY optimizer=sgd", None, "did you mean optimizer=adamw or optimizer=muon"),
    ("train.py TINY trainer.precision=8", None, "choose from auto, 32-true"),
    ("train.py TINY trainer.devices=0", None, "devices 0 must be auto or a number"),
    ("train.py TINY trainer.accelerator=tpu", None, "choose from auto, cpu, gpu, mps"),
    ("train.py TINY trainer.accelerator=gpu", None, "gpu"),
    ("train.py TINY trainer.max_steps=3", None, "type budget.tokens=192 instead"),
    ("train.py TINY trainer.n_validations=0", None, "must be at least 1"),
    ("train.py TINY data.batch_size=0", None, "must be at least 1"),
    ("train.py TINY data.batch_size=1e12", None, "is less than one step"),
    ("train.py TINY data.vocab_size=3", None, "vocab_size"),
    ("train.py TINY data.vocab_size=1e6", None, "vocab_size"),
    ("train.py TINY data.holdout=1", None, "between 0 and 1"),
    ("train.py TINY data.separator=", None, "separator is empty"),
    ("train.py TINY trainer.max_steps=-1", None, "max_steps -1: leave it out"),
    ("train.py TINY callbacks.prompts=[]x", None, "cannot read"),
    ("train.py TINY logger=mlflow", None, "unknown option 'logger=mlflow'"),
    ("train.py TINY --model large", None, "without dashes: type model=large"),
    ("train.py TINY --model=large", None, "type model=large, not --model=large"),
    ("train.py TINY 'a b'", None, "cannot read 'a b': settings are typed as key=value"),
    ("train.py TINY -model=large", None, "without dashes"),
    ("train.py TINY model=small=large", None, "model"),
    ("train.py TINY =5", None, "a setting has no name"),
    ("train.py TINY '${oc.env:HOME}=5'", None, "cannot read"),
    ("train.py TINY 'name=${oc.env:NOT_SET}'", None, "NOT_SET"),
    ("train.py TINY 'name=${nowhere}'", None, "nowhere"),
    ("train.py TINY 'seed=${seed}'", None, "Recursive interpolation"),
    ("train.py resume=auto data=text data.train_files=[train.txt]", None, "add name=<run>"),
    ("train.py resume=runs/tiny seed=5", None, "leave out seed=5"),
    ("train.py resume=runs/nobody", None, "runs/nobody"),
    ("train.py resume=", None, "resume"),
    (
        "train.py TINY init_from=runs/tiny model.d_ff=64",
        None,
        "another shape than the model that is asked for: type model.d_ff=32",
    ),
    ("train.py TINY init_from=runs/nobody", None, "runs/nobody does not exist"),
    ("train.py TINY init_from=train.txt", None, "train.txt"),
    ("train.py TINY init_from=", None, "init_from is empty"),
]

# ---------------------------------------------------------------------------- stories

_FILES = "train.py TINY data.valid_files=[valid.txt] data.train_files"
STORIES: list[Case] = [
    (f"{_FILES}=[nowhere.txt]", None, "no file nowhere.txt in"),
    (f"{_FILES}=[*.md]", None, "no file *.md in"),
    (f"{_FILES}=[runs]", None, "runs is a folder: name its files"),
    (f"{_FILES}=[]", None, "train_files"),
    (f"{_FILES}=[x.pdf]", write("x.pdf", "Once"), "cannot read '.pdf' files; convert it to .txt"),
    (f"{_FILES}=[valid.txt]", None, "validation needs stories that training never sees"),
    (f"{_FILES}=5", None, "expected a list"),
    (f"{_FILES}=['a\\0b.txt']", None, "a"),
    (f"{_FILES}=[{'n' * 5000}.txt]", None, "is not a path"),
    (f"{_FILES}=[x.txt]", write("x.txt", ""), "x.txt has no story in it"),
    (f"{_FILES}=[x.txt]", write("x.txt", " \n\n\t<|endoftext|> \n"), "x.txt has no story in it"),
    (f"{_FILES}=[x.txt]", write("x.txt", "One story without an end."), "no separator"),
    (f"{_FILES}=[x.txt]", write("x.txt", b"Tom\xff had"), "not UTF-8 (byte 0xff at offset 3)"),
    (f"{_FILES}=[x.txt]", write("x.txt", "Tom".encode("utf-16")), "iconv -f UTF-16"),
    (f"{_FILES}=[x.txt]", write("x.txt", "a\ud800b<|endoftext|>"), "not UTF-8 (byte 0xed"),
    (f"{_FILES}=[x.txt]", write("x.txt", bytes(range(256)) * 50), "not UTF-8"),
    (f"{_FILES}=[x.txt]", pipe("x.txt"), "no file x.txt"),
    (f"{_FILES}=[x.jsonl]", write("x.jsonl", "Once upon\n"), "x.jsonl:1: not JSON"),
    (f"{_FILES}=[x.jsonl]", write("x.jsonl", '{"a": 1}\n'), "no 'story' or 'text' (keys: a)"),
    (f"{_FILES}=[x.jsonl]", write("x.jsonl", '{"text": 5}\n'), "x.jsonl:1: not a text"),
    (f"{_FILES}=[x.jsonl]", write("x.jsonl", '"\\ud800"\n'), "half a character; write the pair"),
    (f"{_FILES}=[x.jsonl]", write("x.jsonl", f"{DEEP}\n"), "x.jsonl:1: not JSON (nested too"),
    (f"{_FILES}=[x.jsonl]", write("x.jsonl", "NaN\n"), "x.jsonl:1: not a text"),
    (f"{_FILES}=[x.txt.xz]", write("x.txt.xz", "Once"), "x.txt.xz is damaged or cut short"),
    (f"{_FILES}=[x.txt.gz]", write("x.txt.gz", b"\x1f\x8b\x08\0"), "is damaged or cut short"),
    (f"{_FILES}=[x.txt.gz]", write("x.txt.gz", gzip.compress(b"a" * 99)[:-9]), "is damaged"),
    (f"{_FILES}=[x.txt.xz]", packed_bomb("x.txt.xz"), "unpacks to more than 200 times its size"),
    (f"{_FILES}=[x.txt.gz]", packed_bomb("x.txt.gz"), "unpacks to more than 200 times its size"),
    (f"{_FILES}=[line.jsonl]", endless_line, "a line of more than 64 MB"),
    (f"{_FILES}=[x.tar.xz]", write("x.tar.xz", "Once"), "is damaged or cut short"),
    ("train.py data=text", None, "data.train_files"),
    ("train.py TINY data.cache_dir=train.txt", None, "cannot write"),
    ("train.py TINY data.cache_dir=/proc/cache", None, "cannot write"),
]

# ---------------------------------------------------------------------------- runs and checkpoints

_EVALUATE = "evaluate.py ckpt=runs/tiny"
_PICKLED = pickle.dumps(Payload(), protocol=2)
RUNS: list[Case] = [
    ("evaluate.py", None, "give the run to evaluate: python evaluate.py ckpt=runs/<name>"),
    ("evaluate.py ckpt=nowhere", None, "nowhere does not exist"),
    ("evaluate.py ckpt=", None, "ckpt"),
    ("evaluate.py ckpt=train.txt", None, "train.txt is not a checkpoint, or is cut short"),
    ("evaluate.py ckpt=cache", None, "holds no checkpoints/best.ckpt"),
    ("evaluate.py ckpt=/dev/null", None, "/dev/null does not exist"),
    (f"{_EVALUATE} data.valid_files=[a]", None, "not a setting of the chosen data: add data=text"),
    (f"{_EVALUATE} chkpt=x", None, "unknown setting 'chkpt': did you mean ckpt"),
    (f"{_EVALUATE} stride=0", None, "stride"),
    (f"{_EVALUATE} stride=17", None, "stride"),
    (f"{_EVALUATE} stride=x", None, "expected a whole number"),
    (f"{_EVALUATE} stories.n=-1", None, "stories"),
    (f"{_EVALUATE} data=text data.valid_files=[nowhere.txt]", None, "no file nowhere.txt"),
    (f"evaluate.py ckpt={BEST}", write(BEST, ""), "is not a checkpoint"),
    (f"evaluate.py ckpt={BEST}", write(BEST, os.urandom(5000)), "is not a checkpoint"),
    (f"evaluate.py ckpt={BEST}", write(BEST, b"PK\x03\x04" + bytes(99)), "is not a checkpoint"),
    (f"evaluate.py ckpt={BEST}", cut(BEST, 0.5), "is not a checkpoint, or is cut short"),
    (f"evaluate.py ckpt={BEST}", cut(BEST, 0.99), "is not a checkpoint, or is cut short"),
    (f"evaluate.py ckpt={BEST}", write(BEST, _PICKLED), "asks to run code"),
    (f"evaluate.py ckpt={BEST}", checkpoint(lambda c: {**c, "a": Payload()}), "asks to run code"),
    (f"evaluate.py ckpt={BEST}", checkpoint(lambda c: [1]), "holds no weights and settings"),
    (f"evaluate.py ckpt={BEST}", checkpoint(lambda c: c.pop("state_dict") and None), "no weights"),
    (f"evaluate.py ckpt={BEST}", checkpoint(lambda c: {**c, "state_dict": 5}), "weights"),
    (f"evaluate.py ckpt={BEST}", checkpoint(lambda c: {**c, "state_dict": {}}), "another model"),
    (f"evaluate.py ckpt={BEST}", checkpoint(lambda c: {**c, "state_dict": {"a": 1}}), "another"),
    (f"evaluate.py ckpt={BEST}", checkpoint(lambda c: {**c, "hyper_parameters": 5}), "settings"),
    (f"evaluate.py ckpt={BEST}", model_setting("d_model", 32), "another"),
    (f"evaluate.py ckpt={BEST}", model_setting("d_model", 2**40), "more than 1e+09"),
    (f"evaluate.py ckpt={BEST}", model_setting("n_layers", "two"), "expected a whole number"),
    (f"evaluate.py ckpt={BEST}", model_setting("unheard", 1), "unknown setting"),
    (f"evaluate.py ckpt={BEST}", zip_bomb, "unpacks to more than its size"),
    (f"evaluate.py ckpt={BEST}", overlapping_zip, "unpacks to more than its size"),
    (f"evaluate.py ckpt={BEST}", folder(BEST), "holds no checkpoints"),
    (_EVALUATE, link(BEST, "../elsewhere.ckpt"), "is a link that leads out of its run folder"),
    (_EVALUATE, link("runs/tiny/metrics.csv", "../target"), "is a link that leads out"),
    ("train.py resume=runs/tiny", link("runs/tiny/train.log", "../target"), "is a link that leads"),
    ("train.py resume=runs/tiny", link(LAST, "../elsewhere.ckpt"), "is a link that leads out"),
    ("train.py resume=runs/tiny", remove("runs/tiny/config.yaml"), "has no config.yaml"),
    ("train.py resume=runs/tiny", write("runs/tiny/config.yaml", "a: ["), "does not hold the"),
    ("train.py resume=runs/tiny", write("runs/tiny/config.yaml", ALIASES), "does not hold the"),
    ("train.py resume=runs/tiny", write("runs/tiny/config.yaml", DEEP), "does not hold the"),
    ("train.py resume=runs/tiny", write("runs/tiny/config.yaml", b"\xff\xfe"), "does not hold"),
    ("train.py resume=runs/tiny", write("runs/tiny/config.yaml", "a: 1\n" * 14_000), "not hold"),
    ("train.py resume=runs/tiny", write("runs/tiny/config.yaml", "a: !!int ''"), "does not hold"),
    ("train.py resume=runs/tiny", write("runs/tiny/config.yaml", "a: !!bool x"), "does not hold"),
    (
        "train.py resume=runs/tiny",
        write("runs/tiny/config.yaml", "a: !!python/object/apply:os.system ['touch ran-code']"),
        "does not hold the settings",
    ),
    ("train.py resume=runs/tiny", write("runs/tiny/config.yaml", "seed: 1"), "is not set"),
    (_EVALUATE, remove("runs/tiny/tokenizer.json"), "has no tokenizer.json"),
    (_EVALUATE, write("runs/tiny/tokenizer.json", ""), "is not a tokenizer.json"),
    (_EVALUATE, write("runs/tiny/tokenizer.json", "{}"), "is not a tokenizer.json"),
    (_EVALUATE, write("runs/tiny/tokenizer.json", DEEP), "is not a tokenizer.json"),
    (_EVALUATE, write("runs/tiny/tokenizer.json", b"\xff\xfe{}"), "is not a tokenizer.json"),
    (_EVALUATE, pipe("runs/tiny/tokenizer.json"), "has no tokenizer.json"),
    (_EVALUATE, folder("runs/tiny/tokenizer.json"), "has no tokenizer.json"),
    (
        _EVALUATE,
        edit_json("runs/tiny/tokenizer.json", lambda t: t["model"].update(type="WordPiece")),
        "is not a tokenizer.json",
    ),
    (
        _EVALUATE,
        edit_json("runs/tiny/tokenizer.json", lambda t: t["model"].update(merges=[["q", "zzz"]])),
        "is not a tokenizer.json",
    ),
    (
        _EVALUATE,
        edit_json("runs/tiny/tokenizer.json", lambda t: t["model"]["vocab"].update(extra=9**9)),
        "is not a tokenizer.json",
    ),
    (
        _EVALUATE,
        edit_json("runs/tiny/tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"})),
        "is a tokenizer of another kind",
    ),
    ("evaluate.py ckpt=out", write("out/model.safetensors", ""), "is not a safetensors file"),
    ("evaluate.py ckpt=out", cut("out/model.safetensors", 0.7), "is not a safetensors file"),
    ("evaluate.py ckpt=out", safetensors_header(b"{}", 2**62), "is not a safetensors file"),
    ("evaluate.py ckpt=out", safetensors_header(b"{}"), "holds the weights of another model"),
    ("evaluate.py ckpt=out", safetensors_header(b"not json"), "is not a safetensors file"),
    (
        "evaluate.py ckpt=out",
        safetensors_header(b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,99999]}}'),
        "is not a safetensors file",
    ),
    ("evaluate.py ckpt=out", remove("out/config.yaml"), "has no config.yaml"),
]

# ---------------------------------------------------------------------------- verbs

_GENERATE = "minigpt generate runs/tiny"
VERBS: list[Case] = [
    ("minigpt generat runs/tiny", None, "No such command 'generat'"),
    ("minigpt generate", None, "Missing argument 'run'"),
    ("minigpt generate nowhere", None, "nowhere does not exist"),
    (f"{_GENERATE} --topk 5", None, "No such option: --topk"),
    (f"{_GENERATE} --top-k", None, "requires an argument"),
    (f"{_GENERATE} --top-k five", None, "'--top-k': Input should be a valid integer"),
    (f"{_GENERATE} --top-k 0", None, "top_k 0 must be"),
    (f"{_GENERATE} --top-p nan", None, "top_p nan must be"),
    (f"{_GENERATE} --min-p -1", None, "min_p -1.0 must be"),
    (f"{_GENERATE} --temperature -1", None, "temperature -1.0 must be"),
    (f"{_GENERATE} --temperature inf", None, "temperature inf must be"),
    (f"{_GENERATE} --temperature 0 --top-p 0.5", None, "leave out --top-p"),
    (f"{_GENERATE} --temperature 0 --n 3", None, "leave out --n 3"),
    (f"{_GENERATE} --repetition-penalty 0", None, "repetition_penalty 0.0 must be from 0.01"),
    (f"{_GENERATE} --max-tokens -5", None, "max_tokens -5 must be"),
    (f"{_GENERATE} --max-tokens 1e3", None, "should be a valid integer"),
    (f"{_GENERATE} --n 0", None, "--n 0 must be at least 1"),
    (f"{_GENERATE} --seed 1e99", None, "should be a valid integer"),
    (f"{_GENERATE} --seed 99999999999999999999999999", None, "seed"),
    (f"{_GENERATE} --prompt \udcff", None, "half of a surrogate pair"),
    (f"{_GENERATE} --prompt -", write("../x.stdin", b"a\xff"), "not UTF-8 text: byte 1"),
    (f"{_GENERATE} --dtype int8", None, "is not one of 'float32', 'bfloat16'"),
    (f"{_GENERATE} runs/tiny", None, "extra argument"),
    ("minigpt probe runs/tiny --k 0", None, "--k"),
    ("minigpt probe runs/tiny --analogy princess", None, "princess"),
    ("minigpt probe runs/tiny --analogy a - b", None, "a - b"),
    ("minigpt probe runs/tiny --out train.txt", None, "train.txt"),
    ("minigpt scaling nowhere", None, "nowhere is not a folder"),
    ("minigpt scaling cache", None, "no run in cache"),
    ("minigpt scaling runs", write("runs/tiny/metrics.csv", "step,tokens\n1,x\n"), "line 2"),
    ("minigpt scaling runs", write("runs/tiny/metrics.csv", b"\xff\n"), "not the text that a run"),
    ("minigpt scaling runs", write("runs/tiny/summary.json", DEEP), "is not a JSON object"),
    ("minigpt scaling runs", write("runs/tiny/summary.json", "[]"), "is not a JSON object"),
    (
        "minigpt scaling runs",
        write("runs/tiny/summary.json", '{"val/loss": "low"}'),
        "val/loss is 'low', expected a number",
    ),
    ("minigpt scaling runs", link("runs/tiny/summary.json", "../target"), "is a link that leads"),
    ("minigpt study runs/tiny --n 0", None, "n"),
    ("minigpt study nowhere", None, "nowhere does not exist"),
    ("minigpt export runs/tiny", None, "Missing argument 'out'"),
    ("minigpt export runs/tiny new --format pt", None, "is not one of 'hf', 'safetensors'"),
    ("minigpt export runs/tiny new --dtype int8", None, "is not one of 'float32', 'bfloat16'"),
    ("minigpt export runs/tiny new --format onnx --dtype bfloat16", None, "dtype"),
    ("minigpt export runs/tiny train.txt", None, "train.txt"),
    ("minigpt export runs/tiny runs/tiny", None, "runs/tiny"),
    ("minigpt export runs/tiny runs", None, "runs"),
    ("minigpt export runs/tiny new --dry-run", None, "add --push user/name"),
    ("minigpt export runs/tiny new --push ../../x --dry-run", None, "user/name"),
    ("minigpt export runs/tiny out", write("out/export.json", DEEP), "out holds README.md and"),
    ("minigpt export runs/tiny out", write("out/export.json", '{"files": [[1]]}'), "out holds"),
    ("minigpt export runs/tiny out", write("out/export.json", '{"files": 1}'), "out holds"),
    (
        "minigpt export runs/tiny new",
        edit_json("runs/tiny/summary.json", lambda s: s.update(precision="32\n\n# Heading")),
        "summary.json: precision is '32\\n\\n# Heading', as Mini GPT never writes it",
    ),
    (
        "minigpt export runs/tiny new",
        edit_json("runs/tiny/summary.json", lambda s: s.update(tokens="many")),
        "summary.json: tokens is 'many'",
    ),
    (
        "minigpt export out new",
        edit("out/config.yaml", "source: text", 'source: "tinystories\\n# A"'),
        "config.yaml: source is 'tinystories\\n# A'",
    ),
    ("minigpt export out new", edit("out/config.yaml", "budget:", "bud:"), "budget is None"),
    ("minigpt playground", None, "Missing argument 'runs'"),
    ("minigpt playground nowhere", None, "nowhere does not exist"),
    ("minigpt playground runs/tiny --port 70000", None, "--port"),
    ("minigpt playground runs/tiny --auth name", None, "--auth"),
    ("minigpt playground runs/tiny --auth :secret", None, "--auth"),
]

CASES = SETTINGS + STORIES + RUNS + VERBS
