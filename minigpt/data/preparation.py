"""From settings to token files: a corpus is read, a tokenizer trained, the stories encoded, once.

Each split becomes one flat file of uint16 ids, story₁ EOT story₂ EOT ..., which training reads
through a memory map. What is prepared lies in `<cache_dir>/prepared` under a fingerprint of
everything that went into it, is written aside and renamed when it is whole, and is written by one
process at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tokenizers
from filelock import FileLock, Timeout

from minigpt.core.files import read_json, write_json
from minigpt.core.settings import UserError
from minigpt.data.config import DataConfig
from minigpt.data.progress import byte_progress
from minigpt.data.sources import Corpus, Split
from minigpt.tokenizer import Tokenizer, utf8_length

log = logging.getLogger(__name__)

T = TypeVar("T")

_FORMAT = 1  # part of each fingerprint: count up when prepared files would come out otherwise
_TOKENIZER_BYTES = 100_000_000  # enough for any vocabulary here; 10 s on two cores
_BLOCK_CHARACTERS = 1 << 20  # encoded at a time: this, not the corpus, sets the peak of memory
_TOKENS, _META, _TOKENIZER = "tokens.bin", "meta.json", "tokenizer.json"


@dataclass(frozen=True)
class TokenFile:
    """One prepared split: `n_tokens` little-endian uint16 ids, story₁ EOT ... storyₙ EOT."""

    path: Path
    n_tokens: int  # END_OF_TEXT behind each story included
    n_bytes: int  # of the stories alone, in UTF-8
    n_stories: int

    @classmethod
    def load(cls, folder: Path) -> TokenFile:
        """Open a prepared split after comparing it with its meta.json.

        Raises:
            OSError, ValueError, KeyError: it is not there, cut short, or damaged.
        """
        meta = _read_meta(folder)
        tokens = cls(folder / _TOKENS, meta["tokens"], meta["bytes"], meta["stories"])
        if tokens.path.stat().st_size != 2 * tokens.n_tokens:
            raise ValueError(f"{tokens.path} does not hold {tokens.n_tokens} tokens")
        _check(tokens.path, meta["blake2b"])
        return tokens

    def array(self) -> np.ndarray:
        """The ids as a memory map: [n_tokens] uint16, read-only."""
        return np.memmap(self.path, dtype="<u2", mode="r", shape=(self.n_tokens,))

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of story that a token stands for, on average."""
        return self.n_bytes / self.n_tokens


def prepare_tokenizer(corpus: Corpus, config: DataConfig) -> Tokenizer:
    """The tokenizer of the training split of `corpus`, trained now or in an earlier run.

    It learns from the first 100 MB of the training stories at most; validation is never read. With
    few different words it is smaller than `config.vocab_size`: its own `vocab_size` tells.

    Raises:
        UserError: the corpus cannot be read, or the cache cannot be written.
    """

    def make(folder: Path) -> None:
        stories = _first_bytes(corpus.stories("train"), _TOKENIZER_BYTES)
        with byte_progress("training the tokenizer") as show:
            tokenizer = Tokenizer.train(_each(stories, show), config.vocab_size)
        tokenizer.save(folder / _TOKENIZER)
        _write_meta(folder, {"blake2b": _digest(folder / _TOKENIZER), "of": ingredients})

    def load(folder: Path) -> Tokenizer:
        _check(folder / _TOKENIZER, _read_meta(folder)["blake2b"])
        return Tokenizer.load(folder / _TOKENIZER)

    ingredients = {
        "corpus": corpus.fingerprint("train"),
        "bytes": _TOKENIZER_BYTES,
        "vocab_size": config.vocab_size,
    }
    return _cached(_prepared(config.cache_dir, "tokenizer", ingredients), load, make)


def prepare_split(
    corpus: Corpus, split: Split, tokenizer: Tokenizer, cache_dir: str | Path
) -> TokenFile:
    """The ids of all stories of a split, encoded now or in an earlier run.

    Memory does not grow with the corpus. A second process that wants the same split waits for the
    first; a process that is killed leaves nothing that would be taken for a prepared split.

    Raises:
        UserError: the corpus cannot be read or has no story for the split, or the cache cannot
            be written.
    """
    ingredients = {"corpus": corpus.fingerprint(split), "tokenizer": tokenizer.fingerprint}

    def make(folder: Path) -> None:
        began = time.perf_counter()
        with byte_progress(f"encoding the {split} split") as show:
            meta = _encode(corpus.pieces(split), tokenizer, folder / _TOKENS, show)
        if meta["stories"] == 0:
            raise UserError(f"the {split} split has no story; give it more text", "data.source")
        _write_meta(folder, meta | {"of": ingredients})
        counts = meta["stories"], meta["bytes"] / 1e6, meta["tokens"], time.perf_counter() - began
        log.info(f"encoded the {split} split: %d stories, %.1f MB, %d tokens, %.1f s", *counts)

    return _cached(_prepared(cache_dir, split, ingredients), TokenFile.load, make)


def _encode(
    pieces: Iterable[tuple[str, bool]],
    tokenizer: Tokenizer,
    path: Path,
    show: Callable[[int], None],
) -> dict[str, Any]:
    """Stream the ids of `pieces` to `path`; returns the counts and the checksum of the file.

    A piece is a text and whether a story ends with it: END_OF_TEXT stands there alone.
    """
    counts, checksum = Counter(tokens=0, bytes=0, stories=0), hashlib.blake2b()
    with path.open("wb") as file:
        for ends, run in itertools.groupby(pieces, key=lambda piece: piece[1]):
            for block in _blocks(text for text, _ in run):
                if ends:
                    parts = [tokenizer.encode_stories(block)]
                else:
                    parts = [tokenizer.encode_stories([text])[:-1] for text in block]
                for ids in parts:
                    file.write(ids.data)
                    checksum.update(ids.data)
                    counts.update(tokens=len(ids))
                block_bytes = sum(map(utf8_length, block))
                show(block_bytes)
                counts.update(bytes=block_bytes, stories=len(block) if ends else 0)
        file.flush()
        os.fsync(file.fileno())
    return {**counts, "blake2b": checksum.hexdigest()}


def _blocks(stories: Iterable[str]) -> Iterator[list[str]]:
    block, capacity = [], _BLOCK_CHARACTERS
    for story in stories:
        block.append(story)
        capacity -= len(story)
        if capacity <= 0:
            yield block
            block, capacity = [], _BLOCK_CHARACTERS
    if block:
        yield block


def _first_bytes(stories: Iterable[str], limit: int) -> Iterator[str]:
    total = 0
    for story in stories:
        yield story
        total += utf8_length(story)
        if total >= limit:
            return


def _each(stories: Iterable[str], show: Callable[[int], None]) -> Iterator[str]:
    for block in _blocks(stories):
        yield from block
        show(sum(map(utf8_length, block)))


def _write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write meta.json, which holds the checksum of the file beside it, and its own."""
    write_json(folder / _META, meta | {"meta": _checksum(meta)})


def _read_meta(folder: Path) -> dict[str, Any]:
    """Read meta.json. Raises OSError, ValueError: there is none, or not as it was written."""
    meta = read_json(folder / _META)
    # What was prepared before meta.json had a checksum of its own is still taken.
    if not isinstance(meta, dict) or meta.pop("meta", None) not in (None, _checksum(meta)):
        raise ValueError(f"{folder / _META} is not what was written")
    return meta


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _check(path: Path, blake2b: str) -> None:
    """ValueError: the file is not what was written. Reads all of it: 0.3 s for 100M tokens."""
    if _digest(path) != blake2b:
        raise ValueError(f"{path} is not what was written")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


# ---------------------------------------------------------------------------- cache


def _prepared(cache_dir: str | Path, kind: str, ingredients: dict[str, Any]) -> Path:
    """The folder for what these ingredients give, and no others."""
    everything = {"format": _FORMAT, "tokenizers": tokenizers.__version__, **ingredients}
    text = json.dumps(everything, sort_keys=True)
    fingerprint = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return Path(cache_dir) / "prepared" / f"{kind}-{fingerprint}"


def _cached(path: Path, load: Callable[[Path], T], make: Callable[[Path], None]) -> T:
    """What `load` reads from the folder `path`, after `make` has filled it if need be.

    `make` writes into a folder of another name that becomes `path` in one step, and only the
    holder of the lock writes: a folder of that other name was left by a process that died.
    """
    try:
        return load(path)
    except (OSError, ValueError, KeyError):
        pass  # not there yet or damaged: looked at once more under the lock
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.warning("waiting for another process that is preparing %s", path)
            lock.acquire()
        with contextlib.ExitStack() as at_exit:
            at_exit.callback(lock.release)
            try:
                return load(path)
            except (OSError, ValueError, KeyError) as error:
                if path.exists():
                    log.warning("preparing %s again, it is damaged: %s", path, error)
                    shutil.rmtree(path)
            unfinished = path.with_name(f"{path.name}.unfinished")
            at_exit.callback(shutil.rmtree, unfinished, ignore_errors=True)
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.replace(path)
    except OSError as error:
        problem = f"cannot write {path} ({error.strerror or error})"
        raise UserError(f"{problem}; name another folder", "data.cache_dir") from None
    return load(path)
