"""A GPT that also predicts the tokens two and three ahead through the same head, less and less."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minigpt.kernels.cross_entropy import chunked_cross_entropy
from minigpt.model import GPT, IGNORE_INDEX, GPTConfig


@dataclass(frozen=True)
class LookAheadConfig(GPTConfig):
    steps: int = 2294
    """Updates of the run; the weight of the further targets falls to zero after 66 % of them."""
    further: float = 0.5
    """Weight of the target two ahead at the start; that of the third is half of it."""


class LookAhead(GPT):
    config_class = LookAheadConfig
    calls = 0

    def loss(self, ids, targets):
        hidden, weight = self.hidden(ids), self.embedding.weight
        total = chunked_cross_entropy(hidden, weight, targets)
        if not torch.is_grad_enabled():
            return total
        self.calls += 1  # one call per update: batch 8, one thread
        left = max(0.0, 1 - self.calls / (0.66 * self.config.steps))
        for ahead in (1, 2) if left else ():
            later = F.pad(targets[:, ahead:], (0, ahead), value=IGNORE_INDEX)
            total = total + left * self.config.further / ahead * chunked_cross_entropy(hidden, weight, later)
        return total
