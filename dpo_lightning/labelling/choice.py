"""Which responses of a prompt are compared."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from dpo_lightning.errors import UsageError
from dpo_lightning.labelling.groups import Group


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which pairs of a prompt's responses are compared.

    Args:
        pairs: All of them, that of the best and the worst by score, or some at random.
        num_pairs: How many at random.
        seed: Seed of that.
    """

    pairs: Literal["all", "best_worst", "random"] = "all"
    num_pairs: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.num_pairs is not None) != (self.pairs == "random"):
            raise UsageError(
                "`num_pairs` is how many pairs a prompt `pairs: random` takes; give both, or neither. Got `pairs` "
                f"{self.pairs} and `num_pairs` {self.num_pairs}."
            )
        if self.num_pairs is not None and self.num_pairs < 1:
            raise UsageError(f"`num_pairs` must be 1 or more, got {self.num_pairs}.")

    def of(self, group: Group, scores: Sequence[float] | None) -> list[tuple[int, int]]:
        """Places of the responses that are compared, the smaller place of each pair first.

        Args:
            group: Responses.
            scores: Their scores, which the best and the worst need.
        """
        places = range(len(group.responses))
        if self.pairs == "best_worst":
            assert scores is not None
            best = max(places, key=lambda place: scores[place])
            worst = min(places, key=lambda place: (scores[place], -place))
            return [(min(best, worst), max(best, worst))]
        every = list(combinations(places, 2))
        if self.num_pairs is None or self.num_pairs >= len(every):
            return every
        return sorted(random.Random(f"{self.seed}/{group.key}").sample(every, self.num_pairs))
