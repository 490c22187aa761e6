"""Scores that are kept, so that none is asked for twice."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from dpo_lightning.journal import Journal
from dpo_lightning.scorers.base import Prompt, Scorer, Unscored, scores_of

KEPT = {"holds": "scores, each by a digest of scorer, prompt and response"}


class ScoreBook:
    """A scorer with the scores that it gave.

    Args:
        scorer: What gives the scores.
        path: File that keeps them; without one they are kept in memory.
    """

    def __init__(self, scorer: Scorer, path: Path | None = None) -> None:
        self.scorer, self._mark = scorer, scorer.fingerprint()
        self._journal = None if path is None else Journal(path, KEPT)
        rows = [] if self._journal is None else self._journal.rows
        self._known: dict[str, float] = {row["digest"]: row["score"] for row in rows}

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """One finite number a response; those that are known and those that are equal are not asked for.

        Raises:
            Unscored: If the scorer gives something that is none.
            UsageError: If it gives more or fewer.
        """
        keys = [self._digest(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        new = {key: place for place, key in reversed(list(enumerate(keys))) if key not in self._known}
        places = sorted(new.values())
        if places:
            scores = self._ask([prompts[place] for place in places], [responses[place] for place in places], places)
            found = {keys[place]: score for place, score in zip(places, scores, strict=True)}
            if self._journal is not None:
                self._journal.append({"digest": key, "score": score} for key, score in found.items())
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

    def _digest(self, prompt: Prompt, response: str) -> str:
        content = json.dumps([self._mark, prompt, response]).encode()
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let others write to the file."""
        if self._journal is not None:
            self._journal.close()
