"""A language model as a judge."""

# Annotations are not postponed: jsonargparse reads those of a base class with the names of the subclass's file.
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from dpo_lightning.errors import UsageError
from dpo_lightning.judges.answers import AnswerBook
from dpo_lightning.judges.base import Comparison, Judge
from dpo_lightning.judges.questions import REMINDER, ask, read, template
from dpo_lightning.scorers import Prompt
from dpo_lightning.server import Messages, Server

log = logging.getLogger(__name__)


class Verdict(NamedTuple):
    """What was said of a comparison: 1 where its first response is better, 0 the second, one half a tie, None unread.

    Attributes:
        as_given: With its first response shown first.
        turned: With its first response shown second; the same as the other where it was not asked.
    """

    as_given: float | None
    turned: float | None

    @property
    def mean(self) -> float | None:
        """Over both orders; a judge that always prefers what is shown first makes ties."""
        return None if self.as_given is None or self.turned is None else (self.as_given + self.turned) / 2


class Bias(NamedTuple):
    """What the order does to a judge.

    Attributes:
        changed: Share of the comparisons, read in both orders, on which the two orders differ.
        first: Share of the answers that were no tie which prefer what was shown first; one half without any bias.
    """

    changed: float
    first: float


def position_bias(verdicts: Sequence[Verdict]) -> Bias | None:
    """How much verdicts asked in both orders hang on the order; None where none was read."""
    read_both = [one for one in verdicts if one.mean is not None]
    if not read_both:
        return None
    changed = sum(one.as_given != one.turned for one in read_both) / len(read_both)
    shown_first = [first for one in read_both for first in (one.as_given == 1, one.turned == 0)]
    decided = sum(one.as_given != 0.5 for one in read_both) + sum(one.turned != 0.5 for one in read_both)
    return Bias(changed, sum(shown_first) / decided if decided else 0.5)


@dataclass(frozen=True, kw_only=True)
class LLMJudge(Judge):
    """A language model behind a server, asked in both orders, as it may prefer what it reads first.

    The verdict is the mean over both, so that where they contradict each other it is a tie. An answer whose last line
    is not A, B or tie is asked for again, and then left out.

    Args:
        server: Where it is asked.
        question: What it is asked: simple or concise (two ways of asking for the better summary), helpful (the better
            reply), or a text of your own with {prompt}, {first} and {second} in it, which calls the responses A and B.
        both_orders: Ask twice, with the responses in either order.
        reminders: How often it is asked again for a last line that can be read.
        ask_again: Ask again what the server refused or failed in an earlier run, which is left out otherwise.
    """

    server: Server
    question: str = "helpful"
    both_orders: bool = True
    reminders: int = 1
    ask_again: bool = False

    ASIDE: ClassVar[tuple[str, ...]] = ("ask_again",)

    def __post_init__(self) -> None:
        template(self.question)
        if self.reminders < 0:
            raise UsageError(f"`reminders` must not be negative, got {self.reminders}.")

    def compare(self, comparisons: Sequence[Comparison], answers: Path | None = None) -> list[float | None]:
        """The mean verdict on each comparison; None where it could not be read."""
        return [verdict.mean for verdict in self.verdicts(comparisons, answers)]

    def verdicts(self, comparisons: Sequence[Comparison], answers: Path | None = None) -> list[Verdict]:
        """The verdict on each comparison in both orders; figures of all of them are logged.

        Raises:
            UsageError: If the server cannot be asked any more; what it answered is in the file.
        """
        given = [self._question(one.prompt, one.first, one.second) for one in comparisons]
        turned = [self._question(one.prompt, one.second, one.first) for one in comparisons] if self.both_orders else []
        with AnswerBook(self.server, answers, self.ask_again) as book:
            said = self._said(book, [*given, *turned], len(given))
        first, others = said[: len(given)], [None if one is None else 1 - one for one in said[len(given) :]]
        found = [Verdict(*both) for both in zip(first, others if self.both_orders else first, strict=True)]
        log.info("%s", self._figures(found, book))
        return found

    def _question(self, prompt: Prompt, first: str, second: str) -> Messages:
        return [{"role": "user", "content": ask(self.question, prompt, first, second)}]

    def _said(self, book: AnswerBook, questions: list[Messages], num_given: int) -> list[float | None]:
        """What is read from the answers, the reminders' included."""
        notes = [{"order": "given" if place < num_given else "turned"} for place in range(len(questions))]
        texts = book.of(questions, notes)
        for attempt in range(2, 2 + self.reminders):
            unread = [place for place, text in enumerate(texts) if text is not None and read(text) is None]
            for place in unread:
                said = {"role": "assistant", "content": texts[place] or "..."}
                questions[place] = [*questions[place], said, {"role": "user", "content": REMINDER}]
            again = [{**notes[place], "attempt": attempt} for place in unread]
            for place, text in zip(unread, book.of([questions[place] for place in unread], again), strict=True):
                texts[place] = text
        return [None if text is None else read(text) for text in texts]

    def _figures(self, verdicts: list[Verdict], book: AnswerBook) -> str:
        bias = position_bias(verdicts) if self.both_orders else None
        lines = [f"Judged by {self.server.model}: {len(verdicts)} comparisons"]
        lines.append(f"  without a verdict       {sum(one.mean is None for one in verdicts)}")
        lines += [f"    {count} questions were not answered: {error}" for error, count in book.failed.items()]
        lines += ["    to ask these again set `ask_again`"] * bool(book.failed)
        if bias is not None:
            lines.append(f"  changed by the order    {bias.changed:.1%}")
            lines.append(f"  preferred as the first  {bias.first:.1%} of the answers that are no tie")
        return "\n".join([*lines, f"  requests in all         {book.spent.requests} ({self.server.bill(book.spent)})"])
