import atexit
import errno
import json
import os
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from minigpt.core.files import (
    provide_home,
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


@pytest.mark.parametrize(
    "name",
    ["summary.json", "checkpoints", "checkpoints/last.ckpt", "tensorboard/hparams.yaml", "wandb/x"],
)
def test_a_link_out_of_the_run_folder_is_refused(name, tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    for subfolder in ("checkpoints", "tensorboard", "wandb/run-1/logs"):
        (run / subfolder).mkdir(parents=True)
    (run / "wandb/run-1/logs/core.log").symlink_to(outside)  # W&B itself creates such a link
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


@pytest.mark.parametrize("home", [None, "absent", "read-only", "usable"])
def test_libraries_get_a_temporary_folder_if_the_home_folder_is_not_usable(
    home, tmp_path, monkeypatch
):
    (tmp_path / "read-only").mkdir()
    (tmp_path / "usable").mkdir()
    variables = {} if home is None else {"HOME": str(tmp_path / home)}
    monkeypatch.setattr(os, "environ", variables | {"XDG_CONFIG_HOME": "/mine"})
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name == "usable")
    if home is None:  # the user id has no name
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError()))
    cleanups: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", cleanups.append)
    provide_home()
    assert os.environ["XDG_CONFIG_HOME"] == "/mine"
    if home == "usable":
        assert "XDG_CACHE_HOME" not in os.environ
        return
    folder = Path(os.environ["XDG_CACHE_HOME"]).parent
    assert folder.is_dir()
    assert folder.stat().st_mode & 0o077 == 0  # decode.c is loaded from there
    assert "HOME" in os.environ
    cleanups[0]()
    assert not folder.exists()


def test_no_temporary_folder_is_an_error_that_names_tmpdir(monkeypatch):
    def fail() -> None:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(tempfile, "gettempdir", fail)
    with pytest.raises(UserError, match=naming("TMPDIR")):
        provide_home()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_fsync_holds_atomic_files(number, tmp_path, monkeypatch):
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    write_text(tmp_path / "file", "content")
    assert (tmp_path / "file").read_text() == "content"
    number = errno.EIO  # the disk is broken
    with pytest.raises(OSError, match=os.strerror(number)):
        write_text(tmp_path / "file", "other")
    assert (tmp_path / "file").read_text() == "content"


def test_links_that_lead_to_each_other_are_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=naming("loop", "link")):
        refuse_links_out(tmp_path)


def test_json_holds_the_name_of_a_file_that_is_not_in_utf_8(tmp_path):
    content = {"file": os.fsdecode(b"caf\xe9.txt"), "text": "für"}
    write_json(tmp_path / "a.json", content)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == content


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
