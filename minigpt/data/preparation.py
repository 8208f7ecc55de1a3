"""Prepare a corpus once: train its tokenizer, and encode its stories into token files.

Each split becomes one flat file of uint16 ids: story₁ EOT story₂ EOT ... Training reads this file
through a memory map. Prepared files are stored in `<cache_dir>/prepared`, in folders named by a
fingerprint of all inputs. Only one process writes a folder at a time. The folder has a temporary
name until it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tokenizers
from filelock import FileLock, Timeout

from minigpt.core.files import read_json, sync, write_error, write_json
from minigpt.core.settings import UserError
from minigpt.data.config import DataConfig
from minigpt.data.corpus import Corpus, Split
from minigpt.data.progress import byte_progress
from minigpt.tokenizer import Tokenizer, cut_texts, utf8_length

log = logging.getLogger(__name__)

T = TypeVar("T")
S = TypeVar("S")

_FORMAT = 1  # part of each fingerprint; increase it if prepared files change
# Bytes of stories to train a tokenizer on. They are enough for the largest vocabulary, and training
# takes 10 s on two cores.
_TOKENIZER_BYTES = 100_000_000
_BLOCK_CHARACTERS = 1 << 17  # characters encoded at a time, which bounds memory for any corpus
# Blocks encoded at the same time. While one thread converts ids, which needs the interpreter, the
# library encodes the block of the other on all cores.
_BLOCKS_AT_ONCE = 2
_TOKENS, _META, _TOKENIZER = "tokens.bin", "meta.json", "tokenizer.json"


@dataclass(frozen=True)
class TokenFile:
    """File of a prepared split: `n_tokens` little-endian uint16 ids, story₁ EOT ... storyₙ EOT."""

    path: Path
    n_tokens: int  # including the END_OF_TEXT after each story
    n_bytes: int  # UTF-8 bytes of the stories, without END_OF_TEXT
    n_stories: int
    notes: tuple[str, ...] = ()  # sentences about the division of the stories into splits

    @classmethod
    def load(cls, folder: Path) -> TokenFile:
        """Return the token file of a prepared split, after a check of the file against meta.json.

        Args:
            folder: folder of the prepared split.

        Returns:
            The token file.

        Raises:
            OSError: the files cannot be read.
            ValueError: a file is truncated or damaged.
            KeyError: a value is missing from meta.json.
        """
        meta = _read_meta(folder)
        counts = meta["tokens"], meta["bytes"], meta["stories"]
        tokens = cls(folder / _TOKENS, *counts, tuple(meta.get("notes", ())))
        if tokens.path.stat().st_size != 2 * tokens.n_tokens:
            raise ValueError(f"{tokens.path} does not contain {tokens.n_tokens} tokens")
        _check(tokens.path, meta["blake2b"])
        return tokens

    def array(self) -> np.ndarray:
        """Return the ids as a read-only memory map: [n_tokens] uint16."""
        return np.memmap(self.path, dtype="<u2", mode="r", shape=(self.n_tokens,))

    @property
    def bytes_per_token(self) -> float:
        """Mean number of UTF-8 bytes per token."""
        return self.n_bytes / self.n_tokens


def prepare_tokenizer(corpus: Corpus, config: DataConfig) -> Tokenizer:
    """Return the tokenizer trained on the training split of `corpus`, from the cache if possible.

    Training reads only the training stories, and stops after about 100 MB of them.

    Args:
        corpus: corpus with the training stories.
        config: data settings; `vocab_size` and `cache_dir` are used.

    Returns:
        The tokenizer. Its `vocab_size` is smaller than `config.vocab_size` if the stories have few
        distinct words.

    Raises:
        UserError: the corpus cannot be read, or the cache cannot be written.
    """

    def make(folder: Path) -> None:
        with byte_progress("training the tokenizer") as show:
            # No variable refers to the iterator, so that it is freed once enough has been read.
            tokenizer = Tokenizer.train(
                _shown(_first_bytes(corpus.pieces("train"), _TOKENIZER_BYTES), show),
                config.vocab_size,
            )
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
    """Return the token file of a split, from the cache if possible.

    The memory for encoding grows neither with the corpus nor with the length of a story. A second
    process that needs the same split waits for the first. Incomplete files of a killed process are
    never used.

    Args:
        corpus: stories to encode.
        split: "train" or "valid".
        tokenizer: tokenizer for the stories.
        cache_dir: cache folder, created if missing.

    Returns:
        The token file; its checksum has been verified.

    Raises:
        UserError: the corpus cannot be read, the split has no story, or the cache cannot be
            written.
    """
    ingredients = {"corpus": corpus.fingerprint(split), "tokenizer": tokenizer.fingerprint}

    def make(folder: Path) -> None:
        start = time.perf_counter()
        with byte_progress(f"encoding the {split} split") as show:
            meta = _encode(corpus.pieces(split), tokenizer, folder / _TOKENS, show)
        if meta["stories"] == 0:
            remedy = "add more text" + (", or set data.valid_files" if split == "valid" else "")
            raise UserError(f"the {split} split contains no story; {remedy}", "data.source")
        _write_meta(folder, meta | {"notes": corpus.notes, "of": ingredients})
        counts = meta["stories"], meta["bytes"] / 1e6, meta["tokens"], time.perf_counter() - start
        log.info(f"encoded the {split} split: %d stories, %.1f MB, %d tokens, %.1f s", *counts)

    return _cached(_prepared(cache_dir, split, ingredients), TokenFile.load, make)


def _encode(
    pieces: Iterable[tuple[str, bool]],
    tokenizer: Tokenizer,
    path: Path,
    show: Callable[[int], None],
) -> dict[str, Any]:
    """Write the ids of `pieces` to `path`, and return values for meta.json.

    Args:
        pieces: pairs (piece, is_last): a piece of a story, and whether the story ends with it.
        tokenizer: tokenizer for the pieces.
        path: file to write.
        show: function to call with the number of UTF-8 bytes of each encoded block.

    Returns:
        The numbers of tokens, UTF-8 bytes and stories, and the checksum of the file.
    """

    def encode(block: list[tuple[str, bool]]) -> tuple[np.ndarray, int, int]:
        n_bytes = sum(utf8_length(text) for text, _ in block)
        return tokenizer.encode_pieces(block), n_bytes, sum(ends for _, ends in block)

    counts, checksum = Counter(tokens=0, bytes=0, stories=0), hashlib.blake2b()
    blocks = _blocks(cut_texts(pieces), lambda piece: len(piece[0]))
    with path.open("wb") as file, ThreadPoolExecutor(_BLOCKS_AT_ONCE) as pool:
        for ids, n_bytes, n_stories in _map_ahead(pool, encode, blocks):
            file.write(ids.data)
            checksum.update(ids.data)
            show(n_bytes)
            counts.update(tokens=len(ids), bytes=n_bytes, stories=n_stories)
        file.flush()
        sync(file.fileno())
    return {**counts, "blake2b": checksum.hexdigest()}


def _map_ahead(pool: Executor, function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """Yield `function(item)` for each item in order, computed in `pool` while items are read."""
    futures: deque[Future[T]] = deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > _BLOCKS_AT_ONCE:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def _blocks(items: Iterable[T], length: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield `items` in lists of at least _BLOCK_CHARACTERS characters; the last may have fewer.

    `length` returns the number of characters of an item.
    """
    block: list[T] = []
    capacity = _BLOCK_CHARACTERS
    for item in items:
        block.append(item)
        capacity -= length(item)
        if capacity <= 0:
            yield block
            block, capacity = [], _BLOCK_CHARACTERS
    if block:
        yield block


def _first_bytes(pieces: Iterable[tuple[str, bool]], limit: int) -> Iterator[str]:
    """Yield the texts of `pieces` until at least `limit` UTF-8 bytes were yielded."""
    total = 0
    for text, _ in pieces:
        yield text
        total += utf8_length(text)
        if total >= limit:
            return


def _shown(texts: Iterable[str], show: Callable[[int], None]) -> Iterator[str]:
    """Yield `texts`, and call `show` with the number of UTF-8 bytes of each block of texts."""
    for block in _blocks(texts, len):
        yield from block
        show(sum(map(utf8_length, block)))


def _write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write meta.json: the given values and a checksum over them."""
    write_json(folder / _META, meta | {"meta": _checksum(meta)})


def _read_meta(folder: Path) -> dict[str, Any]:
    """Verify meta.json and return its content.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not valid JSON, or its checksum does not match.
    """
    meta = read_json(folder / _META)
    # Files prepared before meta.json had a checksum of its own are still valid.
    if not isinstance(meta, dict) or meta.pop("meta", None) not in (None, _checksum(meta)):
        raise ValueError(f"checksum mismatch in {folder / _META}")
    return meta


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _check(path: Path, blake2b: str) -> None:
    """Raise ValueError unless `blake2b` is the checksum of the file.

    The check takes 0.3 s per 100M tokens.
    """
    if _digest(path) != blake2b:
        raise ValueError(f"checksum mismatch in {path}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


# ---------------------------------------------------------------------------- cache


def _prepared(cache_dir: str | Path, kind: str, ingredients: dict[str, Any]) -> Path:
    """Return the cache folder for files of type `kind` that are prepared from `ingredients`."""
    versions = {"format": _FORMAT, "tokenizers": tokenizers.__version__}
    text = json.dumps({**versions, **ingredients}, sort_keys=True)
    fingerprint = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return Path(cache_dir) / "prepared" / f"{kind}-{fingerprint}"


def _cached(path: Path, load: Callable[[Path], T], make: Callable[[Path], None]) -> T:
    """Return the result of `load(path)`; if `path` is missing or damaged, call `make` before.

    `make` writes to a temporary folder, which is then renamed to `path` atomically. A lock ensures
    that only one process writes. Before `make` is called, a temporary folder that a killed process
    has left is deleted.
    """
    try:
        return load(path)
    except (OSError, ValueError, KeyError):
        pass  # missing or damaged: try again with the lock
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.warning("another process is preparing %s; waiting for it", path)
            lock.acquire()
        with contextlib.ExitStack() as at_exit:
            at_exit.callback(lock.release)
            try:
                return load(path)
            except (OSError, ValueError, KeyError) as error:
                if path.exists():
                    log.warning("%s is damaged (%s); preparing it again", path, error)
                    shutil.rmtree(path)
            unfinished = path.with_name(f"{path.name}.unfinished")
            at_exit.callback(shutil.rmtree, unfinished, ignore_errors=True)
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.replace(path)
    except (OSError, NotImplementedError) as error:  # NotImplementedError: no file locks
        raise write_error(f"cannot write {path}", error, "data.cache_dir") from None
    return load(path)
