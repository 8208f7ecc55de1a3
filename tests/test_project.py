"""Files about the project agree with each other: versions, Python versions and hooks."""

import ast
import io
import re
import subprocess
import tokenize
import tomllib

import pytest
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


def test_every_package_is_in_the_wheel():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("minigpt/**/__init__.py")}
    names = {".".join(folder.parts) for folder in folders}
    assert {*tool["setuptools"]["packages"]} == {*names, "minigpt.conf", "minigpt.sweeps"}


def test_publishing_is_disabled_for_the_name_of_another_project():
    assert "Private :: Do Not Upload" in PROJECT["classifiers"]
    publish = read_yaml(".github/workflows/release.yml")["jobs"]["publish"]
    assert "PUBLISH_TO_INDEX" in publish["if"]


def test_top_level_has_only_known_files():
    """A test or program that writes into the checkout must not be committed by accident."""
    git = ["git", "ls-files"]
    paths = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    if not paths:
        pytest.skip("not a git checkout")
    folders = "conf minigpt sweeps tests benchmarks docs examples releases .ci .github"
    files = (
        "pyproject.toml train.py evaluate.py README.md CHANGELOG.md CITATION.cff CONTRIBUTING.md "
        "LICENSE MANIFEST.in Makefile mkdocs.yml .gitignore .pre-commit-config.yaml"
    )
    assert {path.split("/")[0] for path in paths} == {*folders.split(), *files.split()}
    assert sum((ROOT / path).stat().st_size for path in paths) < 45e6


def code_lines(source: str) -> int:
    """Return the number of lines without blank lines, comments and docstrings."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped | {tokenize.ENDMARKER}:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(lines)


def test_a_module_can_be_read_in_one_sitting():
    """CONTRIBUTING.md states the limits; model.py is the page that everybody reads."""
    package = ROOT / "minigpt"
    sizes = {
        path.relative_to(package).as_posix(): code_lines(path.read_text(encoding="utf-8"))
        for path in package.rglob("*.py")
    }
    assert {name: size for name, size in sizes.items() if size > 300} == {}
    assert sizes["model.py"] <= 170
    assert len([path for path in package.iterdir() if path.name != "__pycache__"]) <= 18
