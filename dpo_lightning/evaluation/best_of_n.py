"""The best of a prompt's first N samples, as a scorer chooses it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpo_lightning.errors import UsageError
from dpo_lightning.evaluation.sides import Matched
from dpo_lightning.scorers import ScoreBook, Scorer

AT_ONCE = 4096  # responses that are scored between two writes


def best_of_each(
    matched: Sequence[Matched], numbers: Sequence[int], chooser: Scorer, path: Path | None = None
) -> list[Matched]:
    """The best of the first N samples of each prompt and temperature, for each N, all of one N together.

    Args:
        matched: Samples, each with what it is compared with.
        numbers: The Ns.
        chooser: What scores them; the first of those with the highest score is the best.
        path: File that keeps the scores, from which a killed run goes on.

    Raises:
        UsageError: If a prompt has fewer samples.
    """
    together: dict[tuple[int, float | None], list[int]] = {}
    for place, one in enumerate(matched):
        together.setdefault((one.row, one.temperature), []).append(place)
    for (row, _), places in together.items():
        if len(places) < max(numbers):
            raise UsageError(
                f"`best_of` {max(numbers)} needs as many samples of each prompt, and prompt {row} has {len(places)}: "
                "lower it, or sample more by `dpo-lightning sample --num_samples`."
            )
    scores = _scores(matched, chooser, path)
    return [
        matched[max(places[:number], key=scores.__getitem__)]._replace(best_of=number)
        for number in numbers
        for places in together.values()
    ]


def _scores(matched: Sequence[Matched], chooser: Scorer, path: Path | None) -> list[float]:
    found: list[float] = []
    with ScoreBook(chooser, path) as book:
        for start in range(0, len(matched), AT_ONCE):
            some = matched[start : start + AT_ONCE]
            found += book.score([one.prompt for one in some], [one.first for one in some])
    return found
