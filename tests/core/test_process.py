"""The state of the process before and after a training."""

import logging
import os
import random
import signal
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

import minigpt
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
    }


class Fail(Callback):
    """Raises at the end of the fifth batch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("power failure")


@pytest.mark.parametrize("fails", [False, True])
def test_training_leaves_the_process_as_it_was(tiny: list[str], fails: bool):
    config = composed(tiny)
    before = state_of_the_process()
    if fails:
        with pytest.raises(RuntimeError, match="power failure"):
            minigpt.train(config, callbacks=[Fail()])
    else:
        minigpt.train(config)
    after = state_of_the_process()
    assert {key: after[key] for key in before if after[key] != before[key]} == {}
