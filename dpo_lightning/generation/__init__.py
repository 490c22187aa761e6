"""Sampling continuations."""

from dpo_lightning.generation.sampling import Continuation, sample

__all__ = ["Continuation", "sample"]
