"""The sentence under each field of a config dataclass."""

import dataclasses
import re
from typing import Any

import pytest

from minigpt.analysis.over_time import OverTimeConfig
from minigpt.analysis.study import StudyConfig
from minigpt.core.fields import documented, field_docs, setting_docs
from minigpt.evaluation import EvaluationConfig
from minigpt.exporting import ExportConfig
from minigpt.generation import SamplingConfig
from minigpt.training.config import TrainConfig
from tests.conftest import ROOT

ROOTS = (TrainConfig, EvaluationConfig, ExportConfig, SamplingConfig, StudyConfig, OverTimeConfig)


def with_sections(config: Any) -> set[type]:
    """The class of a config, and those of its sections."""
    inner = (getattr(config, field.name) for field in dataclasses.fields(config))
    return {type(config)}.union(*(with_sections(c) for c in inner if dataclasses.is_dataclass(c)))


CONFIGS = sorted(
    set().union(*(with_sections(cls()) for cls in ROOTS)), key=lambda cls: cls.__name__
)


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)
def test_every_field_has_a_sentence_that_help_shows(cls: type):
    docs = field_docs(cls)
    for field in dataclasses.fields(cls):
        sentence = docs.get(field.name, "")
        assert sentence.endswith("."), field.name
        assert len(sentence.split()) > 3, field.name
        assert "None" not in str(field.type) or "None" in sentence, field.name
        assert re.search(rf"^ +{field.name}: ", cls.__doc__ or "", re.MULTILINE), field.name


def test_every_config_of_the_package_is_checked():
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "minigpt").rglob("*.py"))
    names = {name for text in sources for name in re.findall(r"^class (\w+Config)\b", text, re.M)}
    assert names == {cls.__name__ for cls in CONFIGS}


@dataclasses.dataclass
class Base:
    """A base."""

    width: int = 1
    """Width of
    the base."""
    bare: int = 2


@documented
@dataclasses.dataclass
class Derived(Base):
    """A derived one."""

    base: Base = dataclasses.field(default_factory=Base)
    """The section of the base."""
    depth: int | None = None
    """Depth of the derived one."""

    def method(self) -> None:
        """No sentence of a field."""


def test_field_docs_of_bases_sections_and_classes_without_source():
    assert field_docs(Derived) == {
        "width": "Width of the base.",
        "base": "The section of the base.",
        "depth": "Depth of the derived one.",
    }
    assert setting_docs(Derived) == {
        "width": "Width of the base.",
        "bare": "",
        "base.width": "Width of the base.",
        "base.bare": "",
        "depth": "Depth of the derived one.",
    }
    assert (Derived.__doc__ or "").startswith("A derived one.\n\nAttributes:\n    width: Width")
    assert "bare:" not in (Base.__doc__ or "")
    assert field_docs(dataclasses.make_dataclass("Typed", [("width", int, 1)])) == {}
