import dataclasses
import errno
import json
import os
import re
import resource
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minigpt.core.settings import UserError
from minigpt.data import preparation
from minigpt.data.config import DataConfig
from minigpt.data.preparation import prepare_split, prepare_tokenizer
from minigpt.data.sources import open_corpus
from minigpt.tokenizer import Tokenizer
from tests.conftest import ROOT, naming, tiny_overrides
from tests.processes import Training

scripts = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks/scripts.py")))
STORIES = [f"Story {n}: the dog and the girl walk to the park.\n\nThen é." for n in range(50)]


@dataclasses.dataclass
class Listed:
    """A corpus of the given stories that counts how often each split is read."""

    train: Sequence[str] = tuple(STORIES)
    valid: Sequence[str] = ("The end is near, said Tom.", "The end.")
    reads: list[str] = dataclasses.field(default_factory=list)
    notes: Sequence[str] = ()

    def stories(self, split: str) -> Iterator[str]:
        return (story for story, _ in self.pieces(split))

    def pieces(self, split: str) -> Iterator[tuple[str, bool]]:
        self.reads.append(split)
        yield from ((story, True) for story in getattr(self, split))

    def fingerprint(self, split: str) -> dict[str, Any]:
        return {"split": split, "stories": list(getattr(self, split))}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(STORIES, 300)


def prepared(cache: Path) -> list[str]:
    """What lies in the cache beside locks, which may stay."""
    return sorted(p.name for p in (cache / "prepared").iterdir() if p.suffix != ".lock")


def test_a_token_file_is_every_story_followed_by_end_of_text(tokenizer, tmp_path):
    corpus = Listed()
    tokens = prepare_split(corpus, "train", tokenizer, tmp_path)
    expected = [id for ids in tokenizer.encode_batch(STORIES) for id in [*ids, 0]]
    assert tokens.array().tolist() == expected
    assert tokens.array().dtype == np.uint16
    assert not tokens.array().flags.writeable
    assert (tokens.n_tokens, tokens.n_stories) == (len(expected), 50)
    assert tokens.n_bytes == len("".join(STORIES).encode())
    assert tokens.bytes_per_token == tokens.n_bytes / tokens.n_tokens


def test_blocks_do_not_show_in_the_result(tokenizer, tmp_path, monkeypatch):
    whole = prepare_split(Listed(), "train", tokenizer, tmp_path / "whole")
    monkeypatch.setattr(preparation, "_BLOCK_CHARACTERS", 200)
    parts = prepare_split(Listed(), "train", tokenizer, tmp_path / "parts")
    assert parts.path.read_bytes() == whole.path.read_bytes()
    assert parts.n_bytes == whole.n_bytes


def test_what_is_prepared_is_not_read_again(tmp_path):
    corpus, config = Listed(), DataConfig(vocab_size=300, cache_dir=str(tmp_path))
    for _ in range(2):
        tokenizer = prepare_tokenizer(corpus, config)
        prepare_split(corpus, "train", tokenizer, tmp_path)
        prepare_split(corpus, "valid", tokenizer, tmp_path)
    assert corpus.reads == ["train", "train", "valid"]


def test_another_corpus_vocabulary_or_tokenizer_is_prepared_on_its_own(tmp_path):
    config = DataConfig(vocab_size=300, cache_dir=str(tmp_path))
    first = prepare_tokenizer(Listed(), config)
    smaller = prepare_tokenizer(Listed(), dataclasses.replace(config, vocab_size=280))
    assert (first.vocab_size, smaller.vocab_size) == (300, 280)
    other = prepare_tokenizer(Listed(train=["cats and cats and cats"]), config)
    assert other.fingerprint != first.fingerprint
    paths = {prepare_split(Listed(), "valid", t, tmp_path).path for t in (first, smaller, other)}
    assert len(paths) == 3


def test_the_tokenizer_never_sees_validation_and_no_more_than_its_share(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_TOKENIZER_BYTES", 20)
    corpus = Listed(train=["the first story", "the second story", "xyzxyz " * 100])
    config = DataConfig(vocab_size=1000, cache_dir=str(tmp_path))
    tokenizer = prepare_tokenizer(corpus, config)
    assert corpus.reads == ["train"]
    words = [tokenizer.token(id) for id in range(tokenizer.vocab_size)]
    assert " second" in words
    assert not [word for word in words if "xy" in word]


class Broken(Listed):
    def pieces(self, split: str) -> Iterator[tuple[str, bool]]:
        yield from super().pieces(split)
        raise UserError("stories.txt")


def test_an_error_while_reading_leaves_nothing_behind(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_BLOCK_CHARACTERS", 200)  # some blocks are written before
    with pytest.raises(UserError, match="stories.txt"):
        prepare_split(Broken(), "train", tokenizer, tmp_path)
    with pytest.raises(UserError, match="stories.txt"):
        prepare_tokenizer(Broken(), DataConfig(vocab_size=300, cache_dir=str(tmp_path)))
    assert prepared(tmp_path) == []


@dataclasses.dataclass
class InParts(Listed):
    """A corpus that yields each story in parts of `length` characters."""

    length: int = 7

    def pieces(self, split: str) -> Iterator[tuple[str, bool]]:
        for story, _ in super().pieces(split):
            for start in range(0, len(story), self.length):
                yield story[start : start + self.length], start + self.length >= len(story)


def test_parts_of_a_story_are_encoded_as_one_story(tokenizer, tmp_path):
    stories = [*STORIES, " ".join(STORIES), "".join(STORIES).replace(" ", "\n")]
    whole = prepare_split(Listed(stories), "train", tokenizer, tmp_path / "whole")
    for length in (7, 1000):
        corpus = InParts(stories, length=length)
        parts = prepare_split(corpus, "train", tokenizer, tmp_path / str(length))
        assert parts.path.read_bytes() == whole.path.read_bytes()
        assert (parts.n_stories, parts.n_bytes) == (len(stories), whole.n_bytes)


@pytest.mark.parametrize("name", list(scripts.TEXTS))
def test_tokens_and_bytes_of_any_script_are_exact(name, tmp_path):
    stories = [*scripts.stories(name, 60_000), "".join(scripts.stories(name, 20_000, seed=2))]
    corpus = Listed(stories, stories[:3])
    config = DataConfig(vocab_size=1000, cache_dir=str(tmp_path))
    tokenizer = prepare_tokenizer(corpus, config)
    tokens = prepare_split(corpus, "train", tokenizer, tmp_path)
    expected = [id for ids in tokenizer.encode_batch(stories) for id in [*ids, 0]]
    assert tokens.array().tolist() == expected
    assert tokens.n_bytes == sum(len(story.encode()) for story in stories)
    assert tokenizer.decode([id for id in expected if id]) == "".join(stories)


SLOW_PREPARATION = """
import logging, sys
from minigpt.data import preparation
from minigpt.tokenizer import Tokenizer
logging.basicConfig(level=logging.INFO, format="%(message)s")
preparation._BLOCK_CHARACTERS = 200
stories = [f"Story {n}: the dog and the girl." for n in range(50)]
tokenizer = Tokenizer.train(stories, 280)

class Slow:
    notes = ()
    def fingerprint(self, split):
        return {"stories": stories}
    def pieces(self, split):
        for n, story in enumerate(stories):
            if n == 40:
                print("begun", flush=True)
                sys.stdin.readline()
            yield story, True

print(preparation.prepare_split(Slow(), "train", tokenizer, sys.argv[1]).n_tokens)
"""


def start(cache: Path) -> subprocess.Popen[str]:
    """A process that stops in the middle of its preparation until it reads a line."""
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_PREPARATION, str(cache)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_preparations_count_for_nothing_and_two_processes_prepare_once(tmp_path):
    killed = start(tmp_path)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "begun\n"
    killed.kill()
    killed.communicate()
    (unfinished,) = prepared(tmp_path)
    assert (tmp_path / "prepared" / unfinished / "tokens.bin").exists()

    first = start(tmp_path)
    assert first.stdout is not None
    assert first.stdout.readline() == "begun\n"  # it holds the lock, and half is written
    second = start(tmp_path)
    assert second.stderr is not None
    line = second.stderr.readline()
    assert "waiting" in line
    assert unfinished.removesuffix(".unfinished") in line
    first_output, first_log = first.communicate("go on\n", timeout=60)
    output, log = second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), first_log + log
    encoded = naming("train", "50")  # stories
    assert re.search(encoded, first_log)
    assert not re.search(encoded, log)
    assert "begun" not in output
    assert output == first_output
    (whole,) = prepared(tmp_path)
    assert unfinished.startswith(whole)


@pytest.mark.parametrize(
    "damage", ["cut", "longer", "flipped", "no meta", "half a meta", "flipped meta"]
)
def test_a_damaged_token_file_is_prepared_again_and_the_log_says_so(
    tokenizer, tmp_path, caplog, damage
):
    corpus = Listed()
    path = prepare_split(corpus, "train", tokenizer, tmp_path).path
    good, meta = path.read_bytes(), path.with_name("meta.json")
    if damage == "no meta":
        meta.unlink()
    elif damage == "half a meta":
        meta.write_text(meta.read_text()[:50])
    elif damage == "flipped meta":  # bits per byte would be wrong, and nothing else
        bytes_before = json.loads(meta.read_text())["bytes"]
        meta.write_text(meta.read_text().replace(str(bytes_before), str(bytes_before + 1)))
    else:
        flipped = good[:100] + bytes([good[100] ^ 1]) + good[101:]
        path.write_bytes({"cut": good[:-2], "longer": good + b"\0\0", "flipped": flipped}[damage])
    again = prepare_split(corpus, "train", tokenizer, tmp_path)
    assert again.path.read_bytes() == good
    assert corpus.reads == ["train", "train"]
    assert re.search(naming(str(path.parent), "damaged"), caplog.text)


@pytest.mark.parametrize("damage", ["cut", "a word changed", "no meta"])
def test_a_damaged_tokenizer_is_trained_again(tmp_path, caplog, damage):
    config = DataConfig(vocab_size=300, cache_dir=str(tmp_path))
    good = prepare_tokenizer(Listed(), config)
    (path,) = tmp_path.rglob("tokenizer.json")
    text = path.read_text()
    if damage == "no meta":
        path.with_name("meta.json").unlink()
    else:
        path.write_text(text[:1000] if damage == "cut" else text.replace("dog", "dig"))
    assert prepare_tokenizer(Listed(), config).fingerprint == good.fingerprint
    assert path.read_text() == text
    assert re.search(naming(str(path.parent), "damaged"), caplog.text)


def test_what_an_earlier_version_prepared_is_not_prepared_again(tokenizer, tmp_path):
    corpus = Listed()
    meta = prepare_split(corpus, "train", tokenizer, tmp_path).path.with_name("meta.json")
    without = {key: value for key, value in json.loads(meta.read_text()).items() if key != "meta"}
    meta.write_text(json.dumps(without))
    prepare_split(corpus, "train", tokenizer, tmp_path)
    assert corpus.reads == ["train"]


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that everybody may read."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_nobody(cache: Path, function):
    """`function()` without the right to write to `cache`, which root has whatever the mode."""
    for path in [cache, *cache.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        return function()
    finally:
        if root:
            os.seteuid(0)
        for path in [cache, *cache.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)


def test_a_cache_that_is_read_only_is_read(tokenizer, shared_folder):
    corpus = Listed()
    prepared_split = prepare_split(corpus, "train", tokenizer, shared_folder)
    reused = as_nobody(
        shared_folder, lambda: prepare_split(corpus, "train", tokenizer, shared_folder)
    )
    assert reused == prepared_split
    assert corpus.reads == ["train"]


def test_in_a_read_only_cache_what_is_missing_or_damaged_is_one_line(tokenizer, shared_folder):
    prepare = prepare_split(Listed(), "train", tokenizer, shared_folder)
    prepare.path.write_bytes(b"")
    for split in ("train", "valid"):
        with pytest.raises(UserError, match=naming(os.strerror(errno.EACCES), "data.cache_dir")):
            as_nobody(
                shared_folder, lambda s=split: prepare_split(Listed(), s, tokenizer, shared_folder)
            )


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tokenizer, tmp_path):
    config = DataConfig(vocab_size=300, cache_dir=str(tmp_path))
    too_large = naming(os.strerror(errno.EFBIG), "data.cache_dir")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=too_large):
            prepare_split(Listed(), "train", tokenizer, tmp_path)
        with pytest.raises(UserError, match=too_large):
            prepare_tokenizer(Listed(), config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert prepared(tmp_path) == []
    assert prepare_split(Listed(), "train", tokenizer, tmp_path).n_stories == 50


@pytest.mark.long
@pytest.mark.parametrize("n", [2, 8])
def test_runs_that_start_at_once_prepare_once_and_all_train(n: int, tmp_path: Path):
    command = [*tiny_overrides(tmp_path), "budget.tokens=192", "trainer.n_validations=1"]
    runs = [Training([*command, f"name=r{i}"], tmp_path / f"r{i}.txt") for i in range(n)]
    for run in runs:
        assert run.wait() == 0, run.output_text()
    everything = "".join(run.output_text() for run in runs)
    assert len(re.findall(r"\bencoded\b.*\btrain\b", everything)) == 1
    assert len(re.findall(r"\bencoded\b.*\bvalid\b", everything)) == 1
    assert len(re.findall(r"\bfinished\b", everything)) == n
    assert len(prepared(tmp_path / "cache")) == 3  # the tokenizer and two splits


def test_a_cache_that_cannot_be_written_is_one_line_naming_the_override(tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=naming("data.cache_dir")) as error:
        prepare_split(Listed(), "train", tokenizer, tmp_path / "file")
    assert "\n" not in str(error.value)


def test_a_split_without_stories_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match=naming("valid")):
        prepare_split(Listed(valid=[]), "valid", tokenizer, tmp_path)


def test_meta_json_tells_what_went_in(tokenizer, tmp_path):
    tokens = prepare_split(Listed(), "valid", tokenizer, tmp_path)
    meta = json.loads(tokens.path.with_name("meta.json").read_text())
    assert meta["of"]["tokenizer"] == tokenizer.fingerprint
    assert (meta["tokens"], meta["bytes"], meta["stories"]) == (tokens.n_tokens, tokens.n_bytes, 2)


def test_validation_files_alone_are_enough_to_evaluate_on(tokenizer, tmp_path):
    text = tmp_path / "other.txt"
    text.write_text("One.<|endoftext|>Two.", encoding="utf-8")
    corpus = open_corpus(DataConfig(source="text", valid_files=(str(text),)))
    assert prepare_split(corpus, "valid", tokenizer, tmp_path).n_stories == 2
