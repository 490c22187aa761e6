"""Rewards of samples, kept apart from them, so that another scorer scores the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from dpo_lightning.errors import UsageError
from dpo_lightning.evaluation.rewards import Drawn, Measured
from dpo_lightning.journal import Book, digest_of
from dpo_lightning.scorers import Scorer, scores_of


class RewardBook(Book):
    """The rewards that scorers gave.

    Args:
        path: File that keeps them, a line a prompt and scorer.
        overwrite: Begin anew.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        holds = "rewards, in the order of a prompt's samples, by a digest of scorer, prompt and samples"
        super().__init__(path, holds, overwrite)
        self._known: dict[str, list[float]] = {row["digest"]: row["rewards"] for row in self.rows}

    def measured(self, drawn: Sequence[Drawn], scorer: Scorer, chooser: Scorer | None = None) -> list[Measured]:
        """Samples with their rewards; a scorer is not asked for what it said before, as long as it stays as it was.

        Args:
            drawn: Samples.
            scorer: What gives the rewards.
            chooser: What the best of N is chosen by, if not by them.

        Raises:
            UsageError: If a scorer gives what is no number a response.
        """
        rewards = self._of(drawn, scorer)
        chosen_by = [None] * len(drawn) if chooser is None else self._of(drawn, chooser)
        return [Measured(*one) for one in zip(drawn, rewards, chosen_by, strict=True)]

    def _of(self, drawn: Sequence[Drawn], scorer: Scorer) -> list[list[float]]:
        mark = scorer.fingerprint()
        digests = [digest_of(mark, one.row, one.prompt, one.responses) for one in drawn]
        new = {key: one for key, one in zip(digests, drawn, strict=True) if key not in self._known}
        if new:
            found = rewarded(scorer, list(new.values()))
            self.keep(
                {"row": one.drawn.row, "scorer": type(scorer).__name__, "rewards": one.rewards, "digest": key}
                for key, one in zip(new, found, strict=True)
            )
            self._known |= {key: one.rewards for key, one in zip(new, found, strict=True)}
        return [self._known[key] for key in digests]


def rewarded(scorer: Scorer, drawn: Sequence[Drawn]) -> list[Measured]:
    """Samples with their rewards.

    Raises:
        UsageError: If the scorer gives what is no number a response.
    """
    prompts = [one.prompt for one in drawn for _ in one.responses]
    rewards = scores_of(scorer, prompts, [response for one in drawn for response in one.responses])
    measured, start = [], 0
    for one in drawn:
        own = rewards[start : start + len(one.responses)]
        if not all(map(isfinite, own)):
            raise UsageError(f"{type(scorer).__name__} gave a response to prompt {one.row} a reward that is no number.")
        measured.append(Measured(one, own))
        start += len(own)
    return measured
