"""Settings of the data: which stories, how large a vocabulary, which batches."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minigpt.core.settings import UserError
from minigpt.tokenizer import END_OF_TEXT, check_vocab_size

CACHE = ".cache"

Source = Literal["tinystories_sample", "tinystories", "text"]
Shuffle = Literal["stories", "windows"]


@dataclass(frozen=True)
class DataConfig:
    """What to train on, and in which portions."""

    source: Source = "tinystories_sample"
    """Where the stories come from: `tinystories_sample` is bundled, `tinystories` is downloaded,
    and `text` are your own files."""

    train_files: tuple[str, ...] = ()
    """Paths or globs of the training files, for source `text`."""

    valid_files: tuple[str, ...] = ()
    """Paths or globs of the validation files; without any, the last training stories are held
    out."""

    holdout: float = 0.05
    """Share of the stories, by count, that is held out for validation."""

    separator: str = END_OF_TEXT
    """What stands between the stories of a .txt file."""

    download_tokens: int | None = 104_000_000
    """Training tokens to download, for source `tinystories`; None means the whole file."""

    vocab_size: int = 3000
    """The most tokens that the vocabulary may have; few different words give fewer."""

    batch_size: int | None = None
    """Windows on each device in each step; None means 8, and 32 for source `tinystories`."""

    random_offset: bool = True
    """Whether the text is cut at other positions in each epoch after the first."""

    shuffle: Shuffle = "windows"
    """What each epoch shuffles: `stories` puts the stories in another order and then shuffles the
    windows cut from it, `windows` cuts the same windows from one order of the stories."""

    valid: Literal["tuning"] | None = None
    """Which stories to validate on: `tuning` holds out every seventh training story, for a choice
    between settings that reads no story of the validation split; None means that split."""

    cache_dir: str = CACHE
    """Folder of downloads and prepared files."""

    def __post_init__(self) -> None:
        files = self.train_files or self.valid_files
        if self.source == "text" and not files:
            raise UserError("needs files", "source", "text", fix={"train_files": ["stories.txt"]})
        if self.source != "text" and files:
            name = "train_files" if self.train_files else "valid_files"
            raise UserError(f"source {self.source} reads no files", name, fix={"source": "text"})
        if not 0 < self.holdout < 1:
            raise UserError("must be between 0 and 1", "holdout", self.holdout)
        if not self.separator:
            raise UserError("must not be empty", "separator", fix={"separator": END_OF_TEXT})
        if self.download_tokens is not None and self.download_tokens < 1:
            raise UserError("must be at least 1 or None", "download_tokens", self.download_tokens)
        check_vocab_size(self.vocab_size)
        if self.batch_size is None:
            object.__setattr__(self, "batch_size", 32 if self.source == "tinystories" else 8)
        elif self.batch_size < 1:
            raise UserError("must be at least 1", "batch_size", self.batch_size)

    @property
    def windows_per_batch(self) -> int:
        """`batch_size`, which is resolved by now."""
        assert self.batch_size is not None
        return self.batch_size


def with_cache_here(data: DataConfig, typed: str = CACHE) -> DataConfig:
    """Return the settings of a run, perhaps made on another machine, with a cache on this one.

    It is the one that is `typed`, else that of the run if this machine has it, else the default.
    """
    own = typed == CACHE and Path(data.cache_dir).is_dir()
    return data if own else dataclasses.replace(data, cache_dir=typed)
