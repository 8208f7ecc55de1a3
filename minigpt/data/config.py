"""Settings of the data: the stories, the tokenizer and the batches."""

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
    """Settings of the stories, the tokenizer and the batches.

    Raises:
        UserError: a value is out of range, a value that `source` needs is missing, or a setting
            does not apply to `source`.
    """

    source: Source = "tinystories_sample"
    """Source of the stories: `tinystories_sample` is bundled, `tinystories` is downloaded, `text`
    is your own files, and `hf` is a dataset from the Hugging Face Hub or from a local folder."""

    train_files: tuple[str, ...] = ()
    """Paths or globs of the training files, for source `text`."""

    valid_files: tuple[str, ...] = ()
    """Paths or globs of the validation files, for source `text`; if empty, the last training
    stories are held out for validation."""

    dataset: str | None = None
    """Dataset for source `hf`: a name on the Hugging Face Hub, such as `owner/name`, or the path of
    a local dataset folder. None for the other sources."""

    subset: str | None = None
    """Subset of the dataset, such as `wikitext-2-raw-v1`; None means the default subset."""

    split: str = "train"
    """Split of the dataset to train on."""

    valid_split: str | None = None
    """Split of the dataset to validate on; only the first 32 MiB of this split are read. None means
    that the last training stories are held out for validation."""

    field: str | None = None
    """Column or key that holds the stories, for datasets and for files other than .txt and .md.
    None selects `text` if it exists, else `story`, else the only text column."""

    holdout: float = 0.05
    """Fraction of the training stories to hold out for validation, above 0 and below 1. If no story
    or every story would be held out, this fraction of the length of each document is held out; a
    document is a text file with a single story."""

    separator: str = END_OF_TEXT
    """Separator between two stories in a .txt or .md file. A file without separators is one
    story."""

    download_tokens: int | None = 104_000_000
    """Amount of training text to download for sources `tinystories` and `hf`, in tokens of about
    3.84 bytes; None means all of the text."""

    vocab_size: int = 3000
    """Maximum number of tokens in the vocabulary, from 257 to 65,536; stories with few distinct
    words give a smaller vocabulary."""

    tokenizer: str | None = None
    """Run folder, checkpoint, export or tokenizer.json from which to load the tokenizer;
    `vocab_size` is then set from that tokenizer. None means that a tokenizer is trained on the
    training stories."""

    max_stories: int | None = None
    """Maximum number of training stories for the model and the tokenizer. Only this number of
    stories is used, from the start of the training split. Stories that `holdout` or `valid=tuning`
    holds out do not count. None means all training stories."""

    batch_size: int | None = None
    """Number of windows per device and step; None means 32 for source `tinystories` and 8 for the
    other sources."""

    random_offset: bool = True
    """Whether the windows start at a random offset in each epoch after the first."""

    shuffle: Shuffle = "stories"
    """What is shuffled in each epoch: `stories` shuffles the stories and then the windows cut from
    them; `windows` keeps the order of the stories and shuffles only the windows."""

    noise: float = 0.0
    """Fraction of the training input tokens to replace by random tokens, from 0 to below 1; the
    fraction decreases linearly to zero over the last 20 % of the run. Targets, END_OF_TEXT tokens
    and validation batches are not changed."""

    valid: Literal["tuning"] | None = None
    """Stories to validate on: None means the validation split; `tuning` means every seventh
    training story, so that settings can be compared without the validation split."""

    cache_dir: str = CACHE
    """Folder for downloads and prepared files."""

    def __post_init__(self) -> None:
        expand_paths(self, "train_files", "valid_files", "dataset", "tokenizer", "cache_dir")
        if self.dataset is not None and Path(self.dataset).is_dir():
            object.__setattr__(self, "dataset", str(Path(self.dataset).absolute()))
        files = self.train_files or self.valid_files
        if self.source == "text" and not files:
            fix = {"train_files": ["stories.txt"]}
            raise UserError("this source needs files", "source", "text", fix=fix)
        if self.source != "text" and files:
            name = "train_files" if self.train_files else "valid_files"
            problem = f"the source {self.source} takes no files"
            raise UserError(problem, name, fix={"source": "text"})
        if (self.source == "hf") != (self.dataset is not None):
            fix = {"source": "hf", "dataset": self.dataset or "roneneldan/TinyStories"}
            raise UserError("must be set for the source hf, and only for it", "dataset", fix=fix)
        if self.field is not None and self.source not in ("text", "hf"):
            problem = f"the source {self.source} has no fields: leave this setting out"
            raise UserError(problem, "field", self.field)
        check(self, "must be above 0 and below 1", lambda share: 0 < share < 1, "holdout")
        if not self.separator:
            raise UserError("must not be empty", "separator", fix={"separator": END_OF_TEXT})
        limits = "download_tokens", "max_stories"
        check(self, "must be at least 1, or null (None in Python)", lambda n: n >= 1, *limits)
        check(self, "must be from 0 to 1", lambda share: 0 <= share <= 1, "noise")
        check_vocab_size(self.vocab_size)
        if self.tokenizer == "":
            fix = {"tokenizer": "releases/large"}
            raise UserError("must not be empty; leave it out, or give a run", "tokenizer", fix=fix)
        if self.batch_size is None:
            object.__setattr__(self, "batch_size", 32 if self.source == "tinystories" else 8)
        check(self, "must be at least 1", lambda n: n >= 1, "batch_size")

    @property
    def windows_per_batch(self) -> int:
        """Number of windows per device and step: `batch_size` with its default filled in."""
        assert self.batch_size is not None
        return self.batch_size


def with_cache_here(data: DataConfig, typed: str = CACHE) -> DataConfig:
    """Return `data` with a cache folder for this machine.

    Args:
        data: data settings of a run. The run may have been trained on another machine.
        typed: cache folder, as typed on the command line. If it is the default, `.cache`, and the
            folder `data.cache_dir` exists on this machine, `data.cache_dir` is kept.

    Returns:
        `data` itself if its `cache_dir` is kept, else a copy with `typed` as `cache_dir`.
    """
    own = typed == CACHE and Path(data.cache_dir).is_dir()
    return data if own else dataclasses.replace(data, cache_dir=typed)
