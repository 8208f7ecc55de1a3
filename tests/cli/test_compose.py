"""Every file in conf/ composes, and agrees with the dataclasses and with the reference."""

import dataclasses
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from minigpt.cli.compose import compose_values, composed_words, defaults, load_config
from minigpt.core.settings import MISSING, UserError, flat, plain
from minigpt.evaluation import EvaluationConfig
from minigpt.model import GPT, GPTConfig
from minigpt.training.config import TrainConfig
from tests.conftest import ROOT, composed, naming

OPTIONS = sorted(
    path.relative_to(ROOT / "conf").with_suffix("")
    for path in (ROOT / "conf").glob("*/*.yaml")
    if path.parent.name != "local"
)
LAUNCHERS = sorted(path.stem for path in (ROOT / "conf/hydra/launcher").glob("*.yaml"))


def needed(option: Path) -> list[str]:
    words = {"text": ["data.train_files=[a.txt]"], "hf": ["data.dataset=owner/name"]}
    return words.get(option.name, [])


def plain_values(option: Path) -> dict[str, Any]:
    """The values of an option's file but interpolations, with those that it cannot do without."""
    text = (ROOT / "conf" / f"{option}.yaml").read_text(encoding="utf-8")
    values = {k: v for k, v in yaml.safe_load(text).items() if "${" not in str(v)}
    values.pop("defaults", None)
    required = {"text": {"train_files": ["a.txt"]}, "hf": {"dataset": "owner/name"}}
    return values | required.get(option.name, {})


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_composes(option: Path):
    config = composed([f"{option.parent}={option.name}", *needed(option)])
    assert config.budget.tokens > 0


@pytest.mark.parametrize(
    "option", [option for option in OPTIONS if str(option.parent) != "experiment"], ids=str
)
def test_option_equals_the_dataclass_with_the_values_of_its_file(option: Path):
    """The command line composes what Python builds from the same values."""
    group = str(option.parent)
    option_values = plain_values(option)
    expected = TrainConfig.from_dict({group: option_values})
    config = composed([f"{group}={option.name}", *needed(option)])
    if option.name in ("tinystories", "hf"):
        expected = dataclasses.replace(
            expected, data=dataclasses.replace(expected.data, download_tokens=10_000_000)
        )
    assert dataclasses.replace(config, size=None) == dataclasses.replace(expected, size=None)


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_conf_repeats_no_default_of_the_dataclasses(option: Path):
    if str(option.parent) == "experiment":
        return
    group, own = str(option.parent), plain_values(option)
    repeated = []
    for key, value in own.items():
        try:
            others = TrainConfig.from_dict({group: {k: v for k, v in own.items() if k != key}})
        except UserError:  # data.source, which the other values need
            continue
        if plain(getattr(getattr(others, group), key)) == value:
            repeated.append(key)
    assert repeated == []


def test_a_value_that_depends_on_another_follows_it_however_that_is_typed():
    """The file of an option adds nothing to typing the option's main setting alone."""
    assert composed(["optimizer.name=adamw"]).optimizer == composed(["optimizer=adamw"]).optimizer
    words = ["data.source=tinystories", "data.download_tokens=10000000"]
    assert composed(words).data == composed(["data=tinystories"]).data


def test_the_defaults_of_the_command_line_are_those_of_the_dataclasses():
    assert load_config("train") == TrainConfig()
    assert load_config("evaluate") == EvaluationConfig()


def test_every_setting_is_typed_without_a_plus():
    names = list(flat(defaults("train")))
    assert set(names) <= flat(compose_values("train")[0]).keys()
    compose_values("train", [f"{name}=null" for name in names])  # fails for an unknown name


@pytest.mark.filterwarnings(r"ignore:\s*'hydra/launcher")  # as in cli/run.py
@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_composes_with_or_without_its_package(name: str):
    values, size = compose_values("train", [f"hydra/launcher={name}"])
    assert values["budget"]["tokens"] > 0
    assert size == "small"


def test_fsdp_names_the_settings_that_it_needs():
    whole = ["trainer.strategy=fsdp", "callbacks=quiet", "optimizer=adamw"]
    assert composed(whole).trainer.strategy == "fsdp"
    with pytest.raises(UserError, match=naming("trainer.strategy", "optimizer")) as muon:
        composed(whole[:2])
    assert muon.value.fix == {"optimizer": "adamw"}
    with pytest.raises(UserError, match=naming("trainer.strategy", "callbacks")) as stories:
        composed(["trainer.strategy=fsdp"])
    assert stories.value.fix == {"callbacks": "quiet"}


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("small", 1_046_656), ("medium", 3_404_032), ("large", 7_072_128),  # the reference's
        ("w32", 138_784), ("w64", 359_488), ("w96", 662_112), ("w192", 2_061_504),
        ("w320", 5_074_240),
    ],
)  # fmt: skip
def test_model_sizes_differ_in_width_alone(size: str, parameters: int):
    config = composed([f"model={size}"])
    assert config.size == size
    assert GPT(config.model).n_parameters == parameters
    shape = config.model
    assert (shape.n_layers, shape.vocab_size, shape.context_length) == (5, 3000, 256)
    assert shape.d_model / shape.n_heads == 32
    assert shape.d_ff == 2 * shape.d_model


def test_the_default_recipe():
    config = composed([])
    o = config.optimizer
    assert (o.name, o.beta1, o.beta2, o.schedule) == ("muon", 0.9, 0.999, "linear")
    assert (o.weight_decay, o.warmup_steps, o.grad_clip, o.final_lr) == (0.1, 500, 1.0, 0.0)
    assert (config.data.source, config.data.batch_size) == ("tinystories_sample", 8)
    full = composed(["experiment=full"])
    assert (full.budget.tokens, full.data.source) == (104_000_000, "tinystories")
    assert (full.data.batch_size, full.data.download_tokens) == (32, 104_000_000)


def test_the_reference_recipe_is_one_override_away():
    config = composed(["experiment=reference", "model=medium", "budget.tokens=104e6"])
    o = config.optimizer
    assert (o.name, o.beta1, o.beta2, o.weight_decay) == ("adamw", 0.9, 0.999, 0.1)
    assert (o.warmup_steps, o.schedule, o.final_lr) == (500, "cosine", 0.0)
    assert (config.model.embedding_scale, config.model.dropout) == (1.0, 0.0)
    assert config.model.d_model == 256
    assert (config.data.batch_size, config.data.random_offset) == (32, False)


def test_the_vocabulary_of_the_model_follows_the_tokenizer():
    assert composed(["data.vocab_size=500"]).model.vocab_size == 500
    assert composed([]).model == GPTConfig(d_model=128, n_heads=4, d_ff=256)


def test_the_evaluation_config_composes_with_and_without_another_corpus():
    for overrides in ([], ["data=text", "data.valid_files=[a.txt]"]):
        config = load_config("evaluate", ["ckpt=x", *overrides])
        assert (config.data is not None) == bool(overrides)


def test_load_config_records_overrides_and_size():
    typed = ["model=large", "budget.tokens=20e6"]
    config = load_config("train", typed)
    assert (config.overrides, config.size) == (tuple(typed), "large")
    assert config.budget.tokens == 20_000_000


@pytest.mark.parametrize(
    ("name", "overrides", "names"),
    [
        ("trian", [], ["trian", "train"]),
        ("train", ["model=tiny"], ["model='tiny'"]),
        ("train", ["modle=small"], ["modle", "model"]),
        ("train", ["model.d_modle=3"], ["model.d_modle", "model.d_model"]),
        ("train", ["optimizer.lr=fast"], ["optimizer.lr", "fast"]),
        ("train", ["model.d_model=15"], ["model", "15"]),
        ("train", ["model.class_path=no.Such"], ["model.class_path", "no.Such"]),
        ("train", ["model.class_path=pathlib.Path"], ["model.class_path", "pathlib.Path"]),
    ],
)
def test_load_config_names_unknown_settings_in_one_line(name, overrides, names):
    with pytest.raises(UserError, match=naming(*names)) as error:
        load_config(name, overrides)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("name", "overrides", "argument", "value"),
    [
        ("trian", [], "name", "trian"),
        ("train", ["modle=small"], "modle", MISSING),
        ("train", ["optimizer.lrr=1"], "optimizer.lrr", MISSING),
        ("train", ["model=tiny"], "model", "tiny"),
        ("train", ["model.d_model=33", "model.n_heads=3"], "model.d_model", 33),
        ("train", ["model.dropout=1"], "model.dropout", 1.0),
    ],
)
def test_load_config_errors_carry_argument_and_value(name, overrides, argument, value):
    with pytest.raises(UserError) as error:
        load_config(name, overrides)
    assert (error.value.argument, error.value.value) == (argument, value)


def test_load_config_with_config_dir(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("d_model: 64\nn_heads: 2\n")
    config = load_config("train", ["model=mine"], config_dir=tmp_path)
    assert (config.model.d_model, config.size) == (64, "mine")
    with pytest.raises(UserError, match=naming("config_dir")):
        load_config("train", config_dir=tmp_path / "absent")


def test_load_config_restores_another_hydra_application(tmp_path: Path):
    (tmp_path / "theirs.yaml").write_text("a: 1\n")
    initialized = HydraConfig.initialized()  # by a program that a test has run in this process
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        before = GlobalHydra.instance()
        assert load_config("train").seed == 1
        assert GlobalHydra.instance() is before
        assert hydra.compose("theirs").a == 1
    assert not GlobalHydra.instance().is_initialized()
    assert HydraConfig.initialized() == initialized


def test_minigpt_local_adds_settings_of_the_machine(tmp_path, monkeypatch):
    (tmp_path / "local").mkdir()
    (tmp_path / "local/mine.yaml").write_text(
        "# @package _global_\ntrainer:\n  precision: 32-true\n"
    )
    monkeypatch.setenv("MINIGPT_LOCAL", "mine")
    assert load_config("train", config_dir=tmp_path).trainer.precision == "32-true"
    words = composed_words("train", ["model=small", "seed=2", "--cfg", "job"], tmp_path)
    assert words == ["local=mine", "model=small", "seed=2", "--cfg", "job"]
    assert load_config("train").trainer.precision == "auto"


@pytest.mark.parametrize("group", ["model", "teacher"])
def test_config_file_that_names_a_class_is_refused(tmp_path: Path, group: str):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/power.yaml").write_text(
        f"# @package _global_\n{group}:\n  class_path: mymodel.PowerGPT\n"
    )
    with pytest.raises(UserError) as error:
        load_config("train", ["experiment=power"], config_dir=tmp_path)
    assert error.value.argument == f"{group}.class_path"


@pytest.mark.parametrize("plus", ["", "+", "++"])
@pytest.mark.parametrize(
    ("value", "runs"),
    [("releases/w64", ("releases/w64",)), ("[a,b]", ("a", "b")), ("null", ()), ("[]", ())],
)
def test_teacher_is_short_for_teacher_runs(plus: str, value: str, runs: tuple[str, ...]):
    word = f"{plus}teacher={value}" if plus != "+" else f"++teacher.runs={value}"
    assert load_config("train", ["experiment=distill", word]).teacher.runs == runs


def test_removed_section_is_named():
    with pytest.raises(UserError) as error:
        load_config("train", ["~teacher"])
    assert error.value.argument == "teacher"
