"""Fuzz each kind of file for half a minute: it is read, or refused with a one-line error."""

import lzma
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minigpt.core.settings import UserError, one_line
from minigpt.data.files import read_pieces
from minigpt.exporting import ExportConfig, export
from minigpt.runs.checkpoint import is_whole, read_model
from minigpt.runs.folder import Run, read_config
from minigpt.runs.records import read_metrics, read_samples, read_summary
from minigpt.scaling.results import read_run
from minigpt.tokenizer import Tokenizer
from minigpt.training.config import TrainConfig
from minigpt.training.loggers import MetricsCsv
from tests.conftest import tiny_overrides, trained_folder

SECONDS = 30  # for each kind of file


def _stories(path: Path) -> Any:
    return sum(len(text) for text, _ in read_pieces(path))


# The reader of each file of the fixture `whole`.
READERS: dict[str, Callable[[Path], Any]] = {
    "run/tokenizer.json": lambda path: Tokenizer.load(path).encode("Once upon a time 🐉"),
    "run/config.yaml": lambda path: TrainConfig.from_dict(read_config(path.parent)),
    "run/metrics.csv": lambda path: (read_metrics(path.parent), MetricsCsv(path, resume_step=9)),
    "run/samples.jsonl": lambda path: read_samples(path.parent),
    "run/summary.json": lambda path: (read_summary(path.parent), read_run(path.parent)),
    "run/checkpoints/best.ckpt": lambda path: (is_whole(path), read_model(path)),
    "out/model.safetensors": lambda path: Run.load(path.parent).load_model(),
    "stories.txt": _stories,
    "stories.jsonl": _stories,
    "stories.txt.xz": _stories,
    "stories.txt.zst": _stories,
    "stories.json": _stories,
    "stories.csv": _stories,
    "stories.parquet": _stories,
}
PIECES = [
    b"",
    b"\0",
    b"\xff",
    b"[",
    b"{",
    b'"',
    b",",
    b"\n",
    b"-1",
    b"1e999",
    b"NaN",
    b"\xed\xa0\x80",
]


@st.composite
def edits(draw: st.DrawFn) -> list[tuple[float, float, bytes]]:
    """Draw edits (position, width, replacement), with position and width as shares of the file."""
    share = st.floats(0, 1, allow_nan=False)
    pieces = st.sampled_from(PIECES) | st.binary(max_size=8)
    repeated = st.builds(bytes.__mul__, pieces, st.sampled_from([1, 1, 1, 2, 5000]))
    width = st.sampled_from([0.0, 1e-5, 1e-3, 0.3])
    return draw(st.lists(st.tuples(share, width, repeated), min_size=1, max_size=6))


def edited(content: bytes, changes: list[tuple[float, float, bytes]]) -> bytes:
    for position, width, piece in changes:
        start = int(position * len(content))
        end = start + max(int(width * len(content)), int(width > 0))
        content = content[:start] + piece + content[end:]
    return content


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its export, and stories in seven forms."""
    folder = tmp_path_factory.mktemp("fuzz")
    run = trained_folder([*tiny_overrides(folder), "name=tiny"])
    export(Run.load(run), folder / "out", ExportConfig("safetensors"))
    shutil.copytree(run, folder / "run")
    text = (folder / "valid.txt").read_bytes()
    (folder / "stories.txt").write_bytes(text)
    (folder / "stories.txt.xz").write_bytes(lzma.compress(text))
    stories = [story.strip() for story in text.decode().split("<|endoftext|>")]
    lines = [f'{{"text": "{story}"}}' for story in stories]
    (folder / "stories.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "stories.json").write_text(f"[{','.join(lines)}]", encoding="utf-8")
    rows = [f'{n},"{story}"' for n, story in enumerate(stories)]
    (folder / "stories.csv").write_text("\n".join(["id,text", *rows]), encoding="utf-8")
    pq.write_table(pa.table({"text": stories}), folder / "stories.parquet")
    with pa.CompressedOutputStream(str(folder / "stories.txt.zst"), "zstd") as file:
        file.write(text)
    return folder


@pytest.mark.timeout(3 * SECONDS)
@pytest.mark.parametrize("name", READERS)
def test_an_edited_file_is_read_or_refused_in_one_line(name: str, whole: Path):
    path, start_time, refused = whole / name, time.monotonic(), []
    content = path.read_bytes()

    @settings(
        max_examples=10**6, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(edits())
    def attempt(changes: list[tuple[float, float, bytes]]) -> None:
        if time.monotonic() - start_time > SECONDS:
            pytest.skip("")  # ends the search
        path.write_bytes(edited(content, changes))
        try:
            READERS[name](path)
        except UserError as error:
            refused.append(one_line(error))

    try:
        attempt()
    except pytest.skip.Exception:
        pass
    finally:
        path.write_bytes(content)
    READERS[name](path)  # restored, it is read
    assert len(refused) > 100
    assert all(refused)
