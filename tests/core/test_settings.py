import pickle
from dataclasses import dataclass
from typing import Literal

import pytest

from minigpt.core.settings import ModelClassError, UserError, build, python_call, unknown_name


@dataclass(frozen=True)
class Inner:
    width: int = 1


@dataclass(frozen=True)
class Settings:
    steps: int = 1
    rate: float | None = None
    names: tuple[str, ...] = ()
    kind: Literal["round", "square"] = "round"
    on: bool = False
    inner: Inner = Inner()

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps {self.steps} must not be negative")


def test_build_converts_values_to_the_types_of_the_dataclass():
    settings = build(
        Settings, {"steps": 1e7, "rate": 2, "names": ["x"], "inner": {"width": 3}}, "s"
    )
    assert settings == Settings(10_000_000, 2.0, ("x",), inner=Inner(3))
    assert isinstance(settings.steps, int)
    assert build(Settings, {"names": "one"}, "s").names == ("one",)
    assert build(Settings, {"rate": None}, "s").rate is None


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"stepz": 1}, ["s.stepz", "s.steps", "s.rate"]),
        ({"steps": 1.5}, ["s.steps", "1.5"]),
        ({"steps": True}, ["s.steps"]),
        ({"steps": None}, ["s.steps"]),
        ({"steps": -1}, ["steps", "-1"]),
        ({"rate": "fast"}, ["s.rate", "fast"]),
        ({"rate": float("nan")}, ["s.rate", "nan"]),
        ({"names": 3}, ["s.names", "3", "s.names=[a,b]"]),
        ({"kind": "c"}, ["s.kind", "round", "square"]),
        ({"on": 1}, ["s.on", "1", "true", "false"]),
        ({"inner": 3}, ["s.inner", "3", "s.inner."]),
        ({"inner": {"width": "x"}}, ["s.inner.width"]),
    ],
)
def test_build_error_names_the_field_on_one_line(values, names):
    with pytest.raises(UserError) as error:
        build(Settings, values, "s")
    assert all(name in str(error.value) for name in names)
    assert str(error.value).isprintable()  # and so one line


def test_unknown_name_without_similar_ones_lists_all():
    message = unknown_name("zzz", ["beta", "alpha"])
    assert 0 <= message.find("alpha") < message.find("beta")


def test_suggested_calls_contain_custom_classes_by_name():
    train = python_call("train", resume="runs/a", **{"model.class_path": "my.PowerGPT"})
    assert (
        train == "minigpt.train(minigpt.load_config(\"train\", ['resume=runs/a']), model=PowerGPT)"
    )
    taught = python_call("train", "seed=1", "teacher.class_path=my.Big")
    assert taught.endswith("['seed=1']), teacher=Big)")
    evaluate = python_call("evaluate", ckpt="runs/a", class_path="my.PowerGPT")
    assert evaluate == "minigpt.evaluate(minigpt.Run.load('runs/a', PowerGPT))"
    assert python_call("evaluate", ckpt="runs/a") == "minigpt.evaluate('runs/a')"
    study = python_call("study", run="runs/a", class_path="my.PowerGPT")
    assert study == "minigpt study runs/a --class-path my.PowerGPT"


@pytest.mark.parametrize(
    "error",
    [
        UserError("is wrong", "steps"),
        UserError("is wrong", "steps", 3, {"steps": 2}, ("train", {"resume": "a"})),
        ModelClassError("is missing", "mine.MyGPT", "teacher"),
    ],
)
def test_error_of_another_process_has_the_same_text(error):
    """Launchers of sweeps pickle the errors of their jobs."""
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (type(error), str(error))
    assert vars(copy) == vars(error)
