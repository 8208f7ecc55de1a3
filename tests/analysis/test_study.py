import json
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minigpt.analysis import study
from minigpt.analysis.embeddings import EmbeddingProbe
from minigpt.core.settings import UserError
from minigpt.generation.sampling import SamplingConfig, stream_text
from minigpt.model import GPT, GPTConfig
from minigpt.runs.folder import Run
from minigpt.tokenizer import Tokenizer
from tests.analysis.test_coherence import STORIES
from tests.conftest import naming


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(STORIES * 5, 300)


SIZES = {"larger": 32, "smaller": 16}  # d_ff


def untrained(folder: Path, tokenizer: Tokenizer, context: int = 40, d_ff: int = 16) -> Run:
    """Return a run folder with initial weights."""
    torch.manual_seed(0)  # other weights may write a carriage return, which reading a file alters
    shape = GPTConfig(tokenizer.vocab_size, context, 16, n_layers=1, n_heads=2, d_ff=d_ff)
    (folder / "checkpoints").mkdir(parents=True)
    weights = {f"net.{name}": tensor for name, tensor in GPT(shape).state_dict().items()}
    content = {"state_dict": weights, "hyper_parameters": {"model": asdict(shape)}}
    torch.save(content, folder / "checkpoints/last.ckpt")
    (folder / "config.yaml").write_text(json.dumps({"model": asdict(shape)}))
    tokenizer.save(folder / "tokenizer.json")
    return Run.load(folder)


def test_study_of_two_runs_writes_its_files(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "NOVELTY_STORIES", 100)
    runs = [untrained(tmp_path / name, tokenizer, 100, d_ff) for name, d_ff in SIZES.items()]
    out = tmp_path / "out"
    study.write_study(runs, out, study.StudyConfig(n=4, temperatures=(0.5, 1.0)))
    assert sorted(path.name for path in out.iterdir()) == [
        "coherence.json", "coherence.md", "coherence.png", "embeddings.json", "embeddings.md",
        "samples.md",
    ]  # fmt: skip
    content = json.loads((out / "coherence.json").read_text(encoding="utf-8"))
    assert content["settings"]["judge"] == "larger"
    measures = {"unfinished", "hero_kept", "names", "names_back"}  # as in older files
    assert all(row["coherence"].keys() == measures for row in content["rows"])
    assert [(row["run"], row["temperature"]) for row in content["rows"]] == [
        (study.ORIGINALS, None),
        *(("smaller", 0.5), ("smaller", 1.0)),
        *(("larger", 0.5), ("larger", 1.0)),
    ]
    assert "\n| smaller | 0.5 | " in (out / "coherence.md").read_text(encoding="utf-8")
    samples = (out / "samples.md").read_text(encoding="utf-8")
    assert samples.count(f"> {study.SAMPLE_PROMPT}") == 6
    maps = (out / "embeddings.md").read_text(encoding="utf-8").partition("## Maps")[2]
    assert re.search("^smaller\\b.*data.vocab_size", maps, re.MULTILINE)
    embeddings = json.loads((out / "embeddings.json").read_text(encoding="utf-8"))
    assert list(embeddings) == ["smaller", "larger"]
    assert len(embeddings["larger"]["analogies"]) == 20


def test_samples_of_the_study_are_those_of_generate(tokenizer, tmp_path, monkeypatch):
    class ReachedError(Exception):
        pass

    def study_rows(models: list[study.StudiedModel], config: study.StudyConfig) -> None:
        assert models[0].net.embedding.weight.device.type == "meta"
        raise ReachedError

    hardware = SimpleNamespace(accelerator="meta")
    monkeypatch.setattr(study.Hardware, "single", lambda *_: hardware)
    monkeypatch.setattr(study, "study_rows", study_rows)
    run = untrained(tmp_path / "one", tokenizer)
    with pytest.raises(ReachedError):
        study.write_study([run], tmp_path / "out")
    sampling = SamplingConfig(study.SAMPLE_TEMPERATURE, max_tokens=study.SAMPLE_TOKENS, seed=2)
    text = "".join(stream_text(run.load_model(), tokenizer, study.SAMPLE_PROMPT, sampling))
    quoted = "\n".join(f"> {line}".rstrip() for line in (study.SAMPLE_PROMPT + text).split("\n"))
    assert f"Seed 2:\n\n{quoted}\n" in (tmp_path / "out/samples.md").read_text(encoding="utf-8")


def test_study_draws_a_map_of_each_run_whose_tokenizer_has_the_words(tmp_path):
    words = "mom dad mother father brother sister grandma grandpa"
    tokenizer = Tokenizer.train([f"the {words}"] * 9, 350)
    net = GPT(GPTConfig(tokenizer.vocab_size, 8, 16, n_layers=1, n_heads=2, d_ff=16))
    text = study._write_maps({"one": EmbeddingProbe(net, tokenizer)}, tmp_path)
    assert (tmp_path / "map-one.png").read_bytes().startswith(b"\x89PNG")
    assert sum("](<map-one.png>)" in part for part in text) == 1


def test_study_refuses_runs_that_cannot_be_compared(tokenizer, tmp_path):
    one = untrained(tmp_path / "one", tokenizer)
    other = untrained(tmp_path / "other", tokenizer, context=8)
    with pytest.raises(UserError, match=naming("one", "other", "tokenizer", "context")):
        study.write_study([one, other], tmp_path / "out")
    with pytest.raises(UserError, match=naming("runs", "one")):
        study.write_study([one, one], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [{"n": 0}, {"seed": -1}])
def test_study_refuses_settings_out_of_range(settings):
    ((name, value),) = settings.items()
    with pytest.raises(UserError, match=naming(name, str(value))):
        study.StudyConfig(**settings)
