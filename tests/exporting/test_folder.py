"""The output folder of an export, and what it may replace."""

import errno
import os
import re
from pathlib import Path

import pytest

from minigpt.core.settings import UserError
from minigpt.exporting import formats
from tests.conftest import naming
from tests.exporting.conftest import contents, exported


def test_model_is_not_replaced_by_its_export_to_another_format(run, tmp_path):
    out = exported(run, tmp_path / "out", format="safetensors")
    before = contents(out)
    with pytest.raises(UserError, match=naming(str(out))):
        exported(out, out)
    assert contents(out) == before
    exported(out, out, format="safetensors")  # its card anew
    assert contents(out)["model.safetensors"] == before["model.safetensors"]


def test_earlier_export_is_replaced_and_nothing_else(run, tmp_path):
    out = exported(run, tmp_path / "out")
    before = contents(out)
    exported(run, out, format="safetensors")
    assert "config.json" in before
    assert not (out / "config.json").exists()  # of the format before
    (out / "evaluation-stride8.json").write_text("{}")  # as evaluate.py leaves it
    exported(run, out)
    assert contents(out) == before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=naming(str(out), "notes.txt")):
        exported(run, out)
    assert contents(out) == {**before, "notes.txt": b"mine"}
    with pytest.raises(UserError, match=rf"{re.escape(str(run))}\D*\d"):
        exported(run, run)
    with pytest.raises(UserError, match=naming(str(out / "notes.txt"))):
        exported(run, out / "notes.txt")


def test_failed_export_leaves_the_earlier_one(run, tmp_path, monkeypatch):
    out = exported(run, tmp_path / "out")
    before, around = contents(out), sorted(tmp_path.iterdir())

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(formats, "_hf_config", full)
    with pytest.raises(UserError, match=naming(str(out), os.strerror(errno.ENOSPC))):
        exported(run, out)
    assert contents(out) == before
    assert sorted(tmp_path.iterdir()) == around


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), OSError(5, "Input/output error")])
@pytest.mark.parametrize("goes_back", [True, False])
def test_earlier_export_survives_an_interrupted_swap(
    stopped, goes_back, run, tmp_path, monkeypatch
):
    out = exported(run, tmp_path / "out")
    before, around = contents(out), sorted(tmp_path.iterdir())
    rename = Path.rename

    def half(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp":
            raise stopped
        if path.suffix == ".old" and not goes_back:
            raise OSError(13, "Permission denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", half)
    with pytest.raises((KeyboardInterrupt, UserError, OSError)):
        exported(run, out)
    if goes_back:
        assert sorted(tmp_path.iterdir()) == around
    (folder,) = set(tmp_path.iterdir()) - {tmp_path / "runs"}
    assert contents(folder) == before


def test_current_folder_is_not_replaced(run, tmp_path, monkeypatch):
    out = exported(run, tmp_path / "out")
    (tmp_path / "new").mkdir()
    for here, typed in ((out, "."), (tmp_path / "new", "."), (out, out)):
        monkeypatch.chdir(here)
        with pytest.raises(UserError, match=naming(str(here.resolve()), "cd ..")):
            exported(run, Path(typed))
    (tmp_path / "new" / "inside").mkdir()
    (tmp_path / "new" / "export.json").write_text('{"files": ["export.json", "inside"]}')
    monkeypatch.chdir(tmp_path / "new" / "inside")
    with pytest.raises(UserError, match=naming(str((tmp_path / "new").resolve()))):
        exported(run, Path(".."))
