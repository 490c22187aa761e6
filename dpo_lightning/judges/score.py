"""A scorer as a judge."""

# Annotations are not postponed: jsonargparse reads those of a base class with the names of the subclass's file.
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_lightning.errors import UsageError
from dpo_lightning.judges.base import Comparison, Judge
from dpo_lightning.scorers import ScoreBook, Scorer

AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class ByScore(Judge):
    """The response with the higher score is better: a judge without a network.

    Args:
        scorer: What gives the scores.
        margin: Scores that differ by no more than this tie.
    """

    scorer: Scorer
    margin: float = 0.0

    def __post_init__(self) -> None:
        if not self.margin >= 0:
            raise UsageError(f"`margin` must not be negative, got {self.margin}.")

    def compare(self, comparisons: Sequence[Comparison], answers: Path | None = None) -> list[float | None]:
        """1 where the first has the higher score, 0 where the second has, one half where they tie."""
        verdicts: list[float | None] = []
        with ScoreBook(self.scorer, answers) as book:
            for start in range(0, len(comparisons), AT_ONCE):
                some = comparisons[start : start + AT_ONCE]
                prompts = [one.prompt for one in some]
                scores = book.score([*prompts, *prompts], [*(one.first for one in some), *(one.second for one in some)])
                verdicts += map(self._verdict, scores[: len(some)], scores[len(some) :])
        return verdicts

    def _verdict(self, first: float, second: float) -> float:
        return 0.5 if abs(first - second) <= self.margin else float(first > second)
