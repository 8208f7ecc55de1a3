import errno
import json
import os
import resource
from pathlib import Path

import pytest
import yaml

from minigpt.core.files import (
    read_json,
    read_text,
    read_yaml,
    refuse_links_out,
    write_bytes,
    write_json,
    write_text,
)
from minigpt.core.settings import UserError
from tests.conftest import naming

ALIAS_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_write_text_is_atomic(tmp_path):
    path = tmp_path / "numbers.json"
    write_json(path, {"story": "é"})
    before = path.read_text(encoding="utf-8")
    assert json.loads(before) == {"story": "é"}
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half a surrogate: \ud800")
    assert path.read_text(encoding="utf-8") == before


def test_write_on_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "text.txt"
    write_text(path, "before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="large"):
            write_text(path, "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]
    assert path.read_text() == "before"


def test_plain_yaml_is_read(tmp_path):
    path, settings = tmp_path / "a.yaml", {"a": [1, 2.5, None, True], "b": {"c": "* & é"}}
    path.write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    assert read_yaml(path) == settings


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "[" * 65_000,
        "- " * 32_000,
        "{a: " * 16_000,
        "? " * 32_000,
        "[" * 2_000 + "]" * 2_000,
        ALIAS_BOMB,
        "a: &a [*a]",
        "a: 1\n" * 14_000,
        f"a: {'9' * 60_000}",
        "a: !!int ''",
        "a: !!bool x",
        "a: !!timestamp x",
        "a: !!python/object/apply:os.mkdir [ran-code]",
        "a: !!python/name:os.system",
        "a\0b",
    ],
    ids=lambda text: text[:20],
)
def test_yaml_that_is_broken_nested_or_a_bomb_is_a_value_error(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="."):
        read_yaml(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.yaml"]


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 200_000, b'{"a":' * 100_000, b"\xff\xfe{}"])
def test_json_that_is_broken_or_nested_is_a_value_error(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="."):
        read_json(path)


def test_a_text_larger_than_its_limit_is_a_value_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x" * 100)
    assert read_text(path, max_bytes=100) == "x" * 100
    with pytest.raises(ValueError, match=naming("99")):
        read_text(path, max_bytes=99)


def test_a_pipe_and_a_folder_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null"), tmp_path / "absent"):
        with pytest.raises(OSError, match=naming(path.name)):
            read_text(path)


@pytest.mark.parametrize("name", ["summary.json", "checkpoints", "checkpoints/last.ckpt"])
def test_a_link_out_of_the_run_folder_is_refused(name, tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    (run / "checkpoints").mkdir(parents=True)
    (run / "inside").write_text("")
    (run / "checkpoints" / "best.ckpt").symlink_to(run / "inside")
    refuse_links_out(run)
    outside.mkdir()
    if name == "checkpoints":
        (run / "checkpoints" / "best.ckpt").unlink()
        (run / "checkpoints").rmdir()
    (run / name).symlink_to(outside)
    with pytest.raises(UserError, match=naming(str(run / name), "link")):
        refuse_links_out(run)


def test_failed_write_moves_the_earlier_files_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, older = tmp_path / "a", tmp_path / "a-1"
    path.write_bytes(b"new")
    older.write_bytes(b"old")
    replace = Path.replace

    def fail(source: Path, target: Path) -> Path:
        if source.suffix == ".tmp":
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space") as error:
        write_bytes(path, b"newest", move=[(older, tmp_path / "a-2"), (path, older)])
    assert error.value.filename == str(path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"new", "a-1": b"old"}
