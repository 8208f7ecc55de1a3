import os
from pathlib import Path

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
