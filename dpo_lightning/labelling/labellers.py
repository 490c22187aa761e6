"""What labels comparisons: a scorer, a judge, or chance at the odds that a scorer gives."""

# Annotations are not postponed: jsonargparse reads those of a base class with the names of the subclass's file.
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from dpo_lightning.errors import UsageError
from dpo_lightning.judges import Comparison, Judge
from dpo_lightning.labelling.choice import Choice
from dpo_lightning.labelling.groups import Group
from dpo_lightning.scorers import ScoreBook, Scorer, Unscored

AT_ONCE = 64  # prompts


class Label(NamedTuple):
    """What is known of two responses of a group.

    Attributes:
        first: Place of one.
        second: Place of the other.
        verdict: 1 where the first is better, 0 where the second is, one half for a tie; None without a verdict.
    """

    first: int
    second: int
    verdict: float | None


class Labels(NamedTuple):
    """What is known of a group.

    Attributes:
        compared: The labels of the pairs that were chosen.
        scores: What the scorer gave each response; None of a judge.
        levels: Numbers by which the responses are ranked, higher is better; None of a judge.
    """

    compared: list[Label]
    scores: list[float] | None = None
    levels: list[float] | None = None


class Labeller(ABC):
    """Says which responses are better.

    A subclass is a frozen dataclass whose fields are its settings.
    """

    scores: ClassVar[bool]  # whether responses have scores, by which they are ranked too

    @abstractmethod
    def label(self, groups: Sequence[Group], choice: Choice, answers: Path | None) -> Iterator[Labels]:
        """The labels of each group, in order.

        Args:
            groups: Responses.
            choice: Which pairs of them are compared.
            answers: File that keeps scores and answers as they come, from which a killed run goes on.
        """


@dataclass(frozen=True, kw_only=True)
class ByScorer(Labeller):
    """The response with the higher score is better, equal scores tie.

    Args:
        scorer: What gives the scores.
    """

    scorer: Scorer

    scores: ClassVar[bool] = True

    def label(self, groups: Sequence[Group], choice: Choice, answers: Path | None) -> Iterator[Labels]:
        """Labels by the scores of the responses, which are kept."""
        with ScoreBook(self.scorer, answers) as book:
            for start in range(0, len(groups), AT_ONCE):
                some = groups[start : start + AT_ONCE]
                scores = iter(_scored(book, some))
                for group in some:
                    yield self._labels(group, [next(scores) for _ in group.responses], choice)

    def verdict(self, group: Group, first: int, second: int, scores: Sequence[float]) -> float:
        """Which of two responses is better."""
        return 0.5 if scores[first] == scores[second] else float(scores[first] > scores[second])

    def levels(self, group: Group, scores: list[float]) -> list[float]:
        """Numbers by which the responses are ranked."""
        return scores

    def _labels(self, group: Group, scores: list[float], choice: Choice) -> Labels:
        pairs = choice.of(group, scores)
        compared = [Label(first, second, self.verdict(group, first, second, scores)) for first, second in pairs]
        return Labels(compared, scores, self.levels(group, scores))


@dataclass(frozen=True, kw_only=True)
class BradleyTerry(ByScorer):
    r"""Labels drawn by chance, at odds that scores give: noisy labels with a known truth.

    .. math:: p(y_1 \succ y_2) = \sigma((r(y_1) - r(y_2)) / T)

    Each pair is drawn by itself; a ranking is drawn from the model of Plackett and Luce with scores r / T. Bradley and
    Terry 1952; equations 1 and 18 of arXiv:2305.18290.

    Args:
        temperature: T; towards 0 the higher score always wins.
        seed: Seed of the draws. Each hangs on its row alone.
    """

    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UsageError(
                f"`temperature` must be more than 0, got {self.temperature}; without noise use the scorer."
            )

    def verdict(self, group: Group, first: int, second: int, scores: Sequence[float]) -> float:
        """Drawn at the odds of the two scores."""
        drawn = self._drawn(f"{group.key}/{first}/{second}", [scores[first], scores[second]])
        return float(drawn[0] > drawn[1])

    def levels(self, group: Group, scores: list[float]) -> list[float]:
        """A ranking drawn at the odds of the scores: K for the best, down to 1."""
        drawn = self._drawn(group.key, scores)
        order = sorted(range(len(drawn)), key=lambda place: drawn[place])
        return [float(order.index(place) + 1) for place in range(len(drawn))]

    def _drawn(self, key: str, scores: Sequence[float]) -> list[float]:
        """Scores with Gumbel noise, whose order is a draw from Plackett and Luce's model."""
        chance = random.Random(f"{self.seed}/{key}")
        return [score / self.temperature - math.log(chance.expovariate(1.0) or 5e-324) for score in scores]


@dataclass(frozen=True, kw_only=True)
class ByJudge(Labeller):
    """A judge says which of two responses is better.

    Args:
        judge: The judge.
    """

    judge: Judge

    scores: ClassVar[bool] = False

    def label(self, groups: Sequence[Group], choice: Choice, answers: Path | None) -> Iterator[Labels]:
        """Labels by the judge's verdicts; all are asked for at once, and its answers are kept."""
        chosen = [choice.of(group, None) for group in groups]
        asked = [
            Comparison(group.prompt, group.responses[first], group.responses[second])
            for group, pairs in zip(groups, chosen, strict=True)
            for first, second in pairs
        ]
        verdicts = iter(self.judge.compare(asked, answers))
        for pairs in chosen:
            yield Labels([Label(first, second, next(verdicts)) for first, second in pairs])


def as_labeller(given: Labeller | Scorer | Judge) -> Labeller:
    """A scorer or a judge as a labeller."""
    if isinstance(given, Labeller):
        return given
    return ByScorer(scorer=given) if isinstance(given, Scorer) else ByJudge(judge=given)


def _scored(book: ScoreBook, groups: Sequence[Group]) -> list[float]:
    items = [(group, response) for group in groups for response in group.responses]
    try:
        return book.score([group.prompt for group, _ in items], [response for _, response in items])
    except Unscored as problem:
        group, response = items[problem.place]
        raise UsageError(f"row {group.row}, response {response!r:.60}: {problem.reason}") from problem
