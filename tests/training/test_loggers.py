import os
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from wandb.errors import UsageError

from minigpt.core.settings import UserError
from minigpt.runs.records import read_metrics
from minigpt.training.config import LoggerConfig
from minigpt.training.loggers import COLUMNS, MetricsCsv, extra_loggers, forget_wandb_run


def test_metrics_csv_rows_are_on_disk_as_soon_as_they_are_logged(tmp_path):
    logger = MetricsCsv(tmp_path / "metrics.csv")
    logger.log_metrics({"tokens": 104_000_000.0, "train/loss": 2.5, "epoch": 0.0}, step=10)
    logger.log_metrics({"tokens": 104_008_192.0, "val/loss": 2.25}, step=11)
    rows = read_metrics(tmp_path)
    assert rows == [
        {"step": 10, "tokens": 104_000_000, "train/loss": 2.5},
        {"step": 11, "tokens": 104_008_192, "val/loss": 2.25},
    ]


def test_new_metric_adds_a_column_and_keeps_the_rows(tmp_path):
    path = tmp_path / "metrics.csv"
    logger = MetricsCsv(path)
    logger.log_metrics({"tokens": 1.0, "lr": 0.1}, step=1)
    logger.log_metrics({"tokens": 2.0, "mine": 7.0}, step=2)
    assert path.read_text().splitlines()[0] == ",".join([*COLUMNS, "mine"])
    assert read_metrics(tmp_path)[0]["lr"] == 0.1
    assert read_metrics(tmp_path)[1]["mine"] == 7.0


def test_resumed_run_drops_the_rows_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.csv"
    logger = MetricsCsv(path)
    for step in (10, 20, 30):
        logger.log_metrics({"tokens": step * 8.0}, step=step)
    with path.open("a") as file:
        file.write("4")  # a kill in the middle of a row: not step 4
    MetricsCsv(path, resume_step=20).log_metrics({"tokens": 240.0}, step=30)
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30]


def test_resumed_run_repeats_the_validation_in_which_it_was_stopped(tmp_path):
    path = tmp_path / "metrics.csv"
    logger = MetricsCsv(path)
    for step in (10, 20):
        logger.log_metrics({"tokens": step * 8.0}, step=step)
        logger.log_metrics({"tokens": step * 8.0, "val/loss": 2.0}, step=step)
    MetricsCsv(path, resume_step=20, validates=True)
    validated = [(row["step"], "val/loss" in row) for row in read_metrics(tmp_path)]
    assert validated == [(10, False), (10, True), (20, False)]


def test_new_run_replaces_an_existing_metrics_csv(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsCsv(path).log_metrics({"tokens": 8.0}, step=1)
    MetricsCsv(path)
    assert read_metrics(tmp_path) == []


@pytest.fixture
def wandb_runs(monkeypatch) -> list[dict[str, Any]]:
    """Return the arguments of `wandb.init` for each W&B run; nothing is started."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)

    def setup() -> SimpleNamespace:
        settings = wandb.Settings()
        settings.update_from_env_vars(dict(os.environ))
        return SimpleNamespace(settings=settings)

    runs: list[dict[str, Any]] = []

    def init(**arguments: Any) -> Any:
        if "/" in arguments["id"]:
            raise UsageError("invalid run id")
        runs.append(arguments)
        return SimpleNamespace(define_metric=lambda *_, **__: None)

    monkeypatch.setattr(wandb, "setup", setup)
    monkeypatch.setattr(wandb, "login", lambda prompt: True)
    monkeypatch.setattr(wandb, "init", init)
    return runs


VARIABLES = {
    "WANDB_PROJECT": "p", "WANDB_ENTITY": "e", "WANDB_MODE": "disabled", "WANDB_RUN_GROUP": "g",
    "WANDB_NAME": "n", "WANDB_RUN_ID": "i",
}  # fmt: skip


@pytest.mark.parametrize("typed", [False, True], ids=["variables", "settings"])
def test_wandb_settings_rule_over_the_variables(wandb_runs, monkeypatch, tmp_path, typed):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    settings: dict[str, Any] = {}
    if typed:
        settings = {"project": "P", "entity": "E", "mode": "offline", "group": "G"}
    extra_loggers(tmp_path, LoggerConfig("wandb", **settings))
    extra_loggers(tmp_path, LoggerConfig("wandb", **settings))  # resumed
    expected = {"project": "p", "mode": "disabled", "entity": None, "group": None} | settings
    for run in wandb_runs:
        assert {name: run[name] for name in expected} == expected  # wandb reads the rest itself
    assert [(run["id"], run["name"]) for run in wandb_runs] == [("i", "n"), ("i", None)]


def test_wandb_project_and_name_without_variables(wandb_runs, tmp_path):
    extra_loggers(tmp_path, LoggerConfig("wandb"))
    (run,) = wandb_runs
    assert (run["project"], run["name"], run["mode"]) == ("mini-gpt", tmp_path.name, "online")


@pytest.mark.parametrize(("name", "value"), [("WANDB_MODE", "on"), ("WANDB_RUN_ID", "a/b")])
def test_a_wrong_wandb_variable_is_an_error(wandb_runs, monkeypatch, tmp_path, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="WANDB_"):
        extra_loggers(tmp_path, LoggerConfig("wandb"))
    assert list(tmp_path.iterdir()) == []  # so that the next try takes the corrected id


def test_wandb_name_and_id_are_ignored_in_a_multirun(monkeypatch, caplog):
    monkeypatch.setattr(os, "environ", dict(VARIABLES))
    forget_wandb_run()
    forget_wandb_run()
    assert os.environ.keys() == VARIABLES.keys() - {"WANDB_NAME", "WANDB_RUN_ID"}
    assert len(caplog.messages) == 2
