import os
from pathlib import Path

import pytest

from minigpt.core.settings import UserError
from minigpt.data.config import DataConfig
from minigpt.data.spool import spool_stories


def test_the_same_stories_keep_their_file_and_a_damaged_file_is_replaced(tmp_path: Path):
    data = DataConfig(cache_dir=str(tmp_path))

    def spool() -> Path:
        (name,) = spool_stories(data, iter(["Once.", "Twice."])).train_files
        return Path(name)

    path = spool()
    content = path.read_bytes()
    os.utime(path, (1, 1))
    assert (spool(), path.stat().st_mtime) == (path, 1)  # large files are identified by this time
    path.write_bytes(b"x" * len(content))
    assert spool().read_bytes() == content
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_letters_of_other_scripts_are_written_as_they_are(tmp_path: Path):
    # As escapes, a story of 34 MB would be a line above the limit of 64 MiB.
    story = "从前有一只猫。"
    (name,) = spool_stories(DataConfig(cache_dir=str(tmp_path)), [story]).train_files
    assert story in Path(name).read_text(encoding="utf-8")


def test_half_a_surrogate_pair_is_refused_before_a_file_is_written(tmp_path: Path):
    with pytest.raises(UserError, match="ud83d"):
        spool_stories(DataConfig(cache_dir=str(tmp_path)), ["fine", "\ud83d"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
