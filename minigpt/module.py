"""The LightningModule: loss, metrics, optimizer and learning-rate schedule around a GPT."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NoReturn

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from minigpt.config import UserError
from minigpt.model import GPT, IGNORE_INDEX, GPTConfig, perplexity

Batch = tuple[Tensor, Tensor]  # token ids (B, T) and targets (B, T), both int64


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: float | None = None  # at the peak; None: `default_lr` of the width
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.1  # on matrices alone: not on biases and norms
    warmup_steps: int = 500  # linear, from lr / warmup_steps
    final_lr: float = 0.0  # where the cosine ends, as a share of the peak
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping

    def __post_init__(self) -> None:
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"lr {self.lr} must be positive")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not in [0, 1)")
        for name in ("weight_decay", "warmup_steps", "grad_clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"final_lr {self.final_lr} is a share of the peak: between 0 and 1")


def default_lr(d_model: int) -> float:
    """Peak learning rate for a width: 4e-3 at 128, falling as 1 / d_model (Yang et al. 2022)."""
    return 4e-3 * 128 / d_model


def lr_factor(step: int, n_steps: int, warmup_steps: int, final_lr: float) -> float:
    """Share of the peak learning rate for update `step` (from 0) of `n_steps`.

    Rises linearly to 1 at update `warmup_steps - 1`, then follows half a cosine that would reach
    `final_lr` at update `n_steps`, so that the last update still moves the weights.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, n_steps - warmup_steps)
    return final_lr + (1 - final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class GPTModule(L.LightningModule):
    """Trains a GPT on windows of tokens; logs losses, perplexity and bits per byte.

    Args:
        model: shape of the net.
        optimizer: settings of AdamW and its schedule.
        n_steps: updates of the whole run: where the schedule ends.
        tokens_per_step: over all devices and accumulated batches.
        bytes_per_token: of the validation split, which turns nats per token into bits per byte.
        made_of: plain values to keep in each checkpoint, such as the tokenizer's fingerprint.
    """

    def __init__(
        self,
        model: GPTConfig,
        optimizer: OptimizerConfig,
        n_steps: int,
        tokens_per_step: int,
        bytes_per_token: float,
        made_of: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        # Plain values alone: a checkpoint is read with weights_only=True.
        self.save_hyperparameters(
            {
                "model": dataclasses.asdict(model),
                "optimizer": dataclasses.asdict(optimizer),
                "n_steps": n_steps,
                "tokens_per_step": tokens_per_step,
                **(made_of or {}),
            },
            logger=False,
        )
        self.net = GPT(model)
        self.settings = optimizer
        self.peak_lr = optimizer.lr if optimizer.lr is not None else default_lr(model.d_model)
        self.n_steps, self.tokens_per_step = n_steps, tokens_per_step
        self.bytes_per_token = bytes_per_token
        self.val_nats = MeanMetric()
        self._seed = torch.initial_seed()  # what `seed_everything` was given

    def configure_model(self) -> None:
        """Under FSDP each device keeps its share of the weights. Lightning calls it before fit."""
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        mesh = self.trainer.strategy.device_mesh["data_parallel"]
        for module in (*self.net.blocks, self.net):
            fully_shard(module, mesh=mesh)
        register_fsdp_forward_method(self.net, "loss")

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) for token ids (B, T)."""
        return self.net(ids)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of the batch in nats per token; stops the run when it is not finite."""
        if self.net.config.dropout:
            self._seed_dropout(batch_idx)
        loss = self.net.loss(*batch)
        mean = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
        assert isinstance(mean, Tensor)  # over the devices, which so stop together if they do
        self._check_finite("training", mean.item())
        steps = self.global_step + 1
        self.log("train/loss", mean)
        self.log("lr", self._lr())
        # Lightning takes the logged "step" as the row's x-axis: updates made, counted from 1.
        self.log_dict({"step": float(steps), "tokens": float(steps * self.tokens_per_step)})
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Has Lightning validate after the last step, whatever the validation interval."""
        if self.global_step >= self.n_steps:
            self.trainer.should_stop = True

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Gathers nats per token, weighted by the tokens that are scored."""
        loss = self.net.loss(*batch)
        n_scored = (batch[1] != IGNORE_INDEX).sum()
        if n_scored:
            self._check_finite("validation", loss.item())  # the metric would leave NaNs out
            self.val_nats.update(loss, weight=n_scored)

    def on_validation_epoch_end(self) -> None:
        """Loss, perplexity and bits per byte of the whole split."""
        nats = float(self.val_nats.compute())
        self.val_nats.reset()
        metrics = {
            "val/loss": nats,
            "val/perplexity": perplexity(nats),
            "val/bits_per_byte": nats / math.log(2) / self.bytes_per_token,
        }
        steps = float(self.global_step)
        # The metric is already gathered over the devices.
        self.log_dict(metrics, rank_zero_only=True)
        self.log_dict({"step": steps, "tokens": steps * self.tokens_per_step}, rank_zero_only=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW that decays matrices alone, and its schedule by step."""
        decay = [p for p in self.net.parameters() if p.dim() >= 2]
        plain = [p for p in self.net.parameters() if p.dim() < 2]
        c = self.settings
        optimizer = AdamW(
            [{"params": decay, "weight_decay": c.weight_decay}, {"params": plain}],
            lr=self.peak_lr,
            betas=(c.beta1, c.beta2),
            weight_decay=0.0,
            # A fused step unscales float16 gradients itself, after they should have been clipped.
            fused=getattr(self.trainer.precision_plugin, "scaler", None) is None,
        )
        schedule = LambdaLR(
            optimizer, lambda step: lr_factor(step, self.n_steps, c.warmup_steps, c.final_lr)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clips the norm of all gradients together, and logs what it was before."""
        limit = self.settings.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), limit)
        self.log("grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def check_weights(self) -> None:
        """UserError: a weight is not finite; the loss of the next step would not be either."""
        if not all(bool(weight.isfinite().all()) for weight in self.net.parameters()):
            self._diverged("weights became nan or infinite")

    def _check_finite(self, kind: str, loss: float) -> None:
        if not math.isfinite(loss):
            self._diverged(f"{kind} loss became {loss}")

    def _diverged(self, what: str) -> NoReturn:
        raise UserError(
            f"the {what} at step {self.global_step} with a learning rate of {self._lr():.2e}: try "
            f"optimizer.lr={self.peak_lr / 3:.0e} or a longer optimizer.warmup_steps"
        )

    def _seed_dropout(self, batch_idx: int) -> None:
        """Make dropout a function of the batch's number, so that a resumed run drops the same."""
        entropy = [self._seed, batch_idx, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))

    def _lr(self) -> float:
        return self.trainer.optimizers[0].param_groups[0]["lr"]
