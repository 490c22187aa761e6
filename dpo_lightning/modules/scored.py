"""What ``predict`` gives."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ScoredResponses(NamedTuple):
    """What ``predict`` gives for a batch.

    Attributes:
        row: Number of each example in its source, shape ``(B,)``.
        rewards: Reward of each response, 0 where it is absent, shape ``(B, K)``.
        length: Tokens of each response, 0 where it is absent, shape ``(B, K)``.
    """

    row: Tensor
    rewards: Tensor
    length: Tensor
