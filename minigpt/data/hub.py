"""Stream stories from a Hugging Face dataset to a file, as many as a run needs.

If a later run needs more stories, they are appended to the file. The download then continues at the
last saved position in the dataset, and reads the same revision of the dataset. Of each row, only
the story is stored.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import HfApi, constants

from minigpt.core.files import read_json, sync, write_error, write_json
from minigpt.core.settings import UserError, one_line
from minigpt.data.config import DataConfig
from minigpt.data.files import choose_field, clean
from minigpt.data.formats import optional
from minigpt.data.progress import byte_progress

_SAVED = 16 << 20  # the position in the dataset is saved each time this many bytes were written
_STRINGS = ("string", "large_string", str)


def fetch_dataset(folder: Path, config: DataConfig, split: str, n_bytes: int | None) -> Path:
    """Download the first stories of a split to a .jsonl file, and return its path.

    If the file already has enough stories, the network is not used. Otherwise, the download
    continues at the last position that an earlier call saved. The environment variable HF_ENDPOINT
    sets the Hub's address; the default is huggingface.co. Private datasets need `hf auth login` or
    HF_TOKEN. Only one process writes at a time.

    Args:
        folder: folder of the file, created if missing.
        config: data settings; `dataset`, `subset` and `field` are used.
        split: name of the split.
        n_bytes: reading stops once the stories exceed this number of UTF-8 bytes; None means the
            whole split.

    Returns:
        The path of the file.

    Raises:
        UserError: the package `datasets` is not installed, the dataset cannot be read, the split or
            the field does not exist, or the file cannot be written.
    """
    dataset = config.dataset
    assert dataset is not None
    local = Path(dataset)
    key: list[Any] = [dataset, config.subset, split, config.field]
    if local.is_dir():
        files = sorted(path for path in local.rglob("*") if path.is_file())
        key += [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest()
    path = folder / f"{re.sub('[^A-Za-z0-9]+', '-', dataset)[-60:]}-{split}-{digest}.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            state = {"size": 0, "bytes": 0, "whole": False, "revision": None, "stream": None}
            with contextlib.suppress(OSError, ValueError):
                earlier = read_json(path.with_suffix(".json"))
                if path.stat().st_size >= earlier["size"]:  # else the file was deleted or cut
                    state = earlier
            if not state["whole"] and (n_bytes is None or state["bytes"] <= n_bytes):
                _append(path, state, _stories(config, dataset, split, state), n_bytes)
    except OSError as error:
        raise write_error(f"cannot write {folder}", error, "data.cache_dir") from None
    return path


def _append(path: Path, state: dict[str, Any], stories: Iterable[Any], n_bytes: int | None) -> None:
    """Append stories until the file has more than `n_bytes` of text, or no story is left.

    The position in the dataset is saved in `state`, and `state` is written to a .json file next to
    `path`.
    """
    with path.open("ab") as file, byte_progress("downloading", n_bytes, state["bytes"]) as show:
        file.truncate(state["size"])  # removes what was written after the position was saved
        saved = state["bytes"]
        for story, position in itertools.chain(stories, [(None, dict)]):
            if story is None:
                state["whole"] = True
            else:
                file.write(json.dumps({"text": story}, ensure_ascii=False).encode() + b"\n")
                show(size := len(story.encode()))
                state["bytes"] += size
            enough = state["whole"] or (n_bytes is not None and state["bytes"] > n_bytes)
            if enough or state["bytes"] - saved >= _SAVED:
                file.flush()
                sync(file.fileno())
                state |= {"size": file.tell(), "stream": position()}
                write_json(path.with_suffix(".json"), state)
                saved = state["bytes"]
            if enough:
                return


def _stories(
    config: DataConfig, dataset: str, split: str, state: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield (story, get_position) for each story after the position in `state`.

    `get_position()` returns the position directly after the story. If the dataset is on the Hub and
    `state` has no revision yet, the newest revision is stored in `state`.
    """
    datasets = optional("datasets", "reading from the Hugging Face Hub")
    at_exit = contextlib.ExitStack()
    try:
        _silence(datasets, at_exit)
        if state["revision"] is None and not Path(dataset).is_dir():  # fails at once if offline
            state["revision"] = HfApi().dataset_info(dataset).sha
        if Path(dataset).is_dir() and glob.has_magic(dataset):  # `datasets` would read a pattern
            dataset = _linked(Path(dataset), at_exit.enter_context(tempfile.TemporaryDirectory()))
        stream = datasets.load_dataset(
            dataset, config.subset, split=split, streaming=True, revision=state["revision"]
        )
        columns = stream.features  # None for .csv and .txt files
        if columns is None:
            columns = next(iter(stream), {})
        texts = [n for n, f in columns.items() if getattr(f, "dtype", type(f)) in _STRINGS]
        name = choose_field(f"{dataset}, split {split!r},", columns, texts, config.field)
        stream = stream.select_columns([name])
        if state["stream"] is not None:
            stream.load_state_dict(state["stream"])
        for row in stream:
            if isinstance(story := row[name], str):
                yield clean(story), stream.state_dict
            elif not isinstance(story, str | None):
                raise UserError("does not contain text; choose another field", "data.field", name)
    except UserError:
        raise
    except Exception as error:  # from datasets, huggingface_hub, httpx, pyarrow and others
        reason = one_line(f"{type(error).__name__}: {error}")
        remedy = "check the name, split, subset and network (private datasets need hf auth login)"
        files = {"data": "text", "data.train_files": ["stories.txt"]}
        problem = f"could not read the split {split!r} ({reason}); {remedy}; or use your own files"
        raise UserError(problem, "data.dataset", config.dataset, fix=files) from None
    finally:
        at_exit.close()


def _silence(datasets: Any, at_exit: contextlib.ExitStack) -> None:
    """Turn off telemetry, download counts and progress bars until `at_exit` is closed."""
    telemetry, counts = "HF_HUB_DISABLE_TELEMETRY", "HF_UPDATE_DOWNLOAD_COUNTS"
    for module, name, value in ((constants, telemetry, True), (datasets.config, counts, False)):
        at_exit.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, value)
    if not datasets.are_progress_bars_disabled():
        at_exit.callback(datasets.enable_progress_bars)
        datasets.disable_progress_bars()


def _linked(dataset: Path, folder: str) -> str:
    """Link all files of a local dataset in `folder`, and return `folder`.

    A link to the whole dataset would not do, because `datasets` resolves it.
    """
    for path in dataset.rglob("*"):
        link = Path(folder) / path.relative_to(dataset)
        if path.is_dir():
            link.mkdir(parents=True, exist_ok=True)
        else:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.absolute())
    return folder
