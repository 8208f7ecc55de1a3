"""Files about the project agree with each other: versions, Python versions and hooks."""

import re
import tomllib

import yaml

import minigpt
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read_yaml(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_version_is_the_same_in_every_file():
    assert read_yaml("CITATION.cff")["version"] == PROJECT["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)
    assert releases[:2] == ["Unreleased", PROJECT["version"]]
    assert minigpt.__version__ == PROJECT["version"]


def test_ci_runs_every_supported_python():
    matrix = read_yaml(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    prefix = "Programming Language :: Python :: "
    names = [c.removeprefix(prefix) for c in PROJECT["classifiers"] if c.startswith(prefix)]
    assert matrix["python"] == [name for name in names if re.fullmatch(r"3\.\d+", name)]
    assert PROJECT["requires-python"] == f">={matrix['python'][0]}"


def test_pre_commit_runs_the_commands_of_make_lint():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (lint,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    programs = set(re.findall(r"\$\(BIN\)/([\w-]+)", lint))
    (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
    entries = [hook["entry"].split()[0] for hook in repository["hooks"]]
    assert {entry.removeprefix(".venv/bin/") for entry in entries} == programs


def test_publishing_is_disabled_for_the_name_of_another_project():
    assert "Private :: Do Not Upload" in PROJECT["classifiers"]
    publish = read_yaml(".github/workflows/release.yml")["jobs"]["publish"]
    assert "PUBLISH_TO_INDEX" in publish["if"]
