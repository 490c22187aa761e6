"""No update that is not finite: it is suppressed on the device, and the run stops.

Whether the gradient of a step is finite is known to the device alone. Optimizers of torch that are fused are told
there, and leave weights and state as they are; the host reads the same number one step later, when it has long come
over, so that no step waits. Other optimizers do not listen: for them the host reads it before the step, which on a GPU
is one wait a step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Optimizer

from dpo_lightning.batch import Batch
from dpo_lightning.modules.nonfinite import NonFinite, Run, Scores, Trace, explained


class Number:
    """A number of the device on its way to the host.

    Args:
        value: The number.
    """

    def __init__(self, value: Tensor) -> None:
        self._host = torch.empty((), pin_memory=value.is_cuda)
        self._host.copy_(value.float(), non_blocking=True)
        self._arrival = torch.cuda.Event() if value.is_cuda else None
        if self._arrival is not None:
            self._arrival.record()

    def read(self) -> float:
        """The number; waits for nothing that the device was given to do after it."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return float(self._host.numpy())


class Guard:
    """Follows the batches of a step and the norm of its gradient.

    Args:
        scored: What responses are scored by, where there is no reference.
    """

    def __init__(self, scored: str = "log pi") -> None:
        self.scored = scored
        self.error: NonFinite | None = None
        self._run: Run | None = None
        self._window: list[Trace] = []
        self._pending: tuple[int, list[Trace], Number] | None = None

    def start(self, run: Run) -> None:
        """Another fit."""
        self._run, self._window, self._pending, self.error = run, [], None, None

    def begin(self, batch: Batch) -> None:
        """A batch of the step in hand."""
        self._window.append(Trace(batch))

    def note_scores(self, row: Tensor, policy: Tensor, reference: Tensor | None) -> None:
        """What was found for a piece of the last batch."""
        if self._window:
            reference = None if reference is None else reference.detach()
            self._window[-1].scores.append(Scores(row, policy.detach(), reference))

    def note_loss(self, loss: Tensor, num_losses: Tensor | float) -> None:
        """The loss of the last batch, as far as it has been run, and what its sum was divided by."""
        if self._window:
            self._window[-1].loss, self._window[-1].num_losses = loss.detach(), num_losses

    def let_pass(self) -> None:
        """The step in hand is another's to judge."""
        self._window = []

    def watch(self, norm: Tensor, optimizer: Optimizer, step: int) -> None:
        """Have the optimizer leave all as it is where the norm of its gradient is not finite; called inside its step.

        Args:
            norm: Norm of the gradient, the same on all ranks.
            optimizer: The optimizer.
            step: The optimizer step, counted from 1.

        Raises:
            NonFinite: If this step's is not and the optimizer cannot be told, or that of the step before was not.
        """
        self.check()
        self._pending, self._window = (step, self._window, Number(norm)), []
        if reads_late(norm, optimizer):
            optimizer.found_inf = norm.isfinite().logical_not().float()  # type: ignore[attr-defined]
        else:
            self.check()

    def check(self) -> None:
        """Find out about the last step; nothing may be saved, and no other step be taken, before.

        Raises:
            NonFinite: If its gradient was not finite, now and ever after.
        """
        if self.error is not None:
            raise self.error
        pending, self._pending = self._pending, None
        if pending is None:
            return
        step, window, number = pending
        norm = number.read()
        if not math.isfinite(norm):
            self._stop(step, window, norm)

    def _stop(self, step: int, window: list[Trace], norm: float) -> None:
        assert self._run is not None
        self.error = explained(self._run, step, window, norm, self.scored)
        self._run.barrier()  # or who comes first would end the others before they have saved theirs
        raise self.error


def reads_late(norm: Tensor, optimizer: Optimizer) -> bool:
    """Whether the host may learn of a step behind it, because the optimizer is told on the device."""
    # Others have taken over the mark of these, but not what it means.
    return norm.is_cuda and takes_flag(optimizer)


def takes_flag(optimizer: Optimizer) -> bool:
    """Whether an optimizer skips a step by ``found_inf``, a number on the device."""
    return isinstance(optimizer, (Adam, SGD, Adagrad)) and getattr(optimizer, "_step_supports_amp_scaling", False)
