"""Examples held out of the training data, and validation examples that training sees."""

from __future__ import annotations

import numpy as np
import torch

from dpo_lightning.errors import UsageError

# The held-out share is the same whatever the seed of a run, so that runs can be compared.
SEED = 0


def held_out(prompts: np.ndarray, fraction: float) -> np.ndarray:
    """Which examples to hold out: all of some prompts, drawn at random.

    Args:
        prompts: What tells the prompt of each example from others, shape ``(N,)``.
        fraction: Share of the examples to hold out, at most: a prompt that is drawn is held out where it fits.

    Returns:
        True for those that are held out, shape ``(N,)``.

    Raises:
        UsageError: If that leaves one of the two parts empty.
    """
    _, prompt = np.unique(prompts, return_inverse=True)
    counts = np.bincount(prompt)
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(SEED)).numpy()
    room, chosen = round(fraction * len(prompts)), []
    for place, count in zip(order.tolist(), counts[order].tolist(), strict=True):
        if count <= room:
            room -= count
            chosen.append(place)
    held = np.isin(prompt, chosen)
    if not 0 < held.sum() < len(prompts):
        raise UsageError(
            f"`val_fraction` {fraction} of {len(prompts)} examples with {len(counts)} prompts holds out {held.sum()}; "
            "both parts need at least one."
        )
    return held


def shared_prompts(prompts: np.ndarray, others: np.ndarray) -> int:
    """How many of some examples have a prompt that stands among others."""
    return int(np.isin(prompts, others).sum())
