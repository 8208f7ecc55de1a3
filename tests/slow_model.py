"""A model that waits or fails in some process of a run; `model.class_path` names it."""

import os
import time

import torch

from minigpt.core.settings import UserError
from minigpt.model import GPT, KVCache


class SlowGPT(GPT):
    """A GPT that does what the variable SLOW names.

    validation: print a line and wait a minute. step: the same at the sixth pass in training.
    error: raise UserError there, in the second process alone.
    """

    n_passes = 0

    def forward(self, ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Return the logits of a GPT."""
        case = os.environ["SLOW"]
        self.n_passes += self.training
        at_sixth = self.training and self.n_passes == 6
        if (case == "step" and at_sixth) or (case == "validation" and not self.training):
            print("busy", flush=True)
            time.sleep(60)
        if case == "error" and at_sixth and os.environ.get("LOCAL_RANK") == "1":
            raise UserError("is wrong", "data.batch_size", 4)
        return super().forward(ids, cache)
