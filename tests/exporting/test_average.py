"""Records of averaged weights."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from minigpt.core.settings import UserError
from minigpt.exporting.average import _add_branch
from minigpt.runs.folder import Run
from minigpt.runs.provenance import AveragedRun, averaged_runs
from tests.conftest import naming

PARENT = {"name": "large", "weights": "p", "tokens": 10, "seconds": 1.0, "sources": ["text"]}


def teacher(name: str) -> dict[str, Any]:
    return {**PARENT, "name": name, "weights": name, "teachers": []}


def test_branch_adds_its_tokens_seconds_commits_and_teachers_once():
    own = {"tokens": 5, "seconds": 2.0, "commit": "a, b", "teachers": [teacher("one")]}
    other = {
        "tokens": 7,
        "seconds": 0.5,
        "commit": "b",
        "teachers": [*map(teacher, ("one", "two"))],
    }
    _add_branch(
        own,
        Path("summary.json"),
        cast(Run, SimpleNamespace(summary=other, folder=Path("runs/other"))),
    )
    assert (own["tokens"], own["seconds"], own["commit"]) == (12, 2.5, "a, b")
    assert [entry["name"] for entry in own["teachers"]] == ["one", "two"]


def test_branch_with_unknown_tokens_makes_those_of_the_average_unknown():
    own: dict[str, Any] = {"tokens": 5, "seconds": 2.0}
    _add_branch(
        own,
        Path("summary.json"),
        cast(Run, SimpleNamespace(summary={"seconds": 1.0}, folder=Path("other"))),
    )
    assert (own["tokens"], own["seconds"]) == (None, 3.0)


def test_average_of_an_earlier_version_is_that_with_the_parent():
    summary = {"averaged": True, "init_from": PARENT}
    assert averaged_runs(summary, Path("summary.json")) == [AveragedRun("large", "p")]
    assert averaged_runs({}, Path("summary.json")) == []


@pytest.mark.parametrize(
    "value", ["x", 1, ["x"], [{"name": "a"}], [{"name": "a\n", "weights": ""}]]
)
def test_damaged_record_of_an_average_is_refused(value: object):
    with pytest.raises(UserError, match=naming("summary.json", "averaged")):
        averaged_runs({"averaged": value}, Path("summary.json"))
