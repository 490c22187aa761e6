"""How the learning rate changes with optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def lr_factor(step: int, warmup_steps: int, schedule: Schedule, num_steps: Callable[[], float]) -> float:
    """Factor of the learning rate: it rises linearly, then stays, or falls to 0 at the last step.

    Args:
        step: Optimizer steps done.
        warmup_steps: Steps over which it rises.
        schedule: What it does then.
        num_steps: All steps of the run; called where the factor depends on them, and not before.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant" or step == warmup_steps:
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, num_steps() - warmup_steps))
    return 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
