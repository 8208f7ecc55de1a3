"""Mean of the weights at the ends of learning-rate decays, for runs with cycles."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from minigpt.training.module import GPTModule


class CycleMean(Callback):
    """After the last step, set the weights to the mean over the ends of all learning-rate decays.

    The learning rate has a main decay and one more decay in each cycle, as in snapshot ensembles
    (Huang et al. 2017, arXiv:1704.00109). Here the weights are averaged instead of the predictions
    (Izmailov et al. 2018, arXiv:1803.05407). The steps at which decays end are fixed before the
    run, so they do not depend on the validation loss. The sums of the weights are computed in
    float32 on the device, in the order of the steps, and stored in checkpoints.

    Args:
        module: the model in training. Each process must have all weights, so fsdp is excluded.
    """

    def __init__(self, module: GPTModule) -> None:
        self.module, self.ends = module, module.settings.decay_ends(module.n_steps)
        self._n = 0  # number of ends so far
        self._sums: dict[str, Tensor] = {}  # of the weights at these ends, by parameter name

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """At the end of a learning-rate decay, add the weights to the sums over all decays so far.

        At the end of the last decay, set the weights of the model to the mean: the sums divided by
        the number of decays.
        """
        # With accumulated batches, this hook is called several times after the same step.
        if trainer.global_step not in self.ends[self._n :]:
            return
        self._n += 1
        for name, weight in self.module.net.named_parameters():
            weights = weight.to(torch.float32, copy=True)  # on its device, without waiting for it
            if name in self._sums:  # from a checkpoint, it may be on another device
                weights += self._sums[name].to(weights.device)
            self._sums[name] = weights
        if self._n == len(self.ends):
            for name, weight in self.module.net.named_parameters():
                weight.copy_(self._sums[name] / self._n)
            self._sums = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state to store in a checkpoint."""
        return {"n": self._n, "sums": self._sums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the sums of the weights from a checkpoint."""
        self._n, self._sums = state_dict["n"], state_dict["sums"]
