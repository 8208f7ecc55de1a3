from dataclasses import dataclass
from typing import Literal

import pytest

from minigpt.config import UserError, build, unknown_name


@dataclass(frozen=True)
class Inner:
    width: int = 1


@dataclass(frozen=True)
class Settings:
    steps: int = 1
    rate: float | None = None
    names: tuple[str, ...] = ()
    kind: Literal["a", "b"] = "a"
    on: bool = False
    inner: Inner = Inner()

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps {self.steps} must not be negative")


def test_values_arrive_in_the_types_of_the_dataclass():
    made = build(Settings, {"steps": 1e7, "rate": 2, "names": ["x"], "inner": {"width": 3}}, "s")
    assert made == Settings(10_000_000, 2.0, ("x",), inner=Inner(3))
    assert isinstance(made.steps, int)
    assert build(Settings, {"names": "one"}, "s").names == ("one",)
    assert build(Settings, {"rate": None}, "s").rate is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 1}, "unknown setting 's.stepz': did you mean s.steps or s.rate?"),
        ({"steps": 1.5}, "s.steps=1.5: expected a whole number"),
        ({"steps": True}, "s.steps=True: expected a whole number"),
        ({"steps": None}, "s.steps=None: expected a whole number"),
        ({"steps": -1}, "s: steps -1 must not be negative"),
        ({"rate": "fast"}, "s.rate='fast': expected a number"),
        ({"rate": float("nan")}, "s.rate=nan: expected a finite number"),
        ({"names": 3}, "s.names=3: expected a list, such as s.names=[a,b]"),
        ({"kind": "c"}, "s.kind=c: choose from a, b"),
        ({"on": 1}, "s.on=1: expected true or false"),
        ({"inner": 3}, "s.inner=3: a group of settings; type s.inner.<setting>=<value>"),
        ({"inner": {"width": "x"}}, "s.inner.width='x': expected a whole number"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(values, message):
    with pytest.raises(UserError) as error:
        build(Settings, values, "s")
    assert str(error.value) == message


def test_a_name_like_no_other_is_answered_with_all_of_them():
    assert unknown_name("zzz", ["b", "a"]) == "unknown setting 'zzz': choose from a, b"
