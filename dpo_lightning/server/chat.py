"""Chat completions from a server that speaks OpenAI's protocol: vLLM, llama.cpp, a provider's."""

# Annotations are not postponed: jsonargparse reads those of a base class with the names of the subclass's file.
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

from dpo_lightning.errors import UsageError
from dpo_lightning.server.line import Connection, Line, Refused, Unanswered

Messages = list[dict[str, Any]]
MANY_REFUSED = 8


class Spent(NamedTuple):
    """What was asked.

    Attributes:
        requests: Questions that were answered.
        input_tokens: Tokens of the questions.
        output_tokens: Tokens of the answers.
    """

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def plus(self, *others: "Spent") -> "Spent":
        """All together."""
        return Spent(*map(sum, zip(self, *others, strict=True)))


NOTHING = Spent()


class Answer(NamedTuple):
    """What came back.

    Attributes:
        text: The answer; None where the server refused or failed this question and answered others.
        spent: What it took.
        model: What answered, as the server calls it.
        error: Why there is none.
    """

    text: str | None
    spent: Spent = NOTHING
    model: str = ""
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Server(Connection):
    """A server of chat completions, asked many questions at a time.

    What is busy, slow or broken for a moment (429, 5xx, no answer in time, an answer that is none) is asked again,
    after waits that double. What cannot get better, as a wrong key, an unknown model or no server at all, ends the run.

    Args:
        temperature: 0 takes the likeliest token; null leaves the field out, for models that refuse it.
        max_tokens: Most tokens of an answer.
        limit_name: What the server calls that limit.
        options: Further fields of a request, as in {seed: 1}.
        input_price: Dollars a million tokens of questions.
        output_price: Dollars a million tokens of answers.
        max_spend: Most dollars; nothing is asked that might cost more. Needs both prices.
        max_requests: Most questions.
        max_total_tokens: Most tokens of questions and answers.
    """

    temperature: float | None = 0.0
    max_tokens: int = 1024
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    options: dict[str, Any] = field(default_factory=dict)
    input_price: float | None = None
    output_price: float | None = None
    max_spend: float | None = None
    max_requests: int | None = None
    max_total_tokens: int | None = None

    ASIDE: ClassVar[tuple[str, ...]] = (
        *("url", "key_variable", "limit_name", "timeout", "retries", "first_wait", "concurrency"),
        *("input_price", "output_price", "max_spend", "max_requests", "max_total_tokens"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens < 1:
            raise UsageError(f"`max_tokens` must be 1 or more, got {self.max_tokens}.")
        if self.max_spend is not None and None in (self.input_price, self.output_price):
            raise UsageError(
                "`max_spend` is in dollars, so it needs `input_price` and `output_price`, in dollars a million tokens; "
                "without prices set `max_total_tokens` or `max_requests`."
            )

    def ask(self, questions: Sequence[Messages], spent: Spent = NOTHING) -> Iterator[tuple[int, Answer]]:
        """Each answer as it comes, with the place of its question.

        Args:
            questions: Dialogues that end with what is to be answered.
            spent: What was spent before, which counts towards the caps.

        Raises:
            UsageError: If a cap is reached, or the server cannot be asked; all answers until then were handed over.
        """
        waiting, bounds = deque(enumerate(questions)), dict[int, Spent]()  # what runs may spend at the most
        line = Line(self)
        asks = _Asker(self, line)

        def next_job() -> tuple[int, Callable[[], Answer]] | None:
            if not waiting:
                return None
            most = self._most(waiting[0][1])
            if self._passed(spent.plus(most, *bounds.values())):
                return None
            place, question = waiting.popleft()
            bounds[place] = most
            return place, partial(asks, question)

        try:
            for place, answer in line.results(next_job):
                most = bounds.pop(place)
                if answer.text is not None and not answer.spent.input_tokens:  # a server that does not count
                    answer = answer._replace(spent=most)
                spent = spent.plus(answer.spent)
                yield place, answer
            if waiting:
                passed = self._passed(spent.plus(self._most(waiting[0][1])))
                raise _capped(passed, spent, self.cost(spent), len(waiting))
            if not spent.requests and asks.refusal is not None:
                raise asks.refusal
        finally:
            line.close()

    def cost(self, spent: Spent) -> float | None:
        """Dollars; None without prices."""
        if self.input_price is None or self.output_price is None:
            return None
        return (spent.input_tokens * self.input_price + spent.output_tokens * self.output_price) / 1e6

    def _most(self, question: Messages) -> Spent:
        """No less than a question can take: a token has at least a byte; what a template adds is allowed for."""
        return Spent(1, len(json.dumps(question, ensure_ascii=False).encode()) + 128, self.max_tokens)

    def _passed(self, spent: Spent) -> str:
        """The cap that would be passed."""
        cost, tokens = self.cost(spent), spent.input_tokens + spent.output_tokens
        if self.max_spend is not None and cost is not None and cost > self.max_spend:
            return f"`max_spend`, {self.max_spend} dollars,"
        if self.max_requests is not None and spent.requests > self.max_requests:
            return f"`max_requests`, {self.max_requests},"
        if self.max_total_tokens is not None and tokens > self.max_total_tokens:
            return f"`max_total_tokens`, {self.max_total_tokens},"
        return ""


class _Asker:
    """Asks one question; one that the server refuses or fails is left out where it answers others."""

    def __init__(self, server: Server, line: Line) -> None:
        self.server, self.line = server, line
        self.answered, self.refused = 0, 0
        self.refusal: UsageError | None = None  # where the server has answered nothing

    def __call__(self, question: Messages) -> Answer:
        """The answer.

        Raises:
            UsageError: If the server cannot be asked.
        """
        answered_before = self.answered
        try:
            answer = self.line.ask(partial(self._complete, question))
        except Refused as refusal:
            self.refused += 1
            if self.answered:
                self.refusal = None
            else:
                self.refusal = UsageError(f"{self.server.url} refuses every question ({refusal.said}).")
                if self.refused >= MANY_REFUSED:
                    raise self.refusal from refusal
            return Answer(None, error=refusal.said)
        except Unanswered as failure:
            if self.answered > answered_before:
                return Answer(None, error=failure.trouble)
            raise
        self.answered, self.refusal = self.answered + 1, None
        return answer

    def _complete(self, question: Messages, client: Any) -> Answer:
        server = self.server
        options: dict[str, Any] = {server.limit_name: server.max_tokens}
        if server.temperature is not None:
            options["temperature"] = server.temperature
        completion: Any = client.chat.completions.create(
            model=server.model, messages=question, extra_body=server.options, **options
        )
        if not getattr(completion, "choices", None) or getattr(completion.choices[0], "message", None) is None:
            raise ValueError(f"{completion!r:.80}")
        usage = completion.usage
        counts = (usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage is not None else (0, 0)
        return Answer(completion.choices[0].message.content or "", Spent(1, *counts), completion.model or "")


def _capped(passed: str, spent: Spent, cost: float | None, left: int) -> UsageError:
    dollars = "" if cost is None else f", {cost:.4f} dollars"
    tokens = f"{spent.input_tokens} + {spent.output_tokens} tokens"
    return UsageError(
        f"{passed} may be passed by the next question: {spent.requests} were answered ({tokens}{dollars}), {left} are "
        "left. What was answered is kept; raise the cap and give the same command to go on."
    )
