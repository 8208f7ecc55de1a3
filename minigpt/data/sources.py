"""Sources of stories: the bundled sample, your own files, a dataset from the Hub, or TinyStories.

A `Corpus` lists files and divides their stories into a training and a validation split. Stories are
streamed, so a corpus may be far larger than memory. TinyStories is by Eldan and Li (2023, arXiv
2305.07759).
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import importlib.resources
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from minigpt.core.files import user_path, write_error
from minigpt.core.settings import UserError
from minigpt.data.config import DataConfig
from minigpt.data.download import fetch
from minigpt.data.files import Piece, find_cut, read_pieces
from minigpt.data.formats import detect_format
from minigpt.data.hub import fetch_dataset
from minigpt.tokenizer import END_OF_TEXT

log = logging.getLogger(__name__)

Split = Literal["train", "valid"]

_MEBIBYTE = 1 << 20
_LONGEST_PATH = 4000  # characters, about the limit of operating systems
_HASH_WHOLE = 64 << 20  # bytes; larger files are identified by size, mtime and both ends

_TUNING = 7  # every seventh training story is held out for tuning

_REPO = "roneneldan/TinyStories"
_TRAIN, _VALID = "TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"
_BYTES_PER_TOKEN = 3.84  # with a 3,000-token BPE, measured on the bundled sample
_STORY_MARGIN = 1.02  # story bytes to read, as a multiple of tokens * _BYTES_PER_TOKEN
_FILE_MARGIN = 1.05  # the same for the file bytes to download; separators are 2 % of a file
_VALID_BYTES = 32 << 20  # bytes to read from a validation split on the Hub


@dataclass(frozen=True)
class Corpus:
    """Files of stories, and their division into a training and a validation split."""

    train_files: tuple[Path, ...]
    """Files with the training stories, in the order in which they are read; may be empty if only
    `valid_files` are read."""

    valid_files: tuple[Path, ...]
    """Files with the validation stories; if empty, the last training stories are held out for
    validation."""

    holdout: float = DataConfig.holdout
    """Fraction of the training stories to hold out if `valid_files` is empty. If none or all of the
    stories would be held out, each document is divided instead: this fraction of its length is held
    out. A document is a text file with a single story."""

    separator: str = DataConfig.separator
    """Separator between two stories in a .txt or .md file."""

    max_train_bytes: int | None = None
    """Approximate maximum number of UTF-8 bytes of stories to read from the training files; no
    story is cut. None means all stories."""

    max_valid_bytes: int | None = None
    """Approximate maximum number of UTF-8 bytes of stories to read from the validation files; no
    story is cut. None means all stories."""

    field: str | None = None
    """Column or key that holds the stories; None selects `text` if it exists, else `story`, else
    the only text column."""

    tuning: bool = False
    """Whether to validate on every seventh training story instead of the validation split."""

    max_stories: int | None = None
    """Maximum number of training stories, taken from the start of the training split; None means
    all stories. The validation stories do not depend on it."""

    def stories(self, split: Split) -> Iterator[str]:
        """Yield the stories of a split; a story above two million characters comes in pieces.

        Args:
            split: "train" or "valid".

        Yields:
            A story, or a piece of a long story; it is not empty.

        Raises:
            UserError: the split cannot be read. `pieces` lists the reasons.
        """
        return (text for text, _ in self.pieces(split) if text)

    def pieces(self, split: Split) -> Iterator[Piece]:
        """Yield the pieces of all stories of a split, in file order.

        Only a story of more than two million characters has several pieces. A story that is in both
        splits is removed from one of them: from the training stories if there are validation files,
        else from the held-out stories. No story is removed if the field `tuning` is true, or if
        each document is divided between the splits (see the field `holdout`).

        Args:
            split: "train" or "valid".

        Yields:
            A piece of a story, and whether it is the last piece of that story.

        Raises:
            UserError: there are no files for the split, a file cannot be read, or `holdout` leaves
                a split without stories.
        """
        if self.max_stories is not None:
            stories = self._unlimited.pieces(split)
            return _slice(stories, 0, self.max_stories) if split == "train" else stories
        if self.tuning:
            stories = self._train_pieces() if self.valid_files else self._reported.pieces("train")
            return _every_seventh(stories, split == "valid")
        if self.valid_files:
            if split == "valid":
                return self._valid_pieces()
            return _without(self._valid_digests, self._train_pieces(), "training")
        n_train, lengths = self._division
        if lengths:
            return self._documents(lengths, split)
        if split == "train":
            return _slice(self._train_pieces(), 0, n_train)
        return _without(self._repeated_digests, _slice(self._train_pieces(), n_train), "held-out")

    def fingerprint(self, split: Split) -> dict[str, Any]:
        """Return all settings and file hashes that determine the stories of a split, but no paths.

        Args:
            split: "train" or "valid".

        Returns:
            Values that `json.dumps` accepts; equal values mean equal stories.

        Raises:
            UserError: a file cannot be read.
        """
        if self.max_stories is not None:
            limit = {"max_stories": self.max_stories} if split == "train" else {}
            return self._unlimited.fingerprint(split) | limit
        if self.tuning:
            holdout = None if self.valid_files else self.holdout
            own = {"split": split, "tuning": _TUNING, "holdout": holdout}
            return self._reported.fingerprint("train") | own
        given = split == "valid" and bool(self.valid_files)
        train_files = () if given else self.train_files
        return {
            "split": split,
            "files": [_file_fingerprint(path) for path in train_files],
            "valid_files": [_file_fingerprint(path) for path in self.valid_files],
            "separator": self.separator,
            "field": self.field,
            "holdout": None if self.valid_files else self.holdout,
            "max_bytes": None if given else self.max_train_bytes,
            **({"max_valid_bytes": self.max_valid_bytes} if self.max_valid_bytes else {}),
        }

    @cached_property
    def _unlimited(self) -> Corpus:
        """Copy of this corpus without the limit `max_stories`."""
        return dataclasses.replace(self, max_stories=None)

    @cached_property
    def _reported(self) -> Corpus:
        """Copy of this corpus with `tuning` off and without validation files."""
        return dataclasses.replace(self, tuning=False, valid_files=())

    def _read(self, files: tuple[Path, ...]) -> Iterator[Piece]:
        for path in files:
            yield from read_pieces(path, self.separator, self.field)

    def _valid_pieces(self) -> Iterator[Piece]:
        pieces = self._read(self.valid_files)
        return pieces if self.max_valid_bytes is None else _take(pieces, self.max_valid_bytes)

    def _train_pieces(self) -> Iterator[Piece]:
        if not self.train_files:
            example = {"data.train_files": ["stories.txt"]}
            raise UserError("there are no training files", "data.train_files", fix=example)
        pieces = self._read(self.train_files)
        return pieces if self.max_train_bytes is None else _take(pieces, self.max_train_bytes)

    @cached_property
    def _division(self) -> tuple[int, dict[Path, int]]:
        """Number of training stories, and the length in characters of each document to divide.

        A document is a text file with a single story. If whole stories can be held out, no document
        is divided, and the second value is an empty dict. To count the stories, all training files
        are read.
        """
        total = sum(ends for _, ends in self._train_pieces())
        n_valid = round(total * self.holdout)
        if 0 < n_valid < total:
            return total - n_valid, {}
        lengths = {}
        for path in self.train_files:
            if detect_format(path).kind == "text":
                sizes = [(len(text), ends) for text, ends in self._read((path,))]
                if sum(ends for _, ends in sizes) == 1:
                    lengths[path] = sum(size for size, _ in sizes)
        if not lengths:
            lacking = "training" if n_valid else "validation"
            problem = f"leaves none of {total} stories for {lacking}"
            remedy = "choose another fraction, or set data.valid_files "
            remedy += "(with data=hf: data.valid_split)"
            raise UserError(f"{problem}; {remedy}", "data.holdout", self.holdout)
        share = f"its last {100 * self.holdout:.3g} % are held out"
        more = r"data.separator='\n\n' would make each paragraph a story"
        for path in lengths:
            log.info("%s contains no %r, so %s; %s", path, self.separator, share, more)
        return total, lengths

    def _documents(self, lengths: dict[Path, int], split: Split) -> Iterator[Piece]:
        for path in self.train_files:
            pieces = self._read((path,))
            if path in lengths:
                yield from _part(pieces, lengths[path], self.holdout, split)
            elif split == "train":
                yield from pieces

    @cached_property
    def _valid_digests(self) -> set[bytes]:
        return set(_digests(self._valid_pieces()))

    @cached_property
    def _repeated_digests(self) -> set[bytes]:
        """Digests of the held-out stories that are also in the training split."""
        n_train, _ = self._division
        held_out = set(_digests(_slice(self._train_pieces(), n_train)))
        return held_out.intersection(_digests(_slice(self._train_pieces(), 0, n_train)))


def _slice(pieces: Iterable[Piece], start: int, stop: int | None = None) -> Iterator[Piece]:
    """Yield the pieces of the stories with indices from `start` to `stop` - 1."""
    story = 0
    for text, ends in pieces:
        if story == stop:
            return
        if story >= start:
            yield text, ends
        story += ends


def _every_seventh(pieces: Iterable[Piece], held_out: bool) -> Iterator[Piece]:
    """Yield the pieces of every seventh story if `held_out`, else of the remaining stories."""
    story = 0
    for text, ends in pieces:
        if (story % _TUNING == _TUNING - 1) is held_out:
            yield text, ends
        story += ends


def _begun(pieces: Iterable[Piece]) -> Iterator[tuple[str, bool, bool]]:
    """Yield (text, is_last, is_first): each piece, and whether it ends and begins its story."""
    begins = True
    for text, ends in pieces:
        yield text, ends, begins
        begins = ends


def _take(pieces: Iterable[Piece], max_bytes: int) -> Iterator[Piece]:
    """Yield the first stories, about `max_bytes` UTF-8 bytes in total; no story is cut."""
    total = 0
    for text, ends, begins in _begun(pieces):
        size = len(text.encode())
        if begins and total and total + size > max_bytes:  # the first story is always yielded
            return
        total += size
        yield text, ends


def _part(pieces: Iterable[Piece], length: int, holdout: float, split: Split) -> Iterator[Piece]:
    """Yield the pieces of a document that belong to `split`.

    The last characters belong to "valid": about the fraction `holdout` of all `length` characters.
    The characters before them belong to "train".
    """
    position = min(max(1, round(length * (1 - holdout))), length - 1)
    margin = int(min(holdout, 1 - holdout) * length / 2)
    for text, ends in pieces:
        if position > len(text) or position <= 0:
            if (position > 0) == (split == "train"):
                yield text, ends
        else:
            low, high = max(0, position - margin), min(len(text), position + margin)
            cut = find_cut(text, low, high, position)
            if split == "train":
                yield text[:cut], True
            elif text[cut:]:
                yield text[cut:], ends
        position -= len(text)


def _digests(pieces: Iterable[Piece]) -> Iterator[bytes]:
    """Yield one digest per story, computed from the first piece of the story.

    Only a long story has several pieces. Two different long stories are assumed to have different
    first pieces.
    """
    return (_digest(text) for text, _, begins in _begun(pieces) if begins)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _without(digests: set[bytes], pieces: Iterable[Piece], kind: str) -> Iterator[Piece]:
    """Yield the pieces of all stories except those whose first piece has a digest in `digests`.

    If stories are left out, their number is logged.
    """
    n_dropped, drop = 0, False
    for text, ends, begins in _begun(pieces):
        if begins:
            drop = bool(digests) and _digest(text) in digests
            n_dropped += drop
        if not drop:
            yield text, ends
    if n_dropped:
        log.info("left out %d %s stories that are also in the other split", n_dropped, kind)


def _file_fingerprint(path: Path) -> dict[str, Any]:
    """Return the format and the content hash of a file.

    A file of 64 MiB or more is identified by its size, its mtime, and a hash of its first and last
    MiB.
    """
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            known = dataclasses.asdict(detect_format(path))
            if stat.st_size < _HASH_WHOLE:
                return known | {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
            ends = hashlib.sha256(file.read(_MEBIBYTE))
            file.seek(-_MEBIBYTE, os.SEEK_END)
            ends.update(file.read(_MEBIBYTE))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    return known | {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ends": ends.hexdigest()}


def open_corpus(config: DataConfig, valid_only: bool = False) -> Corpus:
    """Return the corpus that `config` selects, and download it if necessary.

    Args:
        config: data settings.
        valid_only: whether the caller reads only the validation split. If so, training stories are
            downloaded only if the validation stories are taken from them, for example with
            `config.valid="tuning"`.

    Returns:
        The corpus. All of its files are on this machine.

    Raises:
        UserError: the files of the corpus do not exist, or cannot be downloaded.
    """
    tuning = config.valid == "tuning"
    corpus = _open_source(config, valid_only and not tuning)
    return dataclasses.replace(corpus, tuning=tuning, max_stories=config.max_stories)


def _open_source(config: DataConfig, valid_only: bool) -> Corpus:
    downloads = Path(config.cache_dir) / "downloads"
    if config.source == "text":
        # in a shell, a line feed is typed as \n and a tab as \t
        separator = config.separator.replace("\\n", "\n").replace("\\t", "\t")
        files = config.train_files, config.valid_files
        return local_files(*files, config.holdout, separator, config.field)
    if config.source == "hf":
        return _hub_dataset(config, downloads, valid_only)
    if config.source == "tinystories":
        return download_tinystories(downloads, config.download_tokens, valid_only)
    return bundled_sample()


def _hub_dataset(config: DataConfig, folder: Path, valid_only: bool) -> Corpus:
    tokens = config.download_tokens
    max_bytes = None if tokens is None else math.ceil(tokens * _BYTES_PER_TOKEN * _STORY_MARGIN)

    train, valid, limit = (), (), None
    if config.valid_split is not None:
        limit = _VALID_BYTES
        valid = (fetch_dataset(folder, config, config.valid_split, _VALID_BYTES),)
    if not (valid and valid_only):
        train = (fetch_dataset(folder, config, config.split, max_bytes),)
    # The cache may contain more of a split, if it was read as another split.
    return Corpus(train, valid, config.holdout, max_train_bytes=max_bytes, max_valid_bytes=limit)


def bundled_sample(release: Literal["v1", "v2"] = "v2") -> Corpus:
    """Return the stories bundled with this package: 39,927 for training, 3,000 for validation.

    Args:
        release: release of TinyStories from which the validation stories are taken.

    Returns:
        The corpus.
    """
    folder = importlib.resources.files("minigpt") / "data" / "tinystories"
    names = "train", "valid" if release == "v2" else "valid_v1"
    train, valid = (Path(str(folder / f"{name}.txt.xz")) for name in names)
    return Corpus(train_files=(train,), valid_files=(valid,))


def local_files(
    train_files: Sequence[str],
    valid_files: Sequence[str],
    holdout: float = DataConfig.holdout,
    separator: str = END_OF_TEXT,
    field: str | None = None,
) -> Corpus:
    """Return a corpus of the user's own files.

    Args:
        train_files: paths or globs of the training files. `~` and `**` are expanded. A file that
            several patterns match is read once.
        valid_files: paths or globs of the validation files; if empty, the last training stories
            are held out.
        holdout: fraction of the training stories to hold out, above 0 and below 1.
        separator: separator between two stories in a .txt or .md file.
        field: column or key that holds the stories in files other than .txt and .md; None selects
            a column or key as described in `Corpus`.

    Returns:
        The corpus. The files that match one pattern are sorted by path.

    Raises:
        UserError: no file matches a pattern, a file cannot be read, or a file is in both splits.
    """
    train, valid = _expand(train_files, "train_files"), _expand(valid_files, "valid_files")
    for file in train.keys() & valid.keys():
        problem = f"{valid[file]} is also in data.train_files; remove it from one of the two"
        raise UserError(problem, "data.valid_files")
    return Corpus(tuple(train.values()), tuple(valid.values()), holdout, separator, field=field)


def _expand(patterns: Sequence[str], field: str) -> dict[tuple[int, int], Path]:
    """Return the files that match the patterns, as a dict with keys (device, inode).

    A file that matches several patterns occurs once. The files are in the order of the patterns;
    the files that match one pattern are sorted. `field` is the setting that error messages name.
    """
    argument, paths = f"data.{field}", {}
    for pattern in patterns:
        if "\0" in pattern or len(pattern) > _LONGEST_PATH:
            limits = f"it must have no NUL character and at most {_LONGEST_PATH} characters"
            raise UserError(f"{pattern[:50]!r} is not a path: {limits}", argument)
        path = user_path(pattern, argument)
        if path.is_dir():
            files = {argument: [f"{path}/*.txt"]}
            raise UserError(f"{path} is a folder; give the files in it", argument, fix=files)
        # Brackets in the name of an existing folder or file are not part of a glob pattern.
        real = next(p for p in (path, *path.parents) if p.exists())
        matches = glob.glob(
            str(Path(glob.escape(str(real))) / path.relative_to(real)), recursive=True
        )
        files = [match for match in map(Path, sorted(matches)) if match.is_file()]
        if not files:
            raise UserError(f"no file matches {path} (working directory {Path.cwd()})", argument)
        for file in files:
            detect_format(file)  # reports unreadable files now, not after hours
            stat = file.stat()
            paths.setdefault((stat.st_dev, stat.st_ino), file)
    return paths


def download_tinystories(folder: Path, tokens: int | None, valid_only: bool = False) -> Corpus:
    """Download TinyStories (GPT-4 version) from the Hugging Face Hub, and return it as a corpus.

    If `tokens` is not None, only a prefix of the training file is downloaded, with enough stories
    for that number of tokens. The same `tokens` give the same stories, even if a longer prefix is
    stored. If enough stories are stored, the network is not used. An interrupted download of a
    prefix continues where it stopped.

    Args:
        folder: folder for the files, created if missing.
        tokens: number of training tokens, estimated at 3.84 bytes each; None means the whole
            training file (2.2 GB).
        valid_only: whether to skip the training file.

    Returns:
        The corpus; if `valid_only`, it has no training files.

    Raises:
        UserError: the Hub cannot be reached, a download is damaged, or `folder` cannot be written.
    """
    max_bytes, file_bytes = (
        None if tokens is None else math.ceil(tokens * _BYTES_PER_TOKEN * margin)
        for margin in (_STORY_MARGIN, _FILE_MARGIN)
    )
    try:
        valid = fetch(folder, _REPO, _VALID, END_OF_TEXT)
        if valid_only:
            return Corpus((), (valid,))
        train = fetch(folder, _REPO, _TRAIN, END_OF_TEXT, file_bytes)
    except ConnectionError as error:
        remedy = "try again, or use data=tinystories_sample (bundled) or data=text (your files)"
        problem = f"could not download TinyStories ({error}); {remedy}"
        raise UserError(problem, "data.source", "tinystories") from None
    except OSError as error:
        problem = f"cannot write TinyStories to {folder}"
        raise write_error(problem, error, "data.cache_dir") from None
    return Corpus((train,), (valid,), max_train_bytes=max_bytes)
