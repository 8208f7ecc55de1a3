"""The state of the process before and after a training."""

import csv
import logging
import os
import random
import signal
import warnings

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback

import minigpt
from minigpt.core.process import preserved_process
from tests.conftest import composed


def state_of_the_process() -> dict:
    names = ("", "minigpt", "lightning.pytorch", "lightning.fabric")
    loggers = [logging.getLogger(name) for name in names]
    return {
        "warnings": list(warnings.filters),
        "logging": [(logger.level, list(logger.handlers)) for logger in loggers],
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "matmul": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "csv": csv.field_size_limit(),
        "rank": getattr(rank_zero_only, "rank"),  # noqa: B009 (set by Lightning on the function)
    }


class Fail(Callback):
    """Raises at the end of the fifth batch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("power failure")


@pytest.mark.parametrize("fails", [False, True])
def test_training_leaves_the_process_as_it_was(tiny: list[str], fails: bool, monkeypatch):
    config = composed([*tiny, "budget.tokens=640"])
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    before = state_of_the_process()
    if fails:
        with pytest.raises(RuntimeError, match="power failure"):
            minigpt.train(config, callbacks=[Fail()])
    else:
        minigpt.train(config)
    after = state_of_the_process()
    assert {key: after[key] for key in before if after[key] != before[key]} == {}


def test_size_limit_of_csv_fields_is_restored():
    before = csv.field_size_limit()
    with preserved_process():
        csv.field_size_limit(7)
    assert csv.field_size_limit() == before


def test_cuda_that_is_not_initialised_gets_the_earlier_seed(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    with preserved_process():
        torch.manual_seed(7)
        with preserved_process():
            torch.manual_seed(8)
        assert seeds == [7, 8, 7]


def test_the_random_states_of_gpus_are_restored(monkeypatch):
    states = {"cuda": "before", "mps": "before"}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states["cuda"])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda new: states.update(cuda=new))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states["mps"])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new: states.update(mps=new))
    with preserved_process():
        states.update(cuda="training", mps="training")
    assert states == {"cuda": "before", "mps": "before"}
