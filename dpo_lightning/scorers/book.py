"""Scores that are kept, so that none is asked for twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from dpo_lightning.journal import Book, digest_of
from dpo_lightning.scorers.base import Prompt, Scorer, Unscored, scores_of


class ScoreBook(Book):
    """A scorer with the scores that it gave.

    Args:
        scorer: What gives the scores.
        path: File that keeps them; without one they are kept in memory.
    """

    def __init__(self, scorer: Scorer, path: Path | None = None) -> None:
        self.scorer, self._mark = scorer, scorer.fingerprint()
        super().__init__(path, "scores, each by a digest of scorer, prompt and response")
        self._known: dict[str, float] = {row["digest"]: row["score"] for row in self.rows}

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """One finite number a response; those that are known and those that are equal are not asked for.

        Raises:
            Unscored: If the scorer gives something that is none.
            UsageError: If it gives more or fewer.
        """
        keys = [digest_of(self._mark, prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        new = {key: place for place, key in reversed(list(enumerate(keys))) if key not in self._known}
        places = sorted(new.values())
        if places:
            scores = self._ask([prompts[place] for place in places], [responses[place] for place in places], places)
            found = {keys[place]: score for place, score in zip(places, scores, strict=True)}
            self.keep({"digest": key, "score": score} for key, score in found.items())
            self._known |= found
        return [self._known[key] for key in keys]

    def _ask(self, prompts: list[Prompt], responses: list[str], places: list[int]) -> list[float]:
        try:
            scores = scores_of(self.scorer, prompts, responses)
        except Unscored as problem:
            raise Unscored(places[problem.place], problem.reason) from problem.__cause__
        for place, score in zip(places, scores, strict=True):
            if not math.isfinite(score):
                raise Unscored(place, f"{type(self.scorer).__name__} gave {score}, which is no finite number.")
        return scores
