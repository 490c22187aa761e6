"""Chat completions from a server that speaks OpenAI's protocol: vLLM, llama.cpp, a provider's."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from dpo_lightning.errors import UsageError
from dpo_lightning.server.line import Answer, Line, Messages, Spent

NOTHING = Spent()


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server of chat completions, asked many questions at a time.

    What is busy, slow or broken for a moment (429, 5xx, no answer in time, an answer that is none) is asked again,
    after waits that double. What cannot get better, as a wrong key, an unknown model or no server at all, ends the run.

    Args:
        url: Its address, as in http://localhost:8000/v1.
        model: Name of the model.
        key_variable: Environment variable that holds the key; many servers on one's own machine need none.
        temperature: 0 takes the likeliest token; null leaves the field out, for models that refuse it.
        max_tokens: Most tokens of an answer.
        limit_name: What the server calls that limit.
        options: Further fields of a request, as in {seed: 1}.
        timeout: Seconds to wait for an answer.
        retries: How often a question is asked again.
        first_wait: Seconds before that, doubled each time, up to a minute.
        concurrency: Questions at a time.
        input_price: Dollars a million tokens of questions.
        output_price: Dollars a million tokens of answers.
        max_spend: Most dollars; nothing is asked that might cost more. Needs both prices.
        max_requests: Most questions.
        max_total_tokens: Most tokens of questions and answers.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    temperature: float | None = 0.0
    max_tokens: int = 1024
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    options: dict[str, Any] = field(default_factory=dict)
    timeout: float = 60.0
    retries: int = 6
    first_wait: float = 1.0
    concurrency: int = 16
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
        if not self.url.startswith(("http://", "https://")):
            raise UsageError(f"`url` must begin with http:// or https://, got {self.url!r}.")
        for name in ("max_tokens", "concurrency"):
            if getattr(self, name) < 1:
                raise UsageError(f"`{name}` must be 1 or more, got {getattr(self, name)}.")
        for name in ("retries", "first_wait"):
            if getattr(self, name) < 0:
                raise UsageError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.timeout <= 0:
            raise UsageError(f"`timeout` must be more than 0 seconds, got {self.timeout}.")
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
        waiting, running = deque(enumerate(questions)), dict[Future[Answer], tuple[int, Spent]]()
        trouble: UsageError | None = None
        line = Line(self)
        try:
            while running or (waiting and trouble is None):
                while waiting and trouble is None and len(running) < self.concurrency:
                    most = self._most(waiting[0][1])
                    passed = self._passed(_sum([spent, most, *(bound for _, bound in running.values())]))
                    if passed:
                        if not running:
                            trouble = _capped(passed, spent, self.cost(spent), len(waiting))
                        break
                    place, question = waiting.popleft()
                    running[line.pool.submit(line.answer, question)] = (place, most)
                for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                    place, most = running.pop(future)
                    try:
                        answer = future.result()
                    except UsageError as error:
                        trouble = trouble or error
                        line.stop.set()
                        continue
                    if answer.text is not None and not answer.spent.input_tokens:  # a server that does not count
                        answer = answer._replace(spent=most)
                    spent = spent.plus(answer.spent)
                    yield place, answer
            if trouble is None and not spent.requests:
                trouble = line.refusal
            if trouble is not None:
                raise trouble
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


def _sum(parts: Sequence[Spent]) -> Spent:
    return Spent(*map(sum, zip(*parts, strict=True)))


def _capped(passed: str, spent: Spent, cost: float | None, left: int) -> UsageError:
    dollars = "" if cost is None else f", {cost:.4f} dollars"
    tokens = f"{spent.input_tokens} + {spent.output_tokens} tokens"
    return UsageError(
        f"{passed} may be passed by the next question: {spent.requests} were answered ({tokens}{dollars}), {left} are "
        "left. What was answered is kept; raise the cap and give the same command to go on."
    )
