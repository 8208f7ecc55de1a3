"""Write the stories of an iterable to files that other processes can read."""

from __future__ import annotations

import dataclasses
import filecmp
import hashlib
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from minigpt.core.files import sync, write_error
from minigpt.core.settings import UserError
from minigpt.data.config import DataConfig
from minigpt.tokenizer import utf8_length


def spool_stories(
    data: DataConfig, stories: Iterable[str], valid_stories: Iterable[str] | None = None
) -> DataConfig:
    """Write `stories` to `data.cache_dir` and return settings that read them from there.

    Memory use does not grow with the number of stories. Equal stories give equal files. A file that
    already exists is kept unchanged, so the preparation of the data does not tokenize it again.

    Args:
        data: data settings; the source and the files are replaced.
        stories: training stories, each a string that is not empty.
        valid_stories: validation stories; None holds out the fraction `data.holdout` of `stories`.

    Returns:
        `data` with source `text` and the files that were written.

    Raises:
        UserError: an item is not a string, or contains a lone surrogate; there are no stories; or
            the cache cannot be written.
    """
    folder = Path(data.cache_dir) / "stories"
    train = (_spool(stories, folder, "stories"),)
    valid = () if valid_stories is None else (_spool(valid_stories, folder, "valid_stories"),)
    return dataclasses.replace(data, source="text", train_files=train, valid_files=valid)


def _spool(stories: Iterable[str], folder: Path, argument: str) -> str:
    digest, n_stories = hashlib.blake2b(digest_size=8), 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(".tmp", dir=folder) as aside:
            unfinished = Path(aside) / "stories.jsonl"
            with unfinished.open("wb") as file:
                for story in stories:
                    if not isinstance(story, str):
                        problem = f"must contain strings, not {type(story).__name__}"
                        raise UserError(problem, argument)
                    utf8_length(story)  # refuses lone surrogates
                    line = json.dumps({"text": story}, ensure_ascii=False).encode() + b"\n"
                    digest.update(line)
                    file.write(line)
                    n_stories += 1
                file.flush()
                sync(file.fileno())
            if not n_stories:
                raise UserError("must contain at least one story", argument)
            path = folder / f"{digest.hexdigest()}.jsonl"
            # Large files are identified by size and modification time, so an equal file is kept.
            if not path.is_file() or not filecmp.cmp(path, unfinished, shallow=False):
                unfinished.replace(path)
            return str(path)
    except OSError as error:
        problem = f"cannot write {folder}"
        raise write_error(problem, error, "data.cache_dir", str(folder.parent)) from None
