from minigpt.runs.records import read_metrics
from minigpt.training.loggers import COLUMNS, MetricsCsv


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
