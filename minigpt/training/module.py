"""The Lightning module: loss, metrics and optimizer of a GPT in training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NoReturn

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import SumMetric

from minigpt.core.settings import UserError
from minigpt.kernels.microbatch import Loss
from minigpt.model import GPT, IGNORE_INDEX, GPTConfig, perplexity
from minigpt.training.config import OptimizerConfig
from minigpt.training.optim import lr_factor, make_optimizer, peak_lrs, set_weight_decay

Batch = tuple[Tensor, Tensor]  # token ids (B, T) and targets (B, T), both int64


class GPTModule(L.LightningModule):
    """Lightning module that trains a GPT and logs losses, perplexity and bits per byte.

    Args:
        config: shape of the model.
        optimizer: settings of the optimizer and its schedule.
        n_steps: number of updates in the whole run; the learning-rate schedule ends there.
        tokens_per_step: number of training tokens in one update, over all devices and accumulated
            batches.
        bytes_per_token: mean number of bytes per token in the validation split, to convert nats
            per token to bits per byte.
        extra_hparams: additional plain values to store in each checkpoint, such as the tokenizer's
            fingerprint.
        factory: `GPT`, a class derived from it, or a function from `config` to a GPT.

    Attributes:
        train_loss: cross-entropy of the latest training batch in nats per token, as a tensor on the
            device; None before the first batch.
    """

    def __init__(
        self,
        config: GPTConfig,
        optimizer: OptimizerConfig,
        n_steps: int,
        tokens_per_step: int,
        bytes_per_token: float,
        extra_hparams: dict[str, Any] | None = None,
        factory: Callable[[Any], GPT] = GPT,
    ) -> None:
        super().__init__()
        sections = {"model": dataclasses.asdict(config), "optimizer": dataclasses.asdict(optimizer)}
        steps = {"n_steps": n_steps, "tokens_per_step": tokens_per_step}
        # Only plain values, because checkpoints are read with weights_only=True.
        self.save_hyperparameters({**sections, **steps, **(extra_hparams or {})}, logger=False)
        self.net = factory(config)  # "net" is part of the names of weights in checkpoints
        self.fast_loss: Loss | None = None  # a faster computation of `net.loss`
        self.distillation: Loss | None = None  # the training loss of a student, `Distillation`
        self.teachers: list[GPT] = []  # in a list, so that they are not part of this module
        self.graphed_updates = False  # whether Muon replays CUDA graphs
        self.settings = optimizer
        self.peak_lrs = peak_lrs(optimizer, config.d_model, tokens_per_step)
        self.n_steps, self.tokens_per_step = n_steps, tokens_per_step
        self.bytes_per_token = bytes_per_token
        self.train_loss: Tensor | None = None
        self._loss_sum: Tensor | None = None  # since the last check; nan or inf if any loss is
        # Without torchmetrics' own check for NaNs, which would wait for the device.
        self.val_nats = SumMetric(nan_strategy="disable")
        self.val_tokens = SumMetric(nan_strategy="disable")
        self._seed = torch.initial_seed()  # the argument of `seed_everything`

    def configure_model(self) -> None:
        """Shard the weights over the devices under FSDP; Lightning calls this before training."""
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        mesh = self.trainer.strategy.device_mesh["data_parallel"]
        for module in (*self.net.blocks, self.net):
            fully_shard(module, mesh=mesh)
        register_fsdp_forward_method(self.net, "loss")

    def on_fit_start(self) -> None:
        """Move the teachers to the device of the model."""
        for teacher in self.teachers:
            teacher.to(self.device)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits (B, T, V) of token ids (B, T)."""
        return self.net(ids)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss for ids (B, T) and targets (B, T), in nats per token."""
        return (self.fast_loss or self.net.loss)(ids, targets)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the training loss in nats per token.

        With teachers, this is the objective of `Distillation`. The logged `train/loss` is always
        the cross-entropy. A step without a row in metrics.csv does not wait for the device.

        Raises:
            UserError: the step has a row, and a loss since the previous row is not finite.
        """
        if self.net.config.dropout:
            self._seed_dropout(batch_idx)
        losses = (self.distillation or self.loss)(*batch).reshape(-1)
        means = self.trainer.strategy.reduce(losses.detach().clone(), reduce_op="mean")
        assert isinstance(means, Tensor)  # averaged over ranks so that all ranks stop together
        self._loss_sum = means[0] if self._loss_sum is None else self._loss_sum + means[0]
        self.train_loss = means[1 if self.distillation else 0]  # the cross-entropy
        steps = self.global_step + 1
        if self.has_row(steps):
            self._check_loss()
            self.log("train/loss", self.train_loss)
            if self.distillation:
                self.log("train/divergence", means[2])
            self.log("lr", self._lr())
            # Lightning uses the logged "step" as the row's x-axis: the number of updates so far.
            self.log_dict({"step": float(steps), "tokens": float(steps * self.tokens_per_step)})
        return losses[0]

    def has_row(self, step: int) -> bool:
        """Return whether update `step`, counted from 1, has a training row in metrics.csv.

        The last update has a row, and so has each update whose number is a multiple of
        `log_every_n_steps`. Other updates have none, because a `log` call takes 0.5 ms.
        """
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return step % every == 0 or step >= self.n_steps

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop after the last step; Lightning then validates, even if no validation is due."""
        if self.global_step >= self.n_steps:
            self.trainer.should_stop = True

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the validation loss, the mean over the scored targets of all batches."""
        loss = self.loss(*batch)
        n_scored = (batch[1] != IGNORE_INDEX).sum()
        self.val_nats.update(torch.where(n_scored > 0, loss * n_scored, 0.0))
        self.val_tokens.update(n_scored)

    def on_validation_epoch_end(self) -> None:
        """Log loss, perplexity and bits per byte of the whole validation split.

        Raises:
            UserError: the loss is not finite.
        """
        nats = float(self.val_nats.compute() / self.val_tokens.compute())
        self._check_finite("validation", nats)
        self.val_nats.reset()
        self.val_tokens.reset()
        metrics = {
            "val/loss": nats,
            "val/perplexity": perplexity(nats),
            "val/bits_per_byte": nats / math.log(2) / self.bytes_per_token,
        }
        steps = float(self.global_step)
        metrics |= {"step": steps, "tokens": steps * self.tokens_per_step}
        self.log_dict(metrics, rank_zero_only=True)  # already gathered over the devices

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer and its learning-rate schedule, which advances with each update."""
        c = self.settings
        # A fused step would unscale float16 gradients itself, which is too late for clipping.
        fused = getattr(self.trainer.precision_plugin, "scaler", None) is None
        dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else torch.float32
        optimizer = make_optimizer(self.net, c, self.peak_lrs, fused, dtype, self.graphed_updates)

        end, *ends = c.decay_ends(self.n_steps)
        warmup = c.n_warmup_steps(self.tokens_per_step)

        def factor(step: int) -> float:
            return lr_factor(step, end, warmup, c.final_lr, c.schedule, ends, c.cycle_lr)

        schedule = LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Set the weight decay for the next update, because it may change during the run."""
        set_weight_decay(optimizer, self.settings, self.global_step, self.n_steps)

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clip the total norm of the gradients, and log the norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.grad_clip or math.inf)
        if self.has_row(self.global_step + 1):
            self.log("grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def check_weights(self) -> None:
        """Raise UserError if a weight, or a training loss since the last check, is not finite."""
        self._check_loss()
        if not all(bool(weight.isfinite().all()) for weight in self.net.parameters()):
            self._diverged("weights became nan or infinite")

    def _check_loss(self) -> None:
        """Raise UserError if a training loss since the last check is not finite."""
        if self._loss_sum is not None:
            total, self._loss_sum = self._loss_sum.item(), None
            self._check_finite("training", total)

    def _check_finite(self, kind: str, loss: float) -> None:
        if not math.isfinite(loss):
            self._diverged(f"{kind} loss became {loss}")

    def _diverged(self, event: str) -> NoReturn:
        warmup = "steps" if self.settings.warmup_tokens is None else "tokens"
        raise UserError(
            f"the {event} at step {self.global_step} with a learning rate of {self._lr():.2e}: try "
            f"more optimizer.warmup_{warmup}, or a third of the peak learning rate",
            fix={f"optimizer.{name}": float(f"{lr / 3:.0e}") for name, lr in self.peak_lrs.items()},
        )

    def _seed_dropout(self, batch_idx: int) -> None:
        """Seed dropout from run seed, batch and rank, so that resuming does not change dropout."""
        entropy = [self._seed, batch_idx, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))

    def _lr(self) -> float:
        return self.trainer.optimizers[0].param_groups[0]["lr"]
