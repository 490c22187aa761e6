"""Which share of a global batch a process has."""

from __future__ import annotations

from typing import NamedTuple

from lightning.pytorch import Trainer


class DataPlace(NamedTuple):
    """The place of a process among those that have batches of their own.

    Attributes:
        rank: Which of them it is; ranks that share the products of one model, by tensor parallelism, are one.
        ranks: Their number.
    """

    rank: int
    ranks: int


def data_place(trainer: Trainer) -> DataPlace:
    """That of this process in a run."""
    found = getattr(trainer.strategy, "distributed_sampler_kwargs", {"rank": 0, "num_replicas": 1})
    return DataPlace(found["rank"], found["num_replicas"])
