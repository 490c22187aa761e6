"""Sampling continuations: of prompts in memory, and of files."""

from dpo_lightning.generation.prompts import read_prompts
from dpo_lightning.generation.samples import Samples, read_samples
from dpo_lightning.generation.sampling import Continuation, sample

__all__ = ["Continuation", "Samples", "read_prompts", "read_samples", "sample"]
