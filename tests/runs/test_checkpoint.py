import hashlib
import io
import itertools
import json
import os
import pickle
import random
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt.core.settings import UserError, build
from minigpt.model import GPT, GPTConfig
from minigpt.runs.checkpoint import (
    is_whole,
    read_checkpoint,
    read_model,
    with_weights,
    write_checkpoint,
    write_snapshot,
)
from minigpt.runs.folder import last_checkpoints
from tests.runs.test_folder import TINY, content


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of a tiny model."""
    torch.manual_seed(0)
    path = tmp_path / "best.ckpt"
    write_checkpoint(path, content(GPT(TINY)))
    return path


def load_model(path: Path) -> GPT:
    settings, weights = read_model(path)
    return with_weights(GPT(build(GPTConfig, settings, "model")), weights, path)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_model(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"Once upon a time",
        b"PK\x03\x04 not a zip",
        pickle.dumps([1, 2]),
        json.dumps({"state_dict": 1}).encode(),
    ],
    ids=["empty", "text", "broken zip", "pickle", "json"],
)
def test_file_that_is_not_a_checkpoint_is_refused(junk, tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(junk)
    refusal(path)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(share, checkpoint):
    path, whole = checkpoint, checkpoint.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert not is_whole(path)
    refusal(path)


def test_a_checkpoint_of_another_program_is_refused(tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save({"model": {"w": torch.ones(2)}}, path)
    refusal(path)
    torch.save({"state_dict": {}, "hyper_parameters": {"lr": 1.0}}, path)
    refusal(path)


def test_a_checkpoint_with_the_weights_of_another_model_is_refused(tmp_path):
    path = tmp_path / "mixed.ckpt"
    torch.save(content(GPT(TINY), replace(TINY, n_layers=2)), path)
    refusal(path)


class Payload:
    """Unpickling it would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", ["plain pickle", "torch.save", "torch.save legacy", "bare zip"])
def test_a_payload_is_refused_and_does_not_run(form, tmp_path):
    path, ran = tmp_path / "evil.ckpt", tmp_path / "ran"
    evil = {**content(GPT(TINY)), "callbacks": Payload(ran)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(evil["callbacks"], protocol=2))  # torch reads no newer one
    elif form == "bare zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", pickle.dumps(evil["callbacks"], protocol=2))
            file.writestr("archive/version", "3")
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=form == "torch.save")
    refusal(path)
    assert not ran.exists()
    if form.startswith("torch.save"):  # the payload works: without the guard it would have run
        torch.load(path, weights_only=False)
        assert ran.is_dir()


def equal(a: Any, b: Any) -> bool:
    """Whether two contents of checkpoints are the same, tensors bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def parts(path: Path) -> dict[str, range]:
    """Positions of the bytes of the pickle, of a tensor, and of the directory of an archive."""
    with zipfile.ZipFile(path) as archive:
        starts = {i.filename.partition("/")[2]: i.header_offset for i in archive.infolist()}
        directory = range(archive.start_dir, path.stat().st_size)
    order = sorted([*starts.values(), directory.start])
    ends = dict(itertools.pairwise(order))
    ranges = {name: range(starts[name], ends[starts[name]]) for name in ("data.pkl", "data/0")}
    return {**ranges, "directory": directory}


@pytest.mark.parametrize("part", ["data.pkl", "data/0", "directory", "each 100 bytes"])
def test_flipped_bit_is_detected_or_changes_nothing(part, checkpoint):
    """The directory of an archive has no checksum, but nothing in it can change a tensor."""
    good, expected = checkpoint.read_bytes(), read_checkpoint(checkpoint)
    rng = random.Random(part)
    if part == "each 100 bytes":
        positions = [start + rng.randrange(100) for start in range(0, len(good) - 100, 100)]
    else:
        where = parts(checkpoint)[part]
        positions = rng.sample(where, min(len(where), 200))
    n_detected = 0
    for position in positions:
        bit = 1 << rng.randrange(8)
        flipped = bytes([good[position] ^ bit])
        checkpoint.write_bytes(good[:position] + flipped + good[position + 1 :])
        whole = is_whole(checkpoint)
        assert not whole or equal(read_checkpoint(checkpoint), expected), (position, bit)
        n_detected += not whole
    assert n_detected > len(positions) / 4  # the others are in padding, dates and unused fields


def test_flipped_bytes_of_tensors_and_settings_are_detected(checkpoint):
    good = checkpoint.read_bytes()
    with zipfile.ZipFile(checkpoint) as archive:
        for part in archive.infolist():
            names = good[part.header_offset + 26 : part.header_offset + 30]
            sizes = (int.from_bytes(names[:2], "little"), int.from_bytes(names[2:], "little"))
            first = part.header_offset + 30 + sum(sizes)
            for position in {first, first + part.file_size // 2, first + part.file_size - 1}:
                flipped = bytes([good[position] ^ 1])
                checkpoint.write_bytes(good[:position] + flipped + good[position + 1 :])
                assert not is_whole(checkpoint), (part.filename, position)


def test_archive_entry_marked_as_a_folder_is_refused(checkpoint):
    """torch would return uninitialised memory as its content."""
    good = checkpoint.read_bytes()
    attributes = good.rindex(b"archive/data/0") - 8  # in the directory
    folder = bytes([good[attributes] | 0x10])
    checkpoint.write_bytes(good[:attributes] + folder + good[attributes + 1 :])
    assert not is_whole(checkpoint)
    refusal(checkpoint)


@pytest.mark.parametrize("length", [0, 1, 100, -1000, -30, -1])
def test_a_truncated_checkpoint_is_not_whole(length, checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[:length])
    assert not is_whole(checkpoint)


def test_a_checkpoint_of_an_earlier_version_with_a_checksum_comment_is_whole(tmp_path):
    expected, buffer = content(GPT(TINY)), io.BytesIO()
    torch.save(expected, buffer)
    buffer.seek(-2, os.SEEK_END)
    buffer.write((8 + 128).to_bytes(2, "little"))
    buffer.write(b"blake2b=" + hashlib.blake2b(buffer.getbuffer()).hexdigest().encode())
    path = tmp_path / "old.ckpt"
    path.write_bytes(buffer.getvalue())
    assert zipfile.ZipFile(path).comment.startswith(b"blake2b=")
    assert is_whole(path)
    assert equal(read_checkpoint(path), expected)
    damaged = bytearray(buffer.getvalue())
    damaged[len(damaged) // 2] ^= 8
    path.write_bytes(damaged)
    assert not is_whole(path)


def test_a_checkpoint_written_by_torch_alone_is_whole(checkpoint):
    torch.save(content(GPT(TINY)), checkpoint)
    assert is_whole(checkpoint)
    assert load_model(checkpoint).config == TINY


def test_checkpoint_rotation_keeps_the_newest(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    for step in range(5):
        write_checkpoint(path, {**content(GPT(TINY)), "global_step": step}, keep=3)
    checkpoints = last_checkpoints(tmp_path)
    assert [checkpoint.name for checkpoint in checkpoints] == [
        "last.ckpt",
        "last-1.ckpt",
        "last-2.ckpt",
    ]
    assert [read_checkpoint(checkpoint)["global_step"] for checkpoint in checkpoints] == [4, 3, 2]
    assert len(list(path.parent.iterdir())) == 3


def test_failed_checkpoint_write_leaves_earlier_checkpoints(checkpoint, monkeypatch):
    path = checkpoint
    before = sorted((p.name, p.read_bytes()) for p in path.parent.iterdir())

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(path, content(GPT(TINY)), keep=2)
    assert sorted((p.name, p.read_bytes()) for p in path.parent.iterdir()) == before


def test_snapshots_of_equal_weights_are_equal_files(tmp_path: Path):
    model, path = GPT(TINY), tmp_path / "step-000001.safetensors"
    stored = content(model)["hyper_parameters"] | {"text": 'größe "\n\x1f\x7f\u2028'}
    files = set()
    for _ in range(4):
        write_snapshot(path, model, stored, {"step": 1, "tokens": 64, "train_loss": 2.5})
        files.add(path.read_bytes())
    assert len(files) == 1
    assert read_checkpoint(path)["hyper_parameters"] == stored
