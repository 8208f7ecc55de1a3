"""Sources of stories: the bundled sample, your own files, a dataset from the Hub, or TinyStories.

TinyStories is by Eldan and Li (2023, arXiv 2305.07759).
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.resources
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from minigpt.core.files import user_path, write_error
from minigpt.core.settings import UserError
from minigpt.data.config import DataConfig
from minigpt.data.corpus import Corpus
from minigpt.data.download import fetch
from minigpt.data.formats import KINDS, detect_format
from minigpt.data.hub import fetch_dataset
from minigpt.tokenizer import END_OF_TEXT

_LONGEST_PATH = 4000  # characters, about the limit of operating systems

_REPO = "roneneldan/TinyStories"
_TRAIN, _VALID = "TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"
_BYTES_PER_TOKEN = 3.84  # with a 3,000-token BPE, measured on the bundled sample
_STORY_MARGIN = 1.02  # story bytes to read, as a multiple of tokens * _BYTES_PER_TOKEN
_FILE_MARGIN = 1.05  # the same for the file bytes to download; separators are 2 % of a file
_VALID_BYTES = 32 << 20  # bytes to read from a validation split on the Hub


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
        # In a shell, a line feed is typed as \n and a tab as \t. Files are read with line feeds.
        separator = config.separator.replace("\\r", "").replace("\r", "")
        separator = separator.replace("\\n", "\n").replace("\\t", "\t")
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
            endings = Counter(p.suffix for p in path.iterdir() if p.suffix.lower() in KINDS)
            (ending, _), *_ = [*endings.most_common(1), (".txt", 0)]
            files = {argument: [f"{path}/*{ending}"]}
            raise UserError(f"{path} is a folder; give the files in it", argument, fix=files)
        files = _matches(path)
        if not files:
            raise UserError(f"no file matches {path} (working directory {Path.cwd()})", argument)
        for file in files:
            detect_format(file)  # reports unreadable files now, not after hours
            stat = file.stat()
            paths.setdefault((stat.st_dev, stat.st_ino), file)
    return paths


def _matches(path: Path) -> list[Path]:
    """Return the files that match a path with a glob pattern, sorted."""
    # Brackets in the name of an existing folder or file are not part of a glob pattern.
    real = next(p for p in (path, *path.parents) if p.exists())
    known, rest = Path(glob.escape(str(real))), str(path.relative_to(real))
    matches = glob.glob(str(known / rest), recursive=True)
    if not matches:  # in other names, they are one only if a file matches that pattern
        matches = glob.glob(str(known / rest.replace("[", "[[]")), recursive=True)
    return [match for match in map(Path, sorted(matches)) if match.is_file()]


def are_available(patterns: Sequence[str]) -> bool:
    """Return whether every path or glob pattern of a list matches at least one file."""
    return all(_matches(user_path(pattern)) for pattern in patterns)


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
