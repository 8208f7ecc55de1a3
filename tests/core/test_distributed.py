"""Names and folders of runs in several processes, as torchrun or srun starts them."""

from pathlib import Path

import pytest

from minigpt.core.distributed import global_rank
from minigpt.core.settings import UserError
from minigpt.runs.folder import new_run_folder
from tests.conftest import naming, trained_folder


def test_run_under_srun_is_named_by_job_and_step(tiny: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    for name in ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    folder = trained_folder([*tiny, "resume=auto"])
    assert folder.name == "small-71.0"
    assert trained_folder([*tiny, "resume=auto"]) == folder  # queued again


def test_new_run_folder_of_rank_0_is_shared_by_all_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("MINIGPT_RUN_FOLDER", "none yet")  # is put back at the end
    first = new_run_folder(tmp_path, None, "small")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("MINIGPT_STARTED", "1")
    assert (global_rank(), new_run_folder(tmp_path, None, "small")) == (1, first)
    monkeypatch.delenv("MINIGPT_RUN_FOLDER")
    assert new_run_folder(tmp_path, "mine", "small") == tmp_path / "mine"
    with pytest.raises(UserError, match=naming("name")):
        new_run_folder(tmp_path, None, "small")
