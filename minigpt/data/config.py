"""Settings of the data: which stories, how large a vocabulary, which batches."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minigpt.core.files import expand_paths
from minigpt.core.settings import UserError, check
from minigpt.tokenizer import END_OF_TEXT, check_vocab_size

CACHE = ".cache"

Source = Literal["tinystories_sample", "tinystories", "text", "hf"]
Shuffle = Literal["stories", "windows"]


@dataclass(frozen=True)
class DataConfig:
    """What to train on, and in which portions."""

    source: Source = "tinystories_sample"
    """Source of the stories: `tinystories_sample` is bundled, `tinystories` is downloaded, `text`
    is your own files, and `hf` is a dataset of the Hugging Face Hub."""

    train_files: tuple[str, ...] = ()
    """Paths or globs of the training files, for source `text`."""

    valid_files: tuple[str, ...] = ()
    """Paths or globs of the validation files, for source `text`; without any, the last training
    stories are held out."""

    dataset: str | None = None
    """Name of a dataset of the Hub such as `owner/name`, or a folder of one, for source `hf`;
    None for the others."""

    subset: str | None = None
    """Configuration of the dataset, such as `wikitext-2-raw-v1`; None means its default."""

    split: str = "train"
    """Split of the dataset to train on."""

    valid_split: str | None = None
    """Split of the dataset to validate on, of which the first 32 MB are read; None means that the
    last training stories are held out."""

    field: str | None = None
    """Column or key of the stories in files other than .txt and .md and in datasets; None means
    `text`, else `story`, else the only one that holds text."""

    holdout: float = 0.05
    """Share of the stories that is held out for validation, above 0 and below 1: by count, and of
    a lone document by length."""

    separator: str = END_OF_TEXT
    """Text between two stories of a .txt or .md file; a file without it is one document."""

    download_tokens: int | None = 104_000_000
    """Training tokens to download, for sources `tinystories` and `hf`; None means all."""

    vocab_size: int = 3000
    """The most tokens that the vocabulary may have; few different words give fewer."""

    tokenizer: str | None = None
    """A run folder, checkpoint, export or tokenizer.json whose tokenizer encodes the stories, and
    sets `vocab_size`; None means that one is trained on the training stories."""

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
        expand_paths(self, "train_files", "valid_files", "dataset", "tokenizer", "cache_dir")
        if self.dataset is not None and Path(self.dataset).is_dir():
            object.__setattr__(self, "dataset", str(Path(self.dataset).absolute()))
        files = self.train_files or self.valid_files
        if self.source == "text" and not files:
            raise UserError("needs files", "source", "text", fix={"train_files": ["stories.txt"]})
        if self.source != "text" and files:
            name = "train_files" if self.train_files else "valid_files"
            raise UserError(f"source {self.source} reads no files", name, fix={"source": "text"})
        if (self.source == "hf") != (self.dataset is not None):
            fix = {"source": "hf", "dataset": self.dataset or "roneneldan/TinyStories"}
            raise UserError("source hf reads a dataset, and the others none", "dataset", fix=fix)
        if self.field is not None and self.source not in ("text", "hf"):
            raise UserError(f"source {self.source} has no fields", "field", self.field)
        check(self, "must be between 0 and 1", lambda share: 0 < share < 1, "holdout")
        if not self.separator:
            raise UserError("must not be empty", "separator", fix={"separator": END_OF_TEXT})
        check(self, "must be at least 1 or None", lambda n: n >= 1, "download_tokens")
        check_vocab_size(self.vocab_size)
        if self.tokenizer == "":
            fix = {"tokenizer": "releases/large"}
            raise UserError("is empty: leave it out, or name one", "tokenizer", fix=fix)
        if self.batch_size is None:
            object.__setattr__(self, "batch_size", 32 if self.source == "tinystories" else 8)
        check(self, "must be at least 1", lambda n: n >= 1, "batch_size")

    @property
    def windows_per_batch(self) -> int:
        """Windows on each device in each step: `batch_size`, which is resolved."""
        assert self.batch_size is not None
        return self.batch_size


def with_cache_here(data: DataConfig, typed: str = CACHE) -> DataConfig:
    """Return the settings of a run, perhaps of another machine, with a cache folder of this one.

    Args:
        data: settings of the run.
        typed: cache folder to use; the default means that of the run if this machine has it.

    Returns:
        `data`, with the cache folder replaced unless its own is used.
    """
    own = typed == CACHE and Path(data.cache_dir).is_dir()
    return data if own else dataclasses.replace(data, cache_dir=typed)
