import json
import os
import pickle
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from minigpt.core.files import write_json, write_text
from minigpt.core.settings import UserError
from minigpt.model import GPT, GPTConfig
from minigpt.runs.checkpoint import (
    is_whole,
    read_checkpoint,
    write_checkpoint,
)
from minigpt.runs.folder import Run, last_checkpoints
from minigpt.tokenizer import Tokenizer

TINY = GPTConfig(vocab_size=300, context_length=8, d_model=16, n_layers=1, n_heads=2, d_ff=16)


def content(net: GPT, config: GPTConfig = TINY) -> dict:
    """What matters of a Lightning checkpoint."""
    return {
        "state_dict": {f"net.{name}": weight for name, weight in net.state_dict().items()},
        "hyper_parameters": {"model": asdict(config)},
        "global_step": 3,
    }


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with a best and a last checkpoint, which differ."""
    folder = tmp_path / "runs" / "tiny"
    (folder / "checkpoints").mkdir(parents=True)
    for seed, name in enumerate(("best", "last")):
        torch.manual_seed(seed)
        torch.save(content(GPT(TINY)), folder / "checkpoints" / f"{name}.ckpt")
    Tokenizer.train(["Once upon a time."], 260).save(folder / "tokenizer.json")
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 1, "model": asdict(TINY)}))
    return folder


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        Run.load(path).load_model()
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_a_folder_is_its_best_checkpoint_and_a_file_is_itself(run):
    checkpoints = run / "checkpoints"
    best, last = Run.open(run), Run.open(str(checkpoints / "last.ckpt"))
    assert (best.checkpoint, last.checkpoint) == (checkpoints / "best.ckpt", checkpoints / "last.ckpt")  # fmt: skip  # noqa: E501
    assert best.folder == last.folder == run
    assert not torch.equal(best.load_net().embedding.weight, last.load_net().embedding.weight)
    (checkpoints / "best.ckpt").unlink()
    assert Run.open(run).checkpoint == checkpoints / "last.ckpt"


def test_a_checkpoint_gives_back_the_model_it_was_made_of(run):
    torch.manual_seed(0)
    expected, net = GPT(TINY).eval(), Run.open(run).load_net()
    ids = torch.tensor([[1, 2, 3]])
    assert not net.training
    assert net.config == TINY
    assert torch.equal(net(ids), expected(ids))


def test_tokenizer_and_config_come_from_the_folder_of_the_checkpoint(run):
    opened = Run.open(run / "checkpoints" / "last.ckpt")
    assert opened.load_tokenizer().vocab_size == 260
    assert opened.config["seed"] == 1
    (run / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        opened.load_tokenizer()


@pytest.mark.parametrize("text", ["a: [", "- a\n- list", "", b"\xff\xfe\x00"])
def test_a_config_that_is_none_is_refused_by_name(text, run):
    text = text if isinstance(text, bytes) else text.encode()
    (run / "config.yaml").write_bytes(text)
    with pytest.raises(UserError, match=r"config\.yaml") as error:
        _ = Run.load(run).config
    assert "\n" not in str(error.value)


def test_a_path_without_a_run_is_refused_with_what_to_give(tmp_path):
    with pytest.raises(UserError, match=r"(?=.*absent)(?=.*runs/<name>)(?=.*\.ckpt)"):
        Run.open(tmp_path / "absent")
    with pytest.raises(UserError, match=r"(?=.*best\.ckpt)(?=.*last\.ckpt)"):
        Run.open(tmp_path)


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
def test_a_file_that_is_no_checkpoint_is_refused(junk, tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(junk)
    refusal(path)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(share, run):
    path = run / "checkpoints" / "best.ckpt"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
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


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "numbers.json"
    write_json(path, {"story": "é"})
    before = path.read_text(encoding="utf-8")
    assert json.loads(before) == {"story": "é"}
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half a surrogate: \ud800")
    assert path.read_text(encoding="utf-8") == before


def test_a_checkpoint_is_whole_until_any_bit_of_it_changes(tmp_path):
    path = tmp_path / "x.ckpt"
    write_checkpoint(path, content(GPT(TINY)))
    assert is_whole(path)
    assert zipfile.ZipFile(path).testzip() is None  # a proper archive still
    assert read_checkpoint(path)["hyper_parameters"]["model"] == asdict(TINY)
    good = path.read_bytes()
    for position in [*range(0, len(good), 997), *range(len(good) - 160, len(good), 3)]:
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        assert not is_whole(path), position
    for length in (0, 1, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        assert not is_whole(path), length


def test_a_checkpoint_without_a_checksum_is_held_against_what_torch_wrote(run):
    best = run / "checkpoints" / "best.ckpt"
    assert is_whole(best)
    damaged = bytearray(best.read_bytes())
    (weights,) = [i for i in zipfile.ZipFile(best).infolist() if i.filename.endswith("data/0")]
    damaged[weights.header_offset + 200] ^= 1
    best.write_bytes(damaged)
    assert not is_whole(best)


def test_a_damaged_best_checkpoint_is_passed_over(run, caplog):
    (run / "checkpoints" / "best.ckpt").write_bytes(b"PK")
    assert Run.open(run).checkpoint == run / "checkpoints" / "last.ckpt"
    assert str(run / "checkpoints" / "best.ckpt") in caplog.text
    (run / "checkpoints" / "last.ckpt").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"best\.ckpt"):
        Run.open(run).load_net()


def test_a_bounded_number_of_checkpoints_is_kept_the_newest_first(run):
    path = run / "checkpoints" / "last.ckpt"
    for step in range(5):
        write_checkpoint(path, {**content(GPT(TINY)), "global_step": step}, keep=3)
    kept = last_checkpoints(run)
    assert [kept_one.name for kept_one in kept] == ["last.ckpt", "last-1.ckpt", "last-2.ckpt"]
    assert [read_checkpoint(kept_one)["global_step"] for kept_one in kept] == [4, 3, 2]
    assert len(list(path.parent.iterdir())) == 4  # and best.ckpt


def test_a_checkpoint_that_cannot_be_written_leaves_what_was_there(run, monkeypatch):
    path = run / "checkpoints" / "last.ckpt"
    before = sorted((p.name, p.read_bytes()) for p in path.parent.iterdir())

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(path, content(GPT(TINY)), keep=2)
    assert sorted((p.name, p.read_bytes()) for p in path.parent.iterdir()) == before
