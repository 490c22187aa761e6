"""What makes a run that was stopped and goes on equal to one that never stopped."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import Metric

from dpo_lightning.batch import Batch
from dpo_lightning.checkpoints.versions import versions
from dpo_lightning.modules.steps import PiecewiseModule
from dpo_lightning.ranks import data_place

SEED, VERSIONS, FIT_METRIC = "seed", "versions", "fit_metric"


class Standing(NamedTuple):
    """Where a run stands behind an optimizer step.

    Attributes:
        loops: Progress of the Trainer's loops, and the place in the data.
        metric: What the training metric has collected since the last log line.
    """

    loops: dict[str, Any]
    metric: dict[str, Tensor]


class ResumableModule(PiecewiseModule):
    """Noise that a batch's number fixes, and checkpoints that stand behind an optimizer step whenever they are made.

    A checkpoint that is made elsewhere, while gradients are accumulated or a batch is in use, holds the same weights
    as one behind the last optimizer step, but not the gradients that have been added up since: it is turned back to
    there, so that what goes on from it takes the same batches again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seed: int | None = None
        self._stepped_at = -1  # number of the batch behind which the last optimizer step was made
        self._standing: Standing | None = None
        self._loaded: dict[str, Any] = {}

    def metric(self, stage: str) -> Metric:
        """The metric that collects a stage: fit, validate or test."""
        raise NotImplementedError

    def on_train_start(self) -> None:
        """Agree on the seed of the noise, and take up the training metric where a checkpoint has left it."""
        if self._seed is None:
            self._seed = self.trainer.strategy.broadcast(torch.initial_seed())
        self._stepped_at, self._standing = self._batch_number, None
        loaded, self._loaded = self._loaded, {}
        if self.trainer.ckpt_path is not None and loaded.get("global_step"):
            self._take_up_metric(loaded[FIT_METRIC] or {})
            self._standing = Standing(loaded["loops"]["fit_loop"], self._collected())

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Dropout draws the same whatever was drawn before, in validation or in an earlier part of the run."""
        progress: Any = self.trainer.fit_loop.epoch_progress
        if progress.current.ready == progress.current.processed:
            # Lightning does not count the epoch that it begins when it resumes behind the last batch of another one;
            # what it resumes from a checkpoint of that epoch would then begin it again.
            progress.increment_ready()
            progress.increment_started()
        assert self._seed is not None
        torch.manual_seed(noise_seed(self._seed, self._batch_number, data_place(self.trainer).rank))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take note of the step."""
        super().optimizer_step(*args, **kwargs)
        self._stepped_at = self._batch_number

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Take note of where the step has left the run."""
        if self._stepped_at == self._batch_number:
            loops = self.trainer.fit_loop.state_dict()
            self._standing = Standing(loops, self._collected())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep seed, versions and training metric, and stand behind an optimizer step."""
        checkpoint[VERSIONS] = versions()
        checkpoint[SEED] = self._seed
        if self._trainer is None:
            return
        metric = self._collected()
        if self.trainer.state.fn == TrainerFn.FITTING and self._stepped_at != self._batch_number:
            if self._standing is None:
                del checkpoint["loops"]  # nothing is learned yet: what goes on from here begins at the beginning
                return
            checkpoint["loops"]["fit_loop"], metric = self._standing
        gathered = {name: self.all_gather(value.float()) for name, value in metric.items()}
        alike = self.trainer.world_size // data_place(self.trainer).ranks  # ranks, one behind the other, count the same
        checkpoint[FIT_METRIC] = {
            name: (value if alike == 1 else value[::alike]).tolist()  # type: ignore[union-attr]
            for name, value in gathered.items()
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the seed; the training metric follows when training begins."""
        self._seed = checkpoint.get(SEED)
        self._loaded = {name: checkpoint.get(name) for name in ("global_step", "loops", FIT_METRIC)}

    def _collected(self) -> dict[str, Tensor]:
        """What the training metric has collected on this rank."""
        state = self.metric("fit").metric_state
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    @property
    def _batch_number(self) -> int:
        """Number of the training batch in use, or of the last one, counted over all epochs."""
        return self.trainer.fit_loop.epoch_loop.total_batch_idx

    def _take_up_metric(self, states: dict[str, list]) -> None:
        """Each rank its own sums, or where there are other ranks now the first one those of all."""
        rank, ranks = data_place(self.trainer)
        for name, value in self._collected().items():
            saved = torch.tensor(states.get(name, []), device=self.device)
            if saved.shape == value.shape:  # one process gathers nothing
                saved = saved[None]
            if not len(saved) or saved.shape[1:] != value.shape:  # of another loss
                continue
            own = saved if len(saved) == ranks else [saved.sum(0), *[torch.zeros_like(value)] * (ranks - 1)]
            setattr(self.metric("fit"), name, own[rank])


def noise_seed(seed: int, batch: int, rank: int) -> int:
    """A seed for what is drawn in a training batch, unlike those of all other batches, ranks and runs.

    Args:
        seed: The run's.
        batch: Number of the batch, counted over all epochs.
        rank: Which share of the batch it is.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed} {batch} {rank}".encode(), digest_size=8).digest()) >> 1
