import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import minigpt
from minigpt.core.settings import UserError
from minigpt.runs.provenance import Parent, parent_of, portable_overrides, source_commit
from tests.conftest import ROOT, naming

PACKAGE = Path(minigpt.__file__).parent
VERSION = metadata.version("minigpt")
PRINT = "from minigpt.runs.provenance import source_commit; print(source_commit())"


def git(folder: Path, *words: str) -> str:
    """Run git without user settings, and return its output."""
    settings = ("user.name=x", "user.email=x@y", "commit.gpgsign=false")
    who = [word for setting in settings for word in ("-c", setting)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    return subprocess.run(
        ["git", *who, *words], cwd=folder, env=environment, capture_output=True, text=True,
        check=True,
    ).stdout.strip()  # fmt: skip


def repository(folder: Path) -> str:
    """Make `folder` a repository with all its files committed; returns the commit."""
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "--allow-empty", "-m", "first")
    return git(folder, "rev-parse", "HEAD")


def copy_package(into: Path) -> Path:
    """Copy what `source_commit` needs of the package into a folder of packages."""
    for name in ("core", "runs"):
        shutil.copytree(PACKAGE / name, into / "minigpt" / name)
    shutil.copy(PACKAGE / "__init__.py", into / "minigpt")
    return into


def commit_of_copy(packages: Path, **environment: str) -> str:
    """Return what `source_commit` returns in a process that imports the package from `packages`."""
    process = subprocess.run(
        [sys.executable, "-c", PRINT], cwd=packages, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(packages), **environment},
    )  # fmt: skip
    return process.stdout.strip()


@pytest.fixture
def elsewhere(tmp_path: Path) -> tuple[Path, str]:
    """A repository of another project, and its commit."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "pyproject.toml").write_text('[project]\nname = "theirs"\n')
    return folder, repository(folder)


def test_commit_is_not_that_of_a_repository_around_an_installed_copy(elsewhere):
    folder, commit = elsewhere
    installed = copy_package(folder / "site-packages")
    assert commit_of_copy(installed) == VERSION
    shutil.copy(ROOT / "pyproject.toml", installed)  # a source archive that was unpacked there
    assert commit_of_copy(installed) == VERSION
    assert commit_of_copy(copy_package(folder)) == VERSION
    git(folder, "commit", "--allow-empty", "-m", "second")
    assert commit not in commit_of_copy(installed)


def test_commit_of_a_checkout_ignores_git_variables(elsewhere, tmp_path, monkeypatch):
    checkout = copy_package(tmp_path / "checkout")
    shutil.copy(ROOT / "pyproject.toml", checkout)
    (checkout / ".gitignore").write_text("__pycache__\n")
    commit = repository(checkout)
    folder, _ = elsewhere
    theirs = {"GIT_DIR": str(folder / ".git"), "GIT_WORK_TREE": str(folder)}
    assert commit_of_copy(checkout) == commit
    assert commit_of_copy(checkout, **theirs) == commit
    (checkout / "minigpt" / "__init__.py").write_text("# changed")
    assert commit_of_copy(checkout, **theirs) == f"{commit}-dirty"
    before = source_commit()
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    assert source_commit() == before


def test_commit_of_a_copy_that_pip_installed_from_git(elsewhere):
    installed = copy_package(elsewhere[0] / "site-packages")
    info = installed / "minigpt-0.2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: minigpt\nVersion: 0.2.0\n")
    url = {"url": "https://example.com/x", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}}
    (info / "direct_url.json").write_text(json.dumps(url))
    assert commit_of_copy(installed) == "c0ffee"
    (info / "direct_url.json").write_text('{"url": "file:///x", "archive_info": {}}')
    assert commit_of_copy(installed) == "0.2.0"


def test_portable_overrides_have_no_folders_of_the_machine():
    overrides = [
        "model=large",
        "data.train_files=[/home/me/a b/x.txt,'~/y.txt',stories/*.txt]",
        "++init_from=/home/me/runs/large",
        "teacher=/home/me/releases/small/",
        r"data.valid_files=[C:\Users\me\z.txt]",
        "data.separator=</s>",
        "name=x/y",
        "data.cache_dir=/tmp/me",
        "data.dataset=/home/me/wikitext",
        "data.dataset=owner/name",
        "runs_dir=/tmp/me",
        "logger=wandb",
        "+logger.wandb.entity=me",
        "callbacks.n=1",
        "resume=auto",
    ]
    assert portable_overrides(overrides) == [
        "model=large",
        "data.train_files=[x.txt,'y.txt',stories/*.txt]",
        "++init_from=large",
        "teacher=small",
        "data.valid_files=[z.txt]",
        "data.separator=</s>",
        "name=x/y",
        "data.dataset=owner/name",
    ]


WHOLE = {"name": "a", "weights": "0" * 32, "tokens": 5, "seconds": 1.0, "sources": ["text"]}


def test_parent_ignores_entries_of_older_runs():
    older = {"path": "runs/a", "commits": ["c"], "commands": [["python", "train.py"]]}
    parent = parent_of({"init_from": WHOLE | older}, Path("summary.json"))
    assert parent == Parent("a", "0" * 32, 5, 1.0, ["text"])
    assert parent_of({}, Path("summary.json")) is None


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ("large", "init_from"),
        ({"name": "x"}, "init_from.weights"),
        (WHOLE | {"tokens": "5"}, "init_from.tokens"),
        (WHOLE | {"tokens": -5}, "tokens"),
        (WHOLE | {"name": "a\n```"}, "name"),
        (WHOLE | {"sources": ["a\n```"]}, "sources"),
    ],
)
def test_invalid_parent_is_refused(entry: object, name: str):
    with pytest.raises(UserError, match=naming("summary.json", "init_from", name)) as error:
        parent_of({"init_from": entry}, Path("summary.json"))
    assert str(error.value).isprintable()
