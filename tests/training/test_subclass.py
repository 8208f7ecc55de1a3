"""A subclass of GPT is trained, resumed, evaluated and sampled by its own forward."""

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import minigpt
from minigpt.core.settings import ModelClassError, UserError
from minigpt.evaluation import EvaluationConfig, StoriesConfig
from minigpt.exporting import ExportConfig, export
from minigpt.model import GPT, FeedForward, GPTConfig
from minigpt.runs.checkpoint import read_checkpoint
from minigpt.runs.records import read_metrics, read_summary
from tests.conftest import composed, naming
from tests.training.test_loop import fail_at_step

FEW = EvaluationConfig(stories=StoriesConfig(prompts=("Tom",), n=1, max_tokens=5), words=())


class Flipped(GPT):
    """A GPT whose logits are in the reverse order of the vocabulary."""

    def forward(self, ids: Tensor, cache: object = None) -> Tensor:
        return super().forward(ids, cache).flip(-1)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ScaledConfig(GPTConfig):
    """A config with a field of its own."""

    sharpness: float = 1.0
    """Factor on the hidden state."""


class Scaled(GPT):
    """A GPT that scales the hidden state and uses the fused loss."""

    config_class = ScaledConfig

    def hidden(self, ids: Tensor, cache: object = None) -> Tensor:
        sharpness = self.config.sharpness  # type: ignore[attr-defined]
        return sharpness * super().hidden(ids, cache)  # type: ignore[arg-type]


@pytest.fixture
def flipped(tiny: list[str], trained_once: Callable[..., Path]) -> minigpt.Run:
    return minigpt.Run.load(trained_once([*tiny, "name=flipped"], model=Flipped), Flipped)


def test_resume_with_another_class_is_refused(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    command = [*tiny, "callbacks.checkpoint_steps=5"]
    for name, trained, other in (("plain", None, Flipped), ("flipped", Flipped, Scaled)):
        with monkeypatch.context() as patch:
            hook = "minigpt.training.module.GPTModule.on_train_batch_start"
            patch.setattr(hook, fail_at_step(13))
            with pytest.raises(RuntimeError, match="interrupted"):
                minigpt.train(composed([*command, f"name={name}"]), model=trained)
        with pytest.raises(ModelClassError):
            minigpt.train(composed([f"resume={tmp_path / 'runs' / name}"]), model=other)


def test_loss_of_a_subclass_is_the_cross_entropy_of_its_forward():
    torch.manual_seed(0)
    net = Flipped(GPTConfig(61, 16, d_model=16, n_layers=1, n_heads=2, d_ff=16))
    ids, targets = torch.randint(0, 61, (2, 2, 9))
    expected = F.cross_entropy(net(ids).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(net.loss(ids, targets), expected)
    torch.testing.assert_close(net(ids), GPT.forward(net, ids).flip(-1))


def test_subclass_is_evaluated_by_its_own_forward(flipped: minigpt.Run):
    logged = read_summary(flipped.folder)
    assert logged["val/perplexity"] < 150  # of 300: it learned
    assert minigpt.evaluate(flipped, FEW).perplexity == pytest.approx(
        logged["val/perplexity"], rel=1e-3
    )


def test_subclass_generates_by_its_own_forward(flipped: minigpt.Run):
    sampling = minigpt.SamplingConfig(temperature=0, max_tokens=6)
    (story,) = minigpt.generate(flipped, "Tom had", 1, sampling)
    net, tokenizer = flipped.load_model(), flipped.tokenizer
    ids = [tokenizer.end_of_text, *tokenizer.encode("Tom had")]
    text: list[int] = []
    while len(text) < 6:
        new = int(net(torch.tensor([(ids + text)[-16:]]))[0, -1].argmax())
        if new == tokenizer.end_of_text:
            break
        text.append(new)
    assert story == tokenizer.decode(text)


def test_subclass_resumes_bit_exactly(tiny: list[str], monkeypatch: pytest.MonkeyPatch):
    overrides = [*tiny, "callbacks.checkpoint_steps=5"]
    whole = minigpt.train(composed([*overrides, "name=whole"]), model=Flipped)
    with monkeypatch.context() as patch:
        patch.setattr("minigpt.training.module.GPTModule.on_train_batch_start", fail_at_step(13))
        with pytest.raises(RuntimeError, match="interrupted"):
            minigpt.train(composed([*overrides, "name=broken"]), model=Flipped)
    folder = whole.folder.parent / "broken"
    with pytest.raises(ModelClassError, match=naming("Flipped")):
        minigpt.train(composed([f"resume={folder}"]))
    broken = minigpt.train(composed([f"resume={folder}"]), model=Flipped)
    ends = [
        read_checkpoint(run.folder / "checkpoints/last.ckpt")["state_dict"]
        for run in (whole, broken)
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_run_of_a_subclass_needs_its_class(flipped: minigpt.Run):
    for wrong in (None, GPT, Scaled):
        with pytest.raises(ModelClassError, match=naming("Flipped")) as error:
            minigpt.Run.load(flipped.folder, wrong).load_model()
        assert error.value.class_name.endswith("Flipped")
    assert type(minigpt.Run.load(flipped.folder, Flipped).load_model()) is Flipped


class Squared(FeedForward):
    """ReLU² in place of GELU (So et al. 2021, arXiv 2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


def squared(config: GPTConfig) -> GPT:
    """A plain GPT with another feed-forward in each block."""
    net = GPT(config)
    for block in net.blocks:
        block.feed_forward = Squared(config)
    net._initialise()
    return net


def test_factory_that_replaces_parts_is_recorded_and_required(tiny: list[str], tmp_path: Path):
    run = minigpt.train(composed(tiny), model=squared)
    logged = read_summary(run.folder)["val/perplexity"]
    assert minigpt.evaluate(run, FEW).perplexity == pytest.approx(logged, rel=1e-3)
    with pytest.raises(ModelClassError, match=naming("squared")):
        minigpt.evaluate(str(run.folder), FEW)
    with pytest.raises(UserError, match=naming("squared")):
        export(run, tmp_path / "hf", ExportConfig(format="hf"))


def test_parameters_of_a_class_are_checked_and_stored(tiny: list[str]):
    shape = dataclasses.replace(composed(tiny).model)
    config = dataclasses.replace(
        composed(tiny), model=ScaledConfig(**dataclasses.asdict(shape), sharpness=2.0)
    )
    run = minigpt.train(config, model=Scaled)
    assert run.config["model"]["sharpness"] == 2.0
    net = minigpt.Run.load(run.folder, Scaled).load_model()
    assert net.config.sharpness == 2.0  # type: ignore[attr-defined]
    first = read_metrics(run.folder)[0]["train/loss"]
    plain = read_metrics(minigpt.train(composed(tiny)).folder)[0]["train/loss"]
    assert abs(first - math.log(300)) < 1
    assert first != plain


def test_export_of_a_subclass_is_refused_by_name_and_its_mean_is_right(
    tiny: list[str], flipped: minigpt.Run, tmp_path: Path
):
    for kind in ("hf", "onnx", "gguf"):
        with pytest.raises(UserError, match=naming("Flipped")):
            export(flipped, tmp_path / kind, ExportConfig(format=kind))
    more = composed([*tiny, f"init_from={flipped.folder}", "name=more", "seed=2"])
    child = minigpt.train(more, model=Flipped)
    mean = ExportConfig("safetensors", dtype="float32", average=(str(flipped.folder),))
    export(child, tmp_path / "mean", mean)
    card, name = (tmp_path / "mean/README.md").read_text(encoding="utf-8"), "Flipped"
    for command in (f"generate .* --class-path .*{name}", f"evaluate .*class_path=.*{name}"):
        assert re.search(f"^minigpt {command}", card, re.MULTILINE)
    assert re.search(f"^minigpt export .* --class-path .*{name} --average ", card, re.MULTILINE)
    run = minigpt.Run.load(tmp_path / "mean", Flipped)
    weights = [r.load_model().state_dict() for r in (flipped, child, run)]
    for name, weight in weights[2].items():
        torch.testing.assert_close(weight, (weights[0][name] + weights[1][name]) / 2)
    assert type(run.load_model()) is Flipped
