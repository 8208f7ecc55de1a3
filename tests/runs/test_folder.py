import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from minigpt.core.settings import UserError
from minigpt.model import GPT, GPTConfig
from minigpt.runs.folder import Run
from minigpt.tokenizer import Tokenizer

TINY = GPTConfig(vocab_size=300, context_length=8, d_model=16, n_layers=1, n_heads=2, d_ff=16)


def content(model: GPT, config: GPTConfig = TINY) -> dict:
    """Return the parts of a Lightning checkpoint that are read."""
    return {
        "state_dict": {f"net.{name}": weight for name, weight in model.state_dict().items()},
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


def test_run_of_a_folder_selects_the_best_checkpoint(run):
    checkpoints = run / "checkpoints"
    best, last = Run.load(run), Run.load(str(checkpoints / "last.ckpt"))
    assert (best.checkpoint, last.checkpoint) == (checkpoints / "best.ckpt", checkpoints / "last.ckpt")  # fmt: skip  # noqa: E501
    assert best.folder == last.folder == run
    assert not torch.equal(best.load_model().embedding.weight, last.load_model().embedding.weight)
    (checkpoints / "best.ckpt").unlink()
    assert Run.load(run).checkpoint == checkpoints / "last.ckpt"


def test_load_model_restores_the_saved_model(run):
    torch.manual_seed(0)
    expected, model = GPT(TINY).eval(), Run.load(run).load_model()
    ids = torch.tensor([[1, 2, 3]])
    assert not model.training
    assert model.config == TINY
    assert torch.equal(model(ids), expected(ids))


def test_tokenizer_and_config_come_from_the_folder_of_the_checkpoint(run):
    loaded = Run.load(run / "checkpoints" / "last.ckpt")
    assert loaded.tokenizer.vocab_size == 260
    assert loaded.config["seed"] == 1
    (run / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        _ = Run.load(run).tokenizer


@pytest.mark.parametrize("text", ["a: [", "- a\n- list", "", b"\xff\xfe\x00"])
def test_invalid_config_yaml_is_refused_by_name(text, run):
    text = text if isinstance(text, bytes) else text.encode()
    (run / "config.yaml").write_bytes(text)
    with pytest.raises(UserError, match=r"config\.yaml") as error:
        _ = Run.load(run).config
    assert "\n" not in str(error.value)


def test_settings_that_an_older_run_lacks_get_the_values_of_that_time(run):
    old = {"optimizer": {"name": "muon"}, "trainer": {"precision": "32-true"}}
    (run / "config.yaml").write_text(yaml.safe_dump(old))
    config = Run.load(run).config
    assert config["trainer"] == {"precision": "32-true", "cuda_graph": False}
    assert config["optimizer"]["follow_batch"] is False
    (run / "config.yaml").write_text(yaml.safe_dump({"trainer": {"cuda_graph": True}}))
    assert Run.load(run).config["trainer"]["cuda_graph"] is True


def test_path_without_a_run_is_refused_with_what_to_give(tmp_path):
    with pytest.raises(UserError, match=r"(?=.*absent)(?=.*runs/<name>)(?=.*\.ckpt)"):
        Run.load(tmp_path / "absent")
    with pytest.raises(UserError, match=r"(?=.*best\.ckpt)(?=.*last\.ckpt)"):
        Run.load(tmp_path)


def test_damaged_best_checkpoint_is_skipped(run, caplog):
    (run / "checkpoints" / "best.ckpt").write_bytes(b"PK")
    assert Run.load(run).checkpoint == run / "checkpoints" / "last.ckpt"
    assert str(run / "checkpoints" / "best.ckpt") in caplog.text
    (run / "checkpoints" / "last.ckpt").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"best\.ckpt"):
        Run.load(run).load_model()


def test_summary_has_steps_tokens_and_seconds_of_the_selected_checkpoint(run):
    total = {"steps": 9, "tokens": 90, "seconds": 50.0, "device": "cpu"}
    (run / "summary.json").write_text(json.dumps(total))
    path = run / "checkpoints" / "best.ckpt"
    stored = content(GPT(TINY))
    stored["hyper_parameters"]["tokens_per_step"] = 10
    for callbacks, seconds in ({"Throughput": {"seconds": 12.34}}, 12.3), ([], None), (None, None):
        torch.save(stored | {"callbacks": callbacks}, path)
        summary = Run.load(path).summary
        assert summary.get("seconds") == seconds
        assert {**summary, "seconds": 0} == {**total, "steps": 3, "tokens": 30, "seconds": 0}
    torch.save(stored | {"global_step": 9}, path)
    assert Run.load(path).summary == total
