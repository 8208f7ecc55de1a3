"""Names of the files that evaluations are written to."""

from types import SimpleNamespace
from typing import Any

import pytest

from minigpt.core.settings import UserError
from minigpt.data.config import DataConfig
from minigpt.evaluation.config import EvaluationConfig
from minigpt.evaluation.results import check_writable, evaluation_name
from tests.conftest import naming


def name(config: EvaluationConfig, valid: str = "stories", text: str | None = "v2") -> str:
    evaluation: Any = SimpleNamespace(data={"valid": valid}, valid=text)
    return evaluation_name(config, evaluation)


def text(*files: str, **more: Any) -> EvaluationConfig:
    return EvaluationConfig(data=DataConfig(source="text", valid_files=files, **more))


def test_name_has_a_part_for_each_setting_that_changes_the_result():
    assert name(EvaluationConfig()) == "evaluation.json"
    assert name(EvaluationConfig(), text=None) == "evaluation.json"
    assert name(EvaluationConfig(), text="v1") == "evaluation-v1.json"
    assert name(EvaluationConfig(), "tuning") == "evaluation-tuning.json"
    assert name(EvaluationConfig(stride=128), "tuning") == "evaluation-tuning-stride128.json"
    sample = EvaluationConfig(data=DataConfig(source="tinystories_sample"))
    assert name(sample) == "evaluation-tinystories_sample.json"


def test_each_text_has_its_own_file_and_relative_and_absolute_paths_have_the_same(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    first, second = name(text("a.txt")), name(text("b.txt"))
    assert first.startswith("evaluation-text-")
    assert len({first, second, name(text("a.txt", separator="\n"))}) == 3
    assert name(text(str(tmp_path / "a.txt"), cache_dir="elsewhere")) == first


def test_folder_is_created_or_refused_by_name(tmp_path):
    check_writable(tmp_path / "a/b")
    assert (tmp_path / "a/b").is_dir()
    assert not list((tmp_path / "a/b").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=naming("probe.json")) as error:
        check_writable(tmp_path / "file/b", "probe.json")
    assert error.value.argument == "out"
