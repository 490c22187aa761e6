"""The optimizer of a policy, its schedule in steps, and the norm of its gradients."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from dpo_lightning.errors import UsageError
from dpo_lightning.models.policy import CausalPolicy
from dpo_lightning.modules.gradients import clip_by_norm, clip_by_value, gradients_of, total_norm
from dpo_lightning.modules.resumption import ResumableModule
from dpo_lightning.modules.schedule import Schedule, lr_factor

DEFAULT_LR = 1e-6  # DPO, arXiv:2305.18290, appendix B


class OptimisedModule(ResumableModule):
    """A policy whose trainable weights have an optimizer and a schedule in steps.

    Args:
        lr: Learning rate of the default optimizer, fused AdamW without weight decay; 1e-6 where nothing is given.
        warmup_steps: Optimizer steps over which the learning rate rises linearly.
        schedule: What the learning rate does after warm-up: stay, or fall to 0 at the last step.
        optimizer: Another optimizer, with its learning rate.
        lr_scheduler: Another schedule, in steps; replaces warmup_steps and schedule.
    """

    policy: CausalPolicy | None

    def __init__(
        self,
        lr: float | None,
        warmup_steps: int,
        schedule: Schedule,
        optimizer: OptimizerCallable | None,
        lr_scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__()
        if optimizer is not None and lr is not None:
            raise UsageError("Both `lr` and `optimizer` are given; set the learning rate in `optimizer.init_args.lr`.")
        if lr_scheduler is not None and (warmup_steps or schedule != "constant"):
            raise UsageError("Both `lr_scheduler` and `warmup_steps` or `schedule` are given; keep one of the two.")
        if lr is not None and lr <= 0:
            raise UsageError(f"`lr` must be positive, got {lr}; DPO uses about {DEFAULT_LR}.")
        if warmup_steps < 0:
            raise UsageError(f"`warmup_steps` must be 0 or more, got {warmup_steps}.")
        self.lr = DEFAULT_LR if lr is None else lr
        self.warmup_steps, self.schedule = warmup_steps, schedule
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        self._gradient_norm: Tensor | None = None

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW without weight decay and a schedule in steps, or what was given."""
        assert self.policy is not None
        if self.schedule != "constant" and self.trainer.max_steps == -1 and self.trainer.max_epochs == -1:
            raise UsageError(f"`schedule: {self.schedule}` needs an end; set `trainer.max_steps` or `max_epochs`.")
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        if self.make_optimizer is None:
            # Lightning clips no fused optimizer under fp16: those undo the scaling of the loss by themselves.
            fused = not self.scales_loss
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.0, fused=fused)
        else:
            optimizer = self.make_optimizer(parameters)
        if self.make_lr_scheduler is None:
            scheduler: Any = LambdaLR(optimizer, lambda step: self._lr_factor(step))
        else:
            scheduler = self.make_lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def find_gradient_norm(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Norm of the gradient of a step before it is clipped, over all ranks; clipping takes it up."""
        self._gradient_norm = total_norm(gradients_of(optimizer))
        return self._gradient_norm

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer says, also where Lightning refuses: fused optimizers, weights divided among devices."""
        norm, self._gradient_norm = self._gradient_norm, None
        if self.scales_loss:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val and gradient_clip_algorithm == "value":
            clip_by_value(gradients_of(optimizer), gradient_clip_val)
        elif gradient_clip_val:
            gradients = gradients_of(optimizer)
            clip_by_norm(gradients, gradient_clip_val, total_norm(gradients) if norm is None else norm)

    @property
    def scales_loss(self) -> bool:
        """Whether gradients are those of a scaled loss, as under fp16."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def _lr_factor(self, step: int) -> float:
        # The number of steps is asked for where it matters, never in `configure_optimizers`: asking sets up the data
        # loaders, and there that would lose the state from which they resume.
        return lr_factor(step, self.warmup_steps, self.schedule, lambda: self.trainer.estimated_stepping_batches)
