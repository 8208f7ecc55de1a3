"""Where stories come from: the bundled sample, a user's own files, or the full TinyStories corpus.

A `Corpus` names files and says how they divide into training and validation; its stories are
always streamed, so a corpus may be far larger than memory. TinyStories is by Eldan and Li
(https://arxiv.org/abs/2305.07759).
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import importlib.resources
import io
import itertools
import lzma
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from minigpt.core.files import parse_json
from minigpt.core.settings import UserError
from minigpt.data.download import fetch

END_OF_TEXT = "<|endoftext|>"
Split = Literal["train", "valid"]

_CHUNK = 1 << 20  # bytes read at a time
_LONGEST = 64 << 20  # characters a story may have; what keeps memory bounded without a separator
# A packed file may unpack to so many bytes, or times its size, whichever is more: English packs to
# a fifth, a story that repeats to a hundredth, and a file made to fill a disk to a thousandth.
_UNPACKED, _UNPACKED_TIMES = 64 << 20, 200
_LONGEST_PATH = 4000  # characters; systems allow about as many
_HASH_WHOLE = 64 << 20  # bytes; larger files are fingerprinted by size, time and both ends

_REPO = "roneneldan/TinyStories"
_TRAIN, _VALID = "TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"
_BYTES_PER_TOKEN = 3.84  # of the 3,000-token BPE, measured on the bundled sample
_STORY_MARGIN = 1.02  # story bytes kept beyond the token budget
_FILE_MARGIN = 1.05  # file bytes fetched beyond it: separators between stories are 2 % of the file


# ---------------------------------------------------------------------------- reading one file


def read_stories(path: Path, separator: str = END_OF_TEXT) -> Iterator[str]:
    """Stream the stories of one file: stripped, never empty, line ends as `\\n`.

    Args:
        path: .txt (stories divided by `separator`) or .jsonl (one story a line: a string, or an
            object with its text under "story" or "text"); either may be packed, .xz or .gz.
        separator: what stands between two stories of a text file.

    Raises:
        UserError: the file is missing, damaged, not UTF-8, or not in the form described above.
    """
    stories = _json_stories(path) if _is_jsonl(path) else _text_stories(path, separator)
    empty = True
    for story in stories:
        if story := story.strip():
            empty = False
            yield story
    if empty:
        raise UserError(f"{path} has no story in it: name a file that has, or leave it out")


def _is_jsonl(path: Path) -> bool:
    name = path.name.lower()
    unpacked = name.removesuffix(".xz").removesuffix(".gz")
    if unpacked.endswith(".jsonl"):
        return True
    if unpacked != name or unpacked.endswith(".txt"):
        return False
    raise UserError(
        f"{path}: cannot read '{path.suffix}' files; convert it to .txt or .jsonl (or .xz, .gz)"
    )


def _text_stories(path: Path, separator: str) -> Iterator[str]:
    remedy = (
        f"put a line {END_OF_TEXT} between stories and after a single one, or set data.separator, "
        "as in data.separator='\\n\\n' for an empty line"
    )
    too_long = f"{path}: 64 MB without a separator {separator!r}, too long for a story; {remedy}"
    pieces = _split(_decode(path), separator, too_long)
    # Two pieces before the first story goes out: a file without a separator is not one long story.
    first, second = next(pieces), next(pieces, None)
    if second is not None:
        yield from itertools.chain((first, second), pieces)
    elif first.strip():
        raise UserError(f"{path}: no separator {separator!r}; {remedy}")


def _json_stories(path: Path) -> Iterator[str]:
    lines = _split(_decode(path), "\n", f"{path}: a line of more than 64 MB; one story a line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = parse_json(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error}); write one object a line") from None
        if isinstance(value, dict):
            key = "story" if "story" in value else "text"
            if key not in value:
                keys = ", ".join(value) or "none"
                raise UserError(f"{where}: no 'story' or 'text' (keys: {keys}); rename the key")
            value = value[key]
        if not isinstance(value, str):
            raise UserError(f'{where}: not a text; write {{"text": "Once upon a time ..."}}')
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, UTF-8 cannot
            half = value[error.start].encode("unicode_escape").decode()
            raise UserError(f"{where}: {half} is half a character; write the pair") from None
        yield value


def _split(chunks: Iterable[str], separator: str, too_long: str) -> Iterator[str]:
    """What stands between separators, at least one piece; UserError(too_long) past 64 MB."""
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(separator)
        yield from whole
        if len(rest) > _LONGEST:
            raise UserError(too_long)
    yield rest


def _decode(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in chunks, without a byte order mark, with `\\n` line ends."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    offset = 0
    for chunk in itertools.chain(_unpack(path), [b""]):
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            # error.object also holds bytes kept from the chunk before: count from its end.
            at = offset + len(chunk) - len(error.object) + error.start
            utf16 = offset == 0 and chunk[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            guess = "UTF-16" if utf16 else "WINDOWS-1252"
            raise UserError(
                f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {at}): "
                f"save it as UTF-8, for example with iconv -f {guess} -t UTF-8"
            ) from None
        offset += len(chunk)
        yield text


def _unpack(path: Path) -> Iterator[bytes]:
    openers: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
    opener = openers.get(path.suffix.lower(), open)
    try:
        most = max(_UNPACKED, _UNPACKED_TIMES * path.stat().st_size)
        with opener(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                most -= len(chunk)
                if most < 0 and opener is not open:
                    raise UserError(
                        f"{path} unpacks to more than {_UNPACKED_TIMES} times its size, as no "
                        "text does: unpack it yourself if you trust it"
                    )
                yield chunk
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path} is damaged or cut short ({error}): copy or download it again"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


# ---------------------------------------------------------------------------- a corpus


@dataclass(frozen=True)
class Corpus:
    """Story files, and how they divide into a training and a validation split.

    Raises:
        UserError: holdout is not between 0 and 1, or the separator is empty.
    """

    train_files: tuple[Path, ...]  # read in this order; may be empty when only "valid" is wanted
    valid_files: tuple[Path, ...]  # empty: the last `holdout` of the training stories instead
    holdout: float = 0.05  # share of the training stories, by count
    separator: str = END_OF_TEXT  # what stands between the stories of a .txt file
    max_train_bytes: int | None = None  # train on whole stories up to so many UTF-8 bytes

    def __post_init__(self) -> None:
        if not 0 < self.holdout < 1:
            raise UserError(
                f"data.holdout={self.holdout}: a share between 0 and 1, such as data.holdout=0.05"
            )
        if not self.separator:
            raise UserError(f"data.separator is empty: leave it out for {END_OF_TEXT}")

    def stories(self, split: Split) -> Iterator[str]:
        """Stream the stories of a split in file order: stripped, never empty.

        Raises:
            UserError: no files for the split, a file that cannot be read, or a holdout that
                leaves one of the splits without a story.
        """
        if split == "valid":
            if self.valid_files:
                return self._read(self.valid_files)
            return itertools.islice(self._read(self.train_files), self._n_train, None)
        stories = self._read(self.train_files)
        if not self.valid_files:
            stories = itertools.islice(stories, self._n_train)
        return stories if self.max_train_bytes is None else _take(stories, self.max_train_bytes)

    def fingerprint(self, split: Split) -> dict[str, Any]:
        """All that determines the stories of a split, for json.dumps; the same after a move."""
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
            raise UserError("no training files: set data.train_files=[stories.txt]")
        return itertools.chain.from_iterable(read_stories(path, self.separator) for path in files)

    @cached_property
    def _n_train(self) -> int:
        """Training stories when the rest is held out; the first access counts all stories."""
        total = sum(1 for _ in self._read(self.train_files))
        n_valid = round(total * self.holdout)
        if not 0 < n_valid < total:
            lacking = "training" if n_valid else "validation"
            raise UserError(
                f"data.holdout={self.holdout} of {total} stories leaves none for {lacking}: "
                "choose another share, or set data.valid_files=[...]"
            )
        return total - n_valid


def _take(stories: Iterator[str], max_bytes: int) -> Iterator[str]:
    """The longest run of whole stories that is at most `max_bytes` long in UTF-8."""
    total = 0
    for story in stories:
        total += len(story.encode())
        if total > max_bytes:
            return
        yield story


def _file_fingerprint(path: Path) -> dict[str, Any]:
    """Content hash of a file; for a large one its size, time of change, first and last MiB."""
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            known: dict[str, Any] = {"jsonl": _is_jsonl(path), "packed": path.suffix.lower()}
            if stat.st_size < _HASH_WHOLE:
                return known | {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
            ends = hashlib.sha256(file.read(_CHUNK))
            file.seek(-_CHUNK, os.SEEK_END)
            ends.update(file.read(_CHUNK))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    return known | {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ends": ends.hexdigest()}


# ---------------------------------------------------------------------------- bundled and local


def bundled_sample() -> Corpus:
    """The stories inside this package: 14,849 to train on, 3,000 for validation alone."""
    folder = importlib.resources.files("minigpt") / "data" / "tinystories"
    train, valid = (Path(str(folder / f"{split}.txt.xz")) for split in ("train", "valid"))
    return Corpus(train_files=(train,), valid_files=(valid,))


def local_files(
    train_files: Sequence[str],
    valid_files: Sequence[str],
    holdout: float = 0.05,
    separator: str = END_OF_TEXT,
) -> Corpus:
    """A corpus of the user's own files, given as paths or globs (`~` and `**` work).

    Raises:
        UserError: a name that is no readable kind of file, or a file in both splits.
    """
    if not train_files and not valid_files:
        raise UserError("data=text needs files: set data.train_files=[stories.txt]")
    train, valid = _expand(train_files, "train_files"), _expand(valid_files, "valid_files")
    for path in train:
        if path.resolve() in {other.resolve() for other in valid}:
            raise UserError(
                f"{path} is in data.train_files and in data.valid_files: validation needs stories "
                "that training never sees; leave data.valid_files out to hold some of them out"
            )
    return Corpus(train, valid, holdout, separator)


def _expand(patterns: Sequence[str], setting: str) -> tuple[Path, ...]:
    """The files that the patterns name: pattern by pattern, matches sorted, none twice."""
    paths: dict[Path, None] = {}
    for pattern in patterns:
        if "\0" in pattern or len(pattern) > _LONGEST_PATH:
            raise UserError(f"data.{setting}: {pattern[:50]!r} ... is not a path")
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise UserError(f"{path} is a folder: name its files, data.{setting}=['{path}/*.txt']")
        if path.is_file():  # looked for first, since a real name may have brackets in it
            found = [path]
        elif glob.has_magic(pattern):
            found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
            found = [path for path in found if path.is_file()]
        else:
            found = []
        if not found:
            raise UserError(f"no file {path} in {Path.cwd()}: correct data.{setting}=[...]")
        for path in found:
            _is_jsonl(path)  # an ending that cannot be read is an error now, not hours later
            paths[path] = None
    return tuple(paths)


# ---------------------------------------------------------------------------- download


def download_tinystories(folder: Path, tokens: int | None, valid_only: bool = False) -> Corpus:
    """TinyStories (GPT-4 version) from the Hugging Face Hub, kept in `folder`.

    Of the training file only the first stories are fetched, as many as `tokens` need, and a
    request always gives the same stories, however much is already there; with enough there, the
    network is not touched. A broken download goes on where it stopped.

    Args:
        folder: where the files are kept; made when missing.
        tokens: training tokens wanted, at 3.84 bytes each; None for the whole file (2.2 GB).
        valid_only: the training file is left where it is.

    Raises:
        UserError: the hub cannot be reached, what arrived is damaged, or nothing can be written.
    """
    if tokens is not None and tokens <= 0:
        raise UserError(f"data.download_tokens={tokens}: a positive number, or null for all")
    kept, fetched = (
        None if tokens is None else math.ceil(tokens * _BYTES_PER_TOKEN * margin)
        for margin in (_STORY_MARGIN, _FILE_MARGIN)
    )
    try:
        valid = fetch(folder, _REPO, _VALID, END_OF_TEXT, None)
        if valid_only:
            return Corpus((), (valid,))
        train = fetch(folder, _REPO, _TRAIN, END_OF_TEXT, fetched)
    except ConnectionError as error:
        raise UserError(
            f"could not download TinyStories ({error}): run the same again to go on where it "
            "stopped, or use data=tinystories_sample (bundled) or data=text (your own files)"
        ) from None
    except OSError as error:
        raise UserError(f"cannot keep TinyStories in {folder}: {error.strerror or error}") from None
    return Corpus((train,), (valid,), max_train_bytes=kept)
