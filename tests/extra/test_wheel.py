"""The wheel and the sdist: what they hold, and Mini GPT installed with no checkout near."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, write_stories

SAMPLE = "train.txt.xz", "valid.txt.xz", "valid_v1.txt.xz", "README.md", "LICENSE"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of a copy of this checkout, with a conf/local in it."""
    source, dist = tmp_path_factory.mktemp("source") / "x", tmp_path_factory.mktemp("dist")
    wanted = ("minigpt", "conf", "sweeps", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
    for name in wanted:
        path = ROOT / name
        skip = shutil.ignore_patterns("__pycache__", "local")
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=skip)
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(path, source)
    (source / "conf/local").mkdir()
    (source / "conf/local/default.yaml").write_text("# @package _global_\nseed: 7\n")
    code = (
        "import sys; from setuptools import build_meta as b\n"
        "out = sys.argv[1]; b.build_sdist(out); b.build_wheel(out)"
    )
    command = [sys.executable, "-c", code, str(dist)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return dist


@pytest.fixture(scope="module")
def bin(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of an environment with the wheel, and the packages of this one, but not this one's
    editable install: a .pth file that a .pth file names is not read.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    program = folder / "bin/minigpt"
    python = folder / "bin/python"
    program.write_text(f"#!{python}\nfrom minigpt.cli.start import main\nmain()\n")
    program.chmod(0o755)
    return folder / "bin"


@pytest.fixture(scope="module")
def place(bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder but for stories, with a run that was trained in it."""
    place = tmp_path_factory.mktemp("empty")
    write_stories(place / "train.txt", 400, 1)
    long = [word.replace("=16", "=64").replace("=2560", "=5120") for word in FEW]  # for the study
    minigpt(bin, place, "train", "model=large", *long, "name=first", "callbacks.snapshots=2")
    return place


FEW = (
    "experiment=debug", "data=text", "data.train_files=[train.txt]", "data.vocab_size=300",
    "model.context_length=16", "budget.tokens=2560", "trainer.accelerator=cpu",
)  # fmt: skip


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def minigpt(bin: Path, place: Path, *words: str) -> str:
    done = subprocess.run(
        [bin / "minigpt", *words], cwd=place, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_wheel_and_sdist_hold_all_but_the_settings_of_a_machine(dist: Path):
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    with tarfile.open(sdist) as archive:
        sources = [name.partition("/")[2] for name in archive.getnames()]
    for path in (
        "minigpt/conf/train.yaml", "minigpt/conf/hydra/launcher/ray.yaml", "minigpt/py.typed",
        "minigpt/kernels/decode.c",
        *(f"minigpt/data/tinystories/{name}" for name in SAMPLE),
        "minigpt/exporting/card.md.j2", "minigpt/exporting/story.html.j2",
        "minigpt/training/report.html.j2", "minigpt/analysis/settling.html.j2",
        "minigpt/playground/static/playground.css", "minigpt/playground/static/playground.js",
        "minigpt/playground/static/upload.js",
        "minigpt/sweeps/scaling.yaml",
    ):  # fmt: skip
        assert path in names
        moved = path.removeprefix("minigpt/")
        assert path in sources or moved in sources
    assert not [name for name in (*names, *sources) if "local" in name.split("/")]


def test_the_library_is_the_installed_one(bin: Path, place: Path):
    code = (
        "import minigpt; print(minigpt.__file__); "
        "print(minigpt.load_config('train', ['model=w64']).model.d_model)"
    )
    done = subprocess.run(
        [bin / "python", "-c", code], cwd=place, env=environment(), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    file, width = done.stdout.split()
    assert Path(file).is_relative_to(bin.parent)
    assert width == "64"


def test_an_installed_run_is_evaluated_resumed_told_from_and_exported(bin: Path, place: Path):
    output = minigpt(bin, place, "evaluate", "ckpt=runs/first", "stories.n=1")
    assert "perplexity" in output
    again = minigpt(bin, place, "train", "resume=runs/first")
    assert str(Path("runs/first")) in again
    assert minigpt(bin, place, "generate", "runs/first", "--seed", "1", "--max-tokens", "5")
    minigpt(bin, place, "export", "runs/first", "out", "--format", "safetensors")
    assert (place / "out/model.safetensors").is_file()
    assert "minigpt evaluate" in (place / "runs/first/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "file"),
    [
        (("probe", "runs/first", "--out", "out-probe"), None),
        (("scaling", "runs/first", "--out", "out-scaling"), "out-scaling/scaling.md"),
        (("compare", "runs/first", "--out", "recipes.md"), "recipes.md"),
        (("study", "runs/first", "--n", "2", "--out", "out-study"), "out-study/coherence.md"),
        (("study", "runs/first", "--n", "2", "--over-time", "--out", "life"), "life/over-time.md"),
        (("publish", "runs/first", "me/first", "--dry-run", "--out", "hub"), "hub/README.md"),
        (("publish", "runs/first", "me/web", "--space", "--dry-run", "--out", "web"), "web/app.py"),
        (("doctor",), None),
    ],
    ids=lambda value: "-".join(value[:1]) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_installed_verb_writes_its_files(words, file, bin: Path, place: Path):
    assert minigpt(bin, place, *words)
    assert file is None or (place / file).is_file()


def test_installed_multirun_and_two_processes(bin: Path, place: Path):
    minigpt(bin, place, "train", "-m", "model=small,large", *FEW, "runs_dir=several")
    assert len(list(place.glob("several/sweep-*/*/summary.json"))) == 2
    two = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "name=two")
    minigpt(bin, place, "train", "model=large", *FEW, *two)
    config = yaml.safe_load((place / "runs/two/config.yaml").read_text(encoding="utf-8"))
    assert config["trainer"]["devices"] == "2"
    assert (place / "runs/two/summary.json").is_file()


def test_an_installed_sweep_file_calls_minigpt_train(bin: Path, place: Path):
    minigpt(bin, place, "sweep", "scaling")
    sweep = yaml.safe_load((place / "scaling.yaml").read_text(encoding="utf-8"))
    assert sweep["command"][:3] == ["${env}", "minigpt", "train"]
    assert "experiment=scaling" in sweep["command"]
    assert sweep["parameters"]["model"]["values"][-1] == "large"


def test_printed_commands_name_the_program_that_was_typed(bin: Path, place: Path):
    output = minigpt(bin, place, "train", "model=large", *FEW, "name=named")
    assert "minigpt evaluate ckpt=runs/named" in output
    assert "python train.py" not in minigpt(bin, place, "train", "--help")


def test_a_clone_composes_its_own_yaml_and_not_that_of_another(tmp_path: Path):
    """By PYTHONPATH alone, and run with the environment of the first checkout."""
    clone = tmp_path / "clone"
    for name in ("minigpt", "conf", "pyproject.toml", "train.py"):
        path = ROOT / name
        copy = shutil.copytree if path.is_dir() else shutil.copy
        clone.mkdir(exist_ok=True)
        copy(path, clone / name)
    (clone / "conf/model/small.yaml").write_text("d_model: 64\nn_heads: 2\n")
    code = "import minigpt; print(minigpt.load_config('train').model.d_model)"
    for command, cwd, more in (
        ([sys.executable, "-c", code], tmp_path, {"PYTHONPATH": str(clone)}),
        ([sys.executable, "train.py", "--cfg", "job", "--package", "model"], clone, {}),
    ):
        done = subprocess.run(
            command, cwd=cwd, env=os.environ | more, capture_output=True, text=True, check=True
        )
        assert "64" in done.stdout
