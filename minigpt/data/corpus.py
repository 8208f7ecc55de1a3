"""A corpus of stories: its files, and their division into a training and a validation split.

Stories are streamed, so a corpus may be far larger than memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minigpt.core.settings import UserError
from minigpt.data.config import DataConfig
from minigpt.data.files import Piece, find_cut, read_pieces
from minigpt.data.formats import detect_format

Split = Literal["train", "valid"]

_MEBIBYTE = 1 << 20
_HASH_WHOLE = 64 << 20  # bytes; larger files are identified by size, mtime and both ends
_TUNING = 7  # every seventh training story is held out for tuning


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

    notes: list[str] = dataclasses.field(default_factory=list, compare=False, repr=False)
    """Sentences about the division of the stories read so far, for the log of a run."""

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
        splits is removed from one of them: from the training stories if there are validation files
        and `tuning` is false, else from the held-out stories. No story is removed if each document
        is divided between the splits (see the field `holdout`). The numbers of held-out and removed
        stories are added to `notes`.

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
            if split == "train":
                return _every_seventh(self._tuned_pieces(), held_out=False)
            pieces = _every_seventh(self._tuned_pieces(), held_out=True)
            return self._without(self._repeated_tuning_digests, pieces, "held-out")
        if self.valid_files:
            if split == "valid":
                return self._valid_pieces()
            return self._without(self._valid_digests, self._train_pieces(), "training")
        n_train, lengths = self._division
        if lengths:
            return self._documents(lengths, split)
        if split == "train":
            return _slice(self._train_pieces(), 0, n_train)
        pieces = _slice(self._train_pieces(), n_train)
        return self._without(self._repeated_digests, pieces, "held-out")

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
            own = {"split": split, "tuning": _TUNING, "holdout": holdout, "unique": True}
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

    def _tuned_pieces(self) -> Iterator[Piece]:
        """Yield the pieces of the stories of which `tuning` holds out every seventh."""
        return self._train_pieces() if self.valid_files else self._reported.pieces("train")

    @cached_property
    def _division(self) -> tuple[int, dict[Path, int]]:
        """Number of training stories, and the length in characters of each document to divide.

        A document is a text file with a single story. If whole stories can be held out, no document
        is divided, and the second value is an empty dict. To count the stories, all training files
        are read.
        """
        total = len(self._train_digests)
        n_valid = round(total * self.holdout)
        if 0 < n_valid < total:
            self.notes.append(f"the last {n_valid:,} of {total:,} stories are held out")
            return total - n_valid, {}
        lengths = {}
        for path in self.train_files:
            if detect_format(path).kind == "text":
                sizes = [(len(text), ends) for text, ends in self._read((path,))]
                if sum(ends for _, ends in sizes) == 1:
                    lengths[path] = sum(size for size, _ in sizes)
        if not lengths:
            raise self._holdout_error(total, "training" if n_valid else "validation")
        share = f"so its last {100 * self.holdout:.3g} % are held out"
        if self.separator != "\n\n":
            share += r"; data.separator='\n\n' would make each paragraph a story"
        self.notes.extend(f"{path.name} is a single document, {share}" for path in lengths)
        return total, lengths

    def _holdout_error(self, total: int, lacking: str) -> UserError:
        """Return the error for `holdout` if it leaves none of `total` stories for a split."""
        problem = f"leaves none of {total} stories for {lacking}"
        if total < 2:
            remedy = "add stories, or save the story as .txt, to hold out its end"
            return UserError(f"{problem}; {remedy}", "data.holdout", self.holdout)
        remedy = "choose another fraction, or set data.valid_files (with data=hf: data.valid_split)"
        fix = {"data.holdout": float(f"{1 / total:.2g}")}  # one story
        return UserError(f"{problem}; {remedy}", "data.holdout", self.holdout, fix)

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
    def _train_digests(self) -> np.ndarray:
        """Digests of all stories in the training files, so that one pass also counts them."""
        return _digest_array(self._train_pieces())

    @cached_property
    def _repeated_digests(self) -> set[bytes]:
        """Digests of the held-out stories that are also in the training split."""
        n_train, _ = self._division
        return _common(self._train_digests[n_train:], self._train_digests[:n_train])

    @cached_property
    def _repeated_tuning_digests(self) -> set[bytes]:
        """Digests of the stories that `tuning` holds out and that are also training stories."""
        digests = _digest_array(self._tuned_pieces())
        held_out = np.arange(len(digests)) % _TUNING == _TUNING - 1
        return _common(digests[held_out], digests[~held_out])

    def _without(self, digests: set[bytes], pieces: Iterable[Piece], kind: str) -> Iterator[Piece]:
        """Yield the pieces of all stories except those whose first piece has one of the digests.

        If stories are left out, their number is noted.
        """
        n_dropped, drop = 0, False
        for text, ends, begins in _begun(pieces):
            if begins:
                drop = bool(digests) and _digest(text) in digests
                n_dropped += drop
            if not drop:
                yield text, ends
        if n_dropped:
            n_stories = f"{n_dropped:,} {kind} stor{'ies' if n_dropped > 1 else 'y'}"
            self.notes.append(f"left out {n_stories} that the other split has too")


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
    """Yield the pieces of every seventh story if `held_out`, else of the remaining stories.

    Raises:
        UserError: there are fewer than seven stories.
    """
    story = 0
    for text, ends in pieces:
        if (story % _TUNING == _TUNING - 1) is held_out:
            yield text, ends
        story += ends
    if story < _TUNING:
        problem = f"holds out every seventh story, but there are {story}: leave it out, or add "
        problem += r"stories (data.separator='\n\n' makes a story of each paragraph)"
        raise UserError(problem, "data.valid", "tuning")


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


def _digest_array(pieces: Iterable[Piece]) -> np.ndarray:
    """Return the digest of each story as an array [n_stories]: 8 bytes for each."""
    return np.fromiter(_digests(pieces), dtype="V8")


def _common(some: np.ndarray, others: np.ndarray) -> set[bytes]:
    """Return the digests that are in both arrays."""
    both = some.view(np.uint64)[np.isin(some.view(np.uint64), others.view(np.uint64))]
    return {digest.tobytes() for digest in both}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


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
