"""Where stories come from: the bundled sample, your own files, or the full TinyStories corpus.

A `Corpus` names files and says how they divide into training and validation; its stories are
always streamed, so a corpus may be far larger than memory. TinyStories is by Eldan and Li
(https://arxiv.org/abs/2305.07759).
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import importlib.resources
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from minigpt.core.settings import UserError
from minigpt.data.config import DataConfig
from minigpt.data.download import fetch
from minigpt.data.files import is_jsonl, read_stories
from minigpt.tokenizer import END_OF_TEXT

Split = Literal["train", "valid"]

_MEBIBYTE = 1 << 20
_LONGEST_PATH = 4000  # characters; systems allow about as many
_HASH_WHOLE = 64 << 20  # bytes; larger files are fingerprinted by size, time and both ends

_REPO = "roneneldan/TinyStories"
_TRAIN, _VALID = "TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"
_BYTES_PER_TOKEN = 3.84  # of the 3,000-token BPE, measured on the bundled sample
_STORY_MARGIN = 1.02  # story bytes kept beyond the token budget
_FILE_MARGIN = 1.05  # file bytes fetched beyond it: separators between stories are 2 % of the file


@dataclass(frozen=True)
class Corpus:
    """Story files, and how they divide into a training and a validation split."""

    train_files: tuple[Path, ...]  # read in this order; may be empty when only "valid" is wanted
    valid_files: tuple[Path, ...]  # empty: the last `holdout` of the training stories instead
    holdout: float = DataConfig.holdout  # share of the training stories, by count
    separator: str = DataConfig.separator  # what stands between the stories of a .txt file
    max_train_bytes: int | None = None  # train on whole stories up to so many UTF-8 bytes

    def stories(self, split: Split) -> Iterator[str]:
        """Yield the stories of a split in file order: stripped, never empty.

        Raises:
            UserError: no files for the split, a file that cannot be read, or a holdout that
                leaves one of the splits without a story.
        """
        if split == "valid":
            if self.valid_files:
                return self._read(self.valid_files)
            return itertools.islice(self._read(self.train_files), self._n_train, None)
        n_train = None if self.valid_files else self._n_train
        stories = itertools.islice(self._read(self.train_files), n_train)
        return stories if self.max_train_bytes is None else _take(stories, self.max_train_bytes)

    def pieces(self, split: Split) -> Iterator[tuple[str, bool]]:
        """Yield texts of a split, and whether a story ends there."""
        return ((story, True) for story in self.stories(split))

    def fingerprint(self, split: Split) -> dict[str, Any]:
        """Return all that determines the stories of a split, for json.dumps: not their folder."""
        held_out = not self.valid_files
        files = self.valid_files if split == "valid" and not held_out else self.train_files
        return {
            "split": split,
            "files": [_file_fingerprint(path) for path in files],
            "separator": self.separator,
            "holdout": self.holdout if held_out else None,
            "max_bytes": self.max_train_bytes if split == "train" else None,
        }

    def _read(self, files: tuple[Path, ...]) -> Iterator[str]:
        if not files:
            example = {"data.train_files": ["stories.txt"]}
            raise UserError("there are no training files", "data.train_files", fix=example)
        return itertools.chain.from_iterable(read_stories(path, self.separator) for path in files)

    @cached_property
    def _n_train(self) -> int:
        """Number of training stories when the rest is held out; counts all stories, once."""
        total = sum(1 for _ in self._read(self.train_files))
        n_valid = round(total * self.holdout)
        if not 0 < n_valid < total:
            lacking = "training" if n_valid else "validation"
            problem = f"of {total} stories this leaves none for {lacking}"
            remedy = "choose another share, or name data.valid_files"
            raise UserError(f"{problem}; {remedy}", "data.holdout", self.holdout)
        return total - n_valid


def _take(stories: Iterator[str], max_bytes: int) -> Iterator[str]:
    """Yield the first stories that take at most `max_bytes` together in UTF-8."""
    total = 0
    for story in stories:
        total += len(story.encode())
        if total > max_bytes:
            return
        yield story


def _file_fingerprint(path: Path) -> dict[str, Any]:
    """Return a file's content hash; of a large file size, time of change, first and last MiB."""
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            known: dict[str, Any] = {"jsonl": is_jsonl(path), "packed": path.suffix.lower()}
            if stat.st_size < _HASH_WHOLE:
                return known | {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
            ends = hashlib.sha256(file.read(_MEBIBYTE))
            file.seek(-_MEBIBYTE, os.SEEK_END)
            ends.update(file.read(_MEBIBYTE))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    return known | {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ends": ends.hexdigest()}


def open_corpus(config: DataConfig, valid_only: bool = False) -> Corpus:
    """Return the stories that `config` names, downloaded first if they have to be.

    With `valid_only`, nothing is downloaded that only training needs, and "valid" alone can be
    read.
    """
    if config.source == "text":
        separator = config.separator.replace("\\n", "\n").replace("\\t", "\t")  # as they are typed
        return local_files(config.train_files, config.valid_files, config.holdout, separator)
    if config.source == "tinystories":
        downloads = Path(config.cache_dir) / "downloads"
        return download_tinystories(downloads, config.download_tokens, valid_only)
    if config.source == "tinystories_tuning":
        return dataclasses.replace(bundled_sample(), valid_files=(), holdout=config.holdout)
    return bundled_sample()


def bundled_sample() -> Corpus:
    """Return the stories in this package: 14,849 to train on, 3,000 for validation alone."""
    folder = importlib.resources.files("minigpt") / "data" / "tinystories"
    train, valid = (Path(str(folder / f"{split}.txt.xz")) for split in ("train", "valid"))
    return Corpus(train_files=(train,), valid_files=(valid,))


def local_files(
    train_files: Sequence[str],
    valid_files: Sequence[str],
    holdout: float = DataConfig.holdout,
    separator: str = END_OF_TEXT,
) -> Corpus:
    """Return a corpus of the user's own files, given as paths or globs (`~` and `**` work).

    Raises:
        UserError: a name that is no readable kind of file, or a file in both splits.
    """
    train, valid = _expand(train_files, "train_files"), _expand(valid_files, "valid_files")
    for path in train:
        if path.resolve() in {other.resolve() for other in valid}:
            problem = f"{path} is in data.train_files too; name others, or none to hold some out"
            raise UserError(problem, "data.valid_files")
    return Corpus(train, valid, holdout, separator)


def _expand(patterns: Sequence[str], field: str) -> tuple[Path, ...]:
    """Return the files that the patterns name: pattern by pattern, matches sorted, none twice."""
    argument, paths = f"data.{field}", {}
    for pattern in patterns:
        if "\0" in pattern or len(pattern) > _LONGEST_PATH:
            raise UserError(f"{pattern[:50]!r} ... is not a path", argument)
        path = Path(pattern).expanduser()
        if path.is_dir():
            files = {argument: [f"{path}/*.txt"]}
            raise UserError(f"{path} is a folder; name the files in it", argument, fix=files)
        matches = [path]
        if not path.is_file() and glob.has_magic(pattern):  # a real name may have brackets in it
            matches = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        files = [path for path in matches if path.is_file()]
        if not files:
            raise UserError(f"there is no file {path} in {Path.cwd()}", argument)
        for path in files:
            is_jsonl(path)  # a suffix that cannot be read is an error now, not hours later
            paths[path] = None
    return tuple(paths)


def download_tinystories(folder: Path, tokens: int | None, valid_only: bool = False) -> Corpus:
    """Return TinyStories (GPT-4 version) from the Hugging Face Hub, kept in `folder`.

    Of the training file only the first stories are fetched, as many as `tokens` need, and a
    request always gives the same stories, however much is already there; with enough there, the
    network is not used. An interrupted download of a first part continues where it stopped.

    Args:
        folder: where the files are kept; created when missing.
        tokens: training tokens wanted, at 3.84 bytes each; None for the whole file (2.2 GB).
        valid_only: do not fetch the training file.

    Raises:
        UserError: the hub cannot be reached, what arrived is damaged, or nothing can be written.
    """
    kept, fetched = (
        None if tokens is None else math.ceil(tokens * _BYTES_PER_TOKEN * margin)
        for margin in (_STORY_MARGIN, _FILE_MARGIN)
    )
    try:
        valid = fetch(folder, _REPO, _VALID, END_OF_TEXT)
        if valid_only:
            return Corpus((), (valid,))
        train = fetch(folder, _REPO, _TRAIN, END_OF_TEXT, fetched)
    except ConnectionError as error:
        remedy = "try again to continue, or use tinystories_sample (bundled) or text (your files)"
        problem = f"could not download TinyStories ({error}); {remedy}"
        raise UserError(problem, "data.source", "tinystories") from None
    except OSError as error:
        problem = f"cannot write TinyStories to {folder} ({error.strerror or error})"
        raise UserError(f"{problem}; name another folder", "data.cache_dir") from None
    return Corpus((train,), (valid,), max_train_bytes=kept)
