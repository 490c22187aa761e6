"""Many questions to one server, and what becomes of those that it refuses or fails.

A question alone may be at fault, or the server. It is the question where the server answers others: then it is left
out, if it was refused, or failed twice. Where nothing else is there to tell by, the server is asked something easy.
"""

# Annotations are not postponed, as in the files that this one is read by.
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from dpo_lightning.errors import UsageError
from dpo_lightning.server.line import Line, Refused, Unanswered
from dpo_lightning.server.spending import NOTHING, Purse, Spent

Messages = list[dict[str, Any]]
EASY: Messages = [{"role": "user", "content": "Answer with the letter A."}]
MANY_REFUSED, MANY_FAILED = 8, 3  # without an answer between them
EASY_RETRIES = 2


class Answer(NamedTuple):
    """What came back.

    Attributes:
        text: The answer; None where there is none.
        spent: What it took, with all that was paid for nothing before it.
        model: What answered, as the server calls it.
        error: Why there is none.
        left_out: Whether the server refused or failed this question and answers others.
    """

    text: str | None
    spent: Spent = NOTHING
    model: str = ""
    error: str = ""
    left_out: bool = False


class Unusable(ValueError):
    """An answer that makes no sense, but was charged.

    Attributes:
        spent: What it took.
    """

    def __init__(self, said: str, spent: Spent) -> None:
        super().__init__(said)
        self.spent = spent


class Capped(UsageError):
    """A question is not asked again, because a cap might be passed."""


class Outcome(NamedTuple):
    """What became of a question.

    Attributes:
        answer: The answer.
        trouble: Why there is none.
        answered_meanwhile: Whether others were answered while it was asked.
    """

    answer: Answer
    trouble: UsageError | None = None
    answered_meanwhile: bool = False


class Asking:
    """One round of questions.

    Args:
        line: To the server.
        complete: Gives the answer to a question, given a client too.
        most: What a question takes at the most.
        purse: What may be spent.
        questions: The questions.
    """

    def __init__(
        self,
        line: Line,
        complete: Callable[[Messages, Any], Answer],
        most: Callable[[Messages], Spent],
        purse: Purse,
        questions: Sequence[Messages],
    ) -> None:
        self.line, self.complete, self.most, self.purse = line, complete, most, purse
        self.questions, self._waiting = questions, deque(range(len(questions)))
        self._capped = False
        self._running, self._answered = 0, 0
        self._doubted: list[tuple[int, Outcome]] = []  # the question or the server
        self._asked_again: set[int] = set()
        self._checking = False
        self._trouble: UsageError | None = None

    def answers(self) -> Iterator[tuple[int | None, Answer]]:
        """Each answer as it comes, with the place of its question; none for what was paid for no question.

        Raises:
            UsageError: If the server cannot be asked, or answers nothing.
        """
        for place, outcome in self.line.results(self._next):
            yield from self._easy(outcome) if place is None else self._sorted(place, outcome)
        for place, one in self._doubted:
            yield from _paid(place, one.answer)
        if self._trouble is not None:
            raise self._trouble

    @property
    def left(self) -> int:
        """Questions without an answer that are not left out."""
        return len(self._waiting) + len(self._doubted)

    def _next(self) -> tuple[int | None, Callable[[], Outcome]] | None:
        """A question that can be asked now."""
        if self._trouble is not None or self._capped or self._checking:
            return None
        if self._is_in_doubt():
            self._checking = self._may_take(EASY)
            retries = min(EASY_RETRIES, self.line.connection.retries)
            return (None, partial(self._ask, EASY, retries)) if self._checking else None
        if not self._waiting or not self._may_take(self.questions[self._waiting[0]]):
            return None
        place = self._waiting.popleft()
        self._running += 1
        return place, partial(self._ask, self.questions[place])

    def _may_take(self, question: Messages) -> bool:
        may = self.purse.take(self.most(question))
        self._capped = not may and not self._running  # or there may be more when those have come back
        return may

    def _is_in_doubt(self) -> bool:
        """Whether only something easy can tell if the server answers at all."""
        if not self._doubted:
            return False
        failed = sum(isinstance(outcome.trouble, Unanswered) for _, outcome in self._doubted)
        many = failed >= MANY_FAILED or len(self._doubted) >= MANY_REFUSED
        return many or not (self._waiting or self._running)

    def _ask(self, question: Messages, retries: int | None = None) -> Outcome:
        """Ask a question, for which enough is set aside, as often as it takes."""
        most, before = self.most(question), self._answered
        set_aside, paid = True, NOTHING

        def once(client: Any) -> Answer:
            nonlocal set_aside, paid
            if not set_aside and not self.purse.take(most):
                raise Capped("a cap might be passed")
            set_aside, spent = False, NOTHING
            try:
                answer = self.complete(question, client)
                spent = answer.spent
                return answer
            except Exception as error:
                if isinstance(error, Unusable):
                    spent = error.spent
                elif self.line.may_have_answered(error):
                    spent = most
                raise
            finally:
                self.purse.settle(most, spent)
                paid = paid.plus(spent)

        try:
            answer = self.line.ask(once, retries)
        except UsageError as trouble:
            said = getattr(trouble, "said", str(trouble))
            return Outcome(Answer(None, paid, error=said), trouble, self._answered > before)
        return Outcome(answer._replace(spent=paid))

    def _sorted(self, place: int, outcome: Outcome) -> Iterator[tuple[int | None, Answer]]:
        """What is known now: of this question, and of those that this one tells of."""
        self._running -= 1
        if outcome.trouble is None:
            self._answered += 1
            yield place, outcome.answer
            yield from self._blamed()
        elif isinstance(outcome.trouble, Capped):
            self._waiting.appendleft(place)
            yield from _paid(place, outcome.answer)
        elif isinstance(outcome.trouble, (Refused, Unanswered)):
            self._doubted.append((place, outcome))
            if outcome.answered_meanwhile:
                yield from self._blamed(place)
        else:
            yield from _paid(place, outcome.answer)
            self._end(outcome.trouble)

    def _easy(self, outcome: Outcome) -> Iterator[tuple[int | None, Answer]]:
        """It is the questions if the server answers something easy, else it is the server."""
        self._checking = False
        yield from _paid(None, outcome.answer)
        trouble = outcome.trouble
        if trouble is None or outcome.answered_meanwhile:
            self._answered += trouble is None
            yield from self._blamed()
        elif isinstance(trouble, Refused):
            self._end(UsageError(f"{self.line.connection.url} refuses every question now ({trouble.said})."))
        elif not isinstance(trouble, Capped):
            failed = [one.trouble for _, one in self._doubted if isinstance(one.trouble, Unanswered)]
            self._end(failed[0] if isinstance(trouble, Unanswered) and failed else trouble)

    def _end(self, trouble: UsageError) -> None:
        """Ask nothing more; the first trouble is what is said."""
        self._trouble = self._trouble or trouble
        self.line.ask_no_more()

    def _blamed(self, only: int | None = None) -> Iterator[tuple[int | None, Answer]]:
        """Questions that the server refuses or fails though it answers: all in doubt, or one.

        What failed has a second chance, since the server may have been away for a while.
        """
        if self.line.stopped:  # they may have been broken off
            return
        found = [(place, one) for place, one in self._doubted if only in (None, place)]
        self._doubted = [(place, one) for place, one in self._doubted if only not in (None, place)]
        for place, one in found:
            if isinstance(one.trouble, Refused) or place in self._asked_again:
                yield place, one.answer._replace(left_out=True)
                continue
            self._asked_again.add(place)
            self._waiting.append(place)
            yield from _paid(place, one.answer)


def _paid(place: int | None, answer: Answer) -> Iterator[tuple[int | None, Answer]]:
    """What was paid for nothing."""
    if answer.spent != NOTHING:
        yield place, answer._replace(text=None)
