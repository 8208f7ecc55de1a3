"""Run folders of a sweep over three sizes, and of one over five sizes on a known law."""

import math
from pathlib import Path
from typing import Any

import pytest

from minigpt.scaling.results import RunResult, find_runs, read_run
from tests.run_folder import SUMMARY, write_run

SIZES = {"small": 1_046_656, "medium": 3_404_032, "large": 7_072_128}
WIDTHS = (138_784, 359_488, 662_112, 1_046_656, 2_061_504)


def sized(model: str, perplexity: float, **more: Any) -> dict[str, Any]:
    """Return the summary of a run of that size and perplexity."""
    numbers = {"model": model, "parameters": SIZES[model], "val/perplexity": perplexity}
    return SUMMARY | numbers | more


def results(folder: Path) -> list[RunResult]:
    """Return the results of all runs below `folder`."""
    return [read_run(run) for run in find_runs([folder])]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Four finished runs of three sizes and one interrupted run, not in order of size."""
    write_run(tmp_path / "a", sized("large", 9.0))
    write_run(tmp_path / "multirun" / "0", sized("small", 20.0), seed=2)
    write_run(tmp_path / "multirun" / "1", sized("medium", 11.0))
    write_run(tmp_path / "b", sized("small", 16.0), seed=1)
    write_run(tmp_path / "c", sized("large", 99.0, status="interrupted"), seed=2)
    return tmp_path


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Five sizes on the law L = 1.2 + 800 / N^0.5, seeds 0.02 apart, but the largest 0.2 above."""
    for i, n in enumerate(WIDTHS):
        for seed in (1, 2) if n < 2e6 else (1,):
            loss = 1.2 + 800 * n**-0.5 + 0.01 * (-1) ** seed + 0.2 * (n > 2e6)
            more = {
                "model": f"w{i}",
                "parameters": n,
                "non_embedding_parameters": n // 2,
                "val/loss": loss,
                "val/perplexity": math.exp(loss),
                "best_val_loss": loss - 0.03,
                "train_tokens": 32_768,
                "flops_per_token": 6 * n,
            }
            folder = write_run(tmp_path / f"w{i}-seed{seed}", SUMMARY | more, seed=seed)
            late = f"50,400000,{loss - 0.1 * i},{loss},,,21000,0\n"
            with (folder / "metrics.csv").open("a") as file:
                file.write(late)
    return tmp_path
