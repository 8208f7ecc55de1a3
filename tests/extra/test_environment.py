"""The programs as real processes in unusual surroundings: users, folders, compilers, launchers."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT, tiny_overrides
from tests.extra.conftest import Served, playground

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root"),
]
USER = 54321  # a user id without a name
# Such a user may read everything, like Python in root's home folder, but may not write.
AS_USER = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups",
           "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]  # fmt: skip
PLAIN = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
         "MINIGPT_LOCAL": "null", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}  # fmt: skip


def run(
    *arguments: str, before: tuple[str, ...] = (), variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python <arguments>` in the checkout with only these environment variables."""
    environment = {**PLAIN, "PYTHONPATH": str(ROOT), **(variables or {})}
    return subprocess.run(
        [*before, sys.executable, *arguments], cwd=ROOT, env=environment,
        capture_output=True, text=True, encoding="utf-8", timeout=250,
    )  # fmt: skip


def as_user(
    *arguments: str, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python <arguments>` with a user id that has no name."""
    return run(*arguments, before=tuple(AS_USER), variables=variables)


def check_error(process: subprocess.CompletedProcess[str], *names: str) -> None:
    """Check that a process ended with one line of error that holds all `names`."""
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert (process.returncode, len(lines)) == (2, 1), process.stderr
    assert "Traceback" not in process.stderr
    assert all(name in lines[0] for name in names), lines[0]


@pytest.fixture
def owned(tmp_path: Path) -> list[str]:
    """Overrides for a tiny run in a folder of the user."""
    for folder in (*tmp_path.parents, tmp_path):
        if folder.is_relative_to("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o055)
    overrides = tiny_overrides(tmp_path)
    os.chown(tmp_path, USER, USER)
    return overrides


@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_a_user_without_name_and_home_trains_with_wandb_and_generates(owned, tmp_path, home):
    variables = {} if home is None else {"HOME": home}
    trained = as_user("train.py", *owned, "logger=wandb", "name=a", variables=variables)
    assert trained.returncode == 0, trained.stderr
    assert "Traceback" not in trained.stderr
    assert "atplotlib" not in trained.stderr  # no complaint about its cache
    assert (tmp_path / "runs/a/report.html").is_file()
    story = as_user("-m", "minigpt", "generate", str(tmp_path / "runs/a"), variables=variables)
    assert (story.returncode, story.stderr) == (0, "")  # decode.c is compiled
    assert story.stdout.startswith("Once upon a time")


def test_read_only_checkout_cache_and_runs_are_one_line_errors(owned, tmp_path):
    (tmp_path / "fixed").mkdir()
    runs, cache = (f"{name}={tmp_path / 'fixed/a'}" for name in ("runs_dir", "data.cache_dir"))
    check_error(as_user("train.py", *owned, runs), "runs_dir", "fixed/a")
    check_error(as_user("train.py", *owned, cache), "data.cache_dir", "fixed/a")
    check_error(
        as_user("train.py", "-m", *owned, f"hydra.sweep.dir={tmp_path / 'fixed/a'}"), "fixed"
    )


def without_compiler(folder: Path) -> str:
    """Return a PATH without compilers."""
    folder.mkdir()
    for name in ("git", "uname", "env"):
        (folder / name).symlink_to(shutil.which(name) or f"/usr/bin/{name}")
    return str(folder)


def test_without_a_compiler_compile_is_an_error_and_generation_one_warning(tiny, tmp_path):
    variables = {"PATH": without_compiler(tmp_path / "bin")}
    training = run("train.py", *tiny, "trainer.compile=true", variables=variables)
    check_error(training, "trainer.compile")
    command = "-m minigpt generate releases/small --max-tokens 5"
    story = run(*command.split(), variables=variables)
    assert story.returncode == 0
    (warning,) = story.stderr.splitlines()
    assert "gcc" in warning


def test_launcher_variables_left_in_a_shell_are_ignored(tiny, tmp_path):
    variables = {"RANK": "1", "WORLD_SIZE": "", "LOCAL_RANK": "x", "SLURM_PROCID": ""}
    trained = run("train.py", *tiny, "name=a", variables=variables)
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr.count("ignored") == 1
    assert (tmp_path / "runs/a/metrics.csv").read_text().count("\n") > 10  # as rank 0
    variables |= {"TORCHELASTIC_RUN_ID": "left"}
    check_error(run("train.py", *tiny, variables=variables), "TORCHELASTIC_RUN_ID", "LOCAL_RANK")
    for arguments in (
        ["train.py", "--help"],
        ["-m", "minigpt", "generate", "releases/small", "--max-tokens", "2"],
        ["evaluate.py", f"ckpt={tmp_path / 'runs/a'}", "stories.n=1", "stories.max_tokens=2"],
    ):
        process = run(*arguments, variables=variables)
        assert process.returncode == 0, process.stderr
        assert "ignored" not in process.stderr


@pytest.fixture
def one_core() -> Iterator[Path]:
    """A real cgroup of version 1 or 2 with a quota of one core."""
    root = Path("/sys/fs/cgroup")
    group = (root / "cpu" if (root / "cpu").is_dir() else root) / f"minigpt-{os.getpid()}"
    try:
        group.mkdir()
        if (group / "cpu.cfs_quota_us").exists():
            (group / "cpu.cfs_quota_us").write_text("100000")
        else:
            (group / "cpu.max").write_text("100000 100000")
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no cgroup with a quota: {error}")
    yield group
    group.rmdir()


NO_FSYNC = """
#include <errno.h>
int fsync(int fd) { errno = EINVAL; return -1; }
"""


def test_a_file_system_without_fsync_holds_a_whole_run(tiny, tmp_path):
    (tmp_path / "shim.c").write_text(NO_FSYNC)
    shim = str(tmp_path / "shim.so")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", shim, str(tmp_path / "shim.c")], check=True)
    trained = run("train.py", *tiny, "name=a", variables={"LD_PRELOAD": shim})
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "runs/a/checkpoints/best.ckpt").is_file()


def test_two_users_share_a_cache(owned, tmp_path):
    assert run("train.py", *owned, "name=a").returncode == 0  # as root
    shutil.rmtree(tmp_path / "runs")
    other = as_user("train.py", *owned, "name=b")
    assert other.returncode == 0, other.stderr
    check_error(as_user("train.py", *owned, "data.vocab_size=310"), "data.cache_dir")


def test_the_quota_of_a_cgroup_sets_the_threads(one_core, tiny):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    inside = ("sh", "-c", f'echo $$ > {one_core}/cgroup.procs; exec "$@"', "sh")
    facts = run("-m", "minigpt", "doctor", before=inside, variables={"OMP_NUM_THREADS": ""})
    assert "quota 1.0, 1 threads" in facts.stdout
    for setting, variable, threads in ((None, "", 1), (None, "2", 2), (3, "2", 3)):
        more = [] if setting is None else [f"trainer.threads={setting}"]
        variables = {"OMP_NUM_THREADS": variable}
        trained = run("train.py", *tiny, *more, before=inside, variables=variables)
        assert re.search(rf"device .*\b{threads} CPU thread", trained.stderr), trained.stderr


def test_a_user_without_a_temporary_folder_is_asked_for_one(owned, tmp_path):
    if any(ROOT.is_relative_to(folder) for folder in ("/tmp", "/var/tmp", "/usr/tmp")):
        pytest.skip("the checkout is in a temporary folder, which this test hides")
    script = (
        "mkdir -p /run/minigpt && mount -t tmpfs tmpfs /run/minigpt && "
        f"cp -a {tmp_path} /run/minigpt/run && chmod 755 /run/minigpt && "
        "for i in /tmp /var/tmp /usr/tmp; do [ ! -d $i ] || mount -t tmpfs -o ro tmpfs $i; done; "
        'exec "$@"'
    )
    moved = [word.replace(str(tmp_path), "/run/minigpt/run") for word in owned]
    before = ("unshare", "--mount", "sh", "-c", script, "sh", *AS_USER)
    trained = run("train.py", *moved, before=before, variables={"HOME": "/nonexistent"})
    if "unshare" in trained.stderr or "mount" in trained.stderr:
        pytest.skip(trained.stderr)
    check_error(trained, "TMPDIR")
    story = ["-m", "minigpt", "generate", "releases/small", "--max-tokens", "2"]
    check_error(run(*story, before=before), "TMPDIR")
    shown = run("train.py", "--help", before=before)
    assert (shown.returncode, shown.stderr) == (0, "")
    there = {"HOME": "/nonexistent", "TMPDIR": "/run/minigpt/run"}
    trained = run("train.py", *moved, before=before, variables=there)
    assert trained.returncode == 0, trained.stderr


def test_playground_as_user_beside_the_temporary_files_of_another(tiny_run: Path, tmp_path: Path):
    gradio = Path("/tmp/gradio")  # Gradio's default, which its first user owns
    existed = gradio.exists()
    gradio.mkdir(exist_ok=True)
    try:
        tmp_path.chmod(0o777)
        with playground([str(tiny_run), "--root-path", "/stories"], tmp_path, AS_USER) as served:
            check_served(served)
    finally:
        if not existed:
            shutil.rmtree(gradio)


def check_served(served: Served) -> None:
    """Check the answers of a playground to its own page and to pages of other sites."""
    with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as client:
        assert "/stories" in client.get("/").text
        inputs = {"data": ["Tom", 1.0, 0, 1.0, 0.0, 10, [], 4]}
        for headers in ({"Host": "rebound.example"}, {"Origin": "http://foreign.example"}):
            answer = client.post("/gradio_api/call/write", json=inputs, headers=headers)
            assert answer.status_code == 403
            assert "access-control-allow-origin" not in answer.headers
        event = client.post("/gradio_api/call/write", json=inputs).json()["event_id"]
        assert "event: complete" in client.get(f"/gradio_api/call/write/{event}").text
