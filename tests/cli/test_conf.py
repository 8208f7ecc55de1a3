"""Every file under conf/ composes, and says what the reference says."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from minigpt.core.settings import UserError, build
from minigpt.evaluation import EvaluationConfig
from minigpt.model import GPT, GPTConfig
from tests.conftest import ROOT, composed

OPTIONS = sorted(
    path.relative_to(ROOT / "conf").with_suffix("") for path in (ROOT / "conf").glob("*/*.yaml")
)
LAUNCHERS = sorted(path.stem for path in (ROOT / "conf/hydra/launcher").glob("*.yaml"))


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_makes_a_job(option: Path):
    more = ["data.train_files=[a.txt]"] if option.name == "text" else []
    made = composed([f"{option.parent}={option.name}", *more])
    assert made.budget.tokens > 0


@pytest.mark.filterwarnings(r"ignore:\s*'hydra/launcher")  # as in entry.py
@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_composes_with_or_without_its_package(name: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        whole = compose("train", [f"hydra/launcher={name}"], return_hydra_config=True)
    assert whole.hydra.launcher._target_.startswith("hydra_plugins.hydra_")
    assert whole.budget.tokens > 0


def test_fsdp_is_one_override_away_and_says_what_it_needs():
    whole = ["trainer.strategy=fsdp", "callbacks=quiet", "optimizer=adamw"]
    assert composed(whole).trainer.strategy == "fsdp"
    with pytest.raises(UserError, match="(?=.*strategy=fsdp)(?=.*optimizer=adamw)"):
        composed(whole[:2])
    with pytest.raises(UserError, match="(?=.*strategy=fsdp)(?=.*callbacks=quiet)"):
        composed(["trainer.strategy=fsdp"])


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("small", 1_046_656), ("medium", 3_404_032), ("large", 7_072_128),  # the reference's
        ("w32", 138_784), ("w64", 359_488), ("w96", 662_112), ("w192", 2_061_504),
        ("w320", 5_074_240),
    ],
)  # fmt: skip
def test_the_sizes_differ_by_width_alone(size: str, parameters: int):
    config = composed([f"model={size}"]).model
    assert GPT(config).n_parameters == parameters
    assert (config.n_layers, config.vocab_size, config.context_length) == (5, 3000, 256)
    assert config.d_model / config.n_heads == 32
    assert config.d_ff == 2 * config.d_model


def test_the_defaults_are_the_reference_recipe():
    made = composed([])
    assert (made.optimizer.beta1, made.optimizer.beta2) == (0.9, 0.999)
    assert (made.optimizer.weight_decay, made.optimizer.warmup_steps) == (0.1, 500)
    assert (made.optimizer.grad_clip, made.optimizer.final_lr) == (1.0, 0.0)
    assert made.data.source == "tinystories_sample"
    full = composed(["experiment=full"])
    assert (full.budget.tokens, full.data.source) == (104_000_000, "tinystories")


def test_the_reference_recipe_is_one_override_away():
    made = composed(["experiment=reference", "model=medium", "budget.tokens=104e6"])
    o = made.optimizer
    assert (o.name, o.beta1, o.beta2, o.weight_decay) == ("adamw", 0.9, 0.999, 0.1)
    assert (o.warmup_steps, o.schedule, o.final_lr) == (500, "cosine", 0.0)
    assert (made.model.embedding_scale, made.model.dropout) == (1.0, 0.0)
    assert (made.model.d_model, made.data.batch_size, made.data.random_offset) == (256, 32, False)


def test_the_vocabulary_of_the_model_follows_the_tokenizer():
    assert composed(["data.vocab_size=500"]).model.vocab_size == 500
    assert composed([]).model == GPTConfig(d_model=128, n_heads=4, d_ff=256)


def test_the_evaluation_config_composes_with_and_without_another_corpus():
    for overrides in ([], ["data=text", "data.valid_files=[a.txt]"]):
        plain: Any = OmegaConf.to_container(composed(["ckpt=x", *overrides], "evaluate"))
        del plain["ckpt"], plain["out"]
        made = build(EvaluationConfig, plain, "")
        assert (made.data is not None) == bool(overrides)
