"""Chat completions from a server that speaks OpenAI's protocol: vLLM, llama.cpp, a provider's."""

# Annotations are not postponed: jsonargparse reads those of a base class with the names of the subclass's file.
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

from dpo_lightning.errors import UsageError
from dpo_lightning.server.asking import Answer, Asking, Messages, Unusable
from dpo_lightning.server.line import Connection, Line
from dpo_lightning.server.reply import part
from dpo_lightning.server.spending import NOTHING, Purse, Spent


@dataclass(frozen=True, kw_only=True)
class Server(Connection):
    """A server of chat completions, asked many questions at a time.

    What is busy, slow or broken for a moment (429, 5xx, no answer in time, an answer that is none) is asked again,
    after waits that double. What cannot get better, as a wrong key, an unknown model or no server at all, ends the run.
    A question that the server refuses or fails is left out where it answers others, or something easy.

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

    def ask(self, questions: Sequence[Messages], spent: Spent = NOTHING) -> Iterator[tuple[int | None, Answer]]:
        """Each answer as it comes, with the place of its question; without a text where it is left out.

        What was paid for nothing comes as an answer without a text that is not left out, and may have no place.

        Args:
            questions: Dialogues that end with what is to be answered.
            spent: What was spent before, which counts towards the caps.

        Raises:
            UsageError: If a cap is reached, or the server cannot be asked; all answers until then were handed over.
        """
        line, purse = Line(self), Purse(self._passed, spent)
        asking = Asking(line, partial(self._complete, line), self._most, purse, questions)
        try:
            yield from asking.answers()
            if asking.left:
                raise self._capped(purse, asking.left)
        finally:
            line.close()

    def cost(self, spent: Spent) -> float | None:
        """Dollars; None without prices."""
        if self.input_price is None or self.output_price is None:
            return None
        return (spent.input_tokens * self.input_price + spent.output_tokens * self.output_price) / 1e6

    def bill(self, spent: Spent) -> str:
        """Tokens, and dollars where there are prices, in words."""
        cost = self.cost(spent)
        dollars = "" if cost is None else f", {cost:.4f} dollars"
        return f"{spent.input_tokens} + {spent.output_tokens} tokens{dollars}"

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

    def _capped(self, purse: Purse, left: int) -> UsageError:
        return UsageError(
            f"{purse.passed} may be passed by the next question: {purse.spent.requests} were asked "
            f"({self.bill(purse.spent)}), "
            f"{left} are left. What was answered is kept; raise the cap and give the same command to go on."
        )

    def _complete(self, line: Line, question: Messages, client: Any) -> Answer:
        options: dict[str, Any] = {self.limit_name: self.max_tokens}
        if self.temperature is not None:
            options["temperature"] = self.temperature
        reply = line.receive(
            client.chat.completions, model=self.model, messages=question, extra_body=self.options, **options
        )
        spent = _counted(reply) or self._most(question)
        try:
            return Answer(_text(reply), spent, str(part(reply, kind=dict).get("model") or ""))
        except ValueError as error:
            raise Unusable(str(error), spent) from error


def _counted(reply: Any) -> Spent | None:
    """What a server says that it took; None where it does not, or makes no sense."""
    try:
        counts = [part(reply, "usage", name, kind=int) for name in ("prompt_tokens", "completion_tokens")]
    except ValueError:
        return None
    return Spent(1, *counts) if counts[0] > 0 and counts[1] >= 0 else None


def _text(reply: Any) -> str:
    """The answer, whole or in parts; empty where there is none but a list of calls."""
    content = part(reply, "choices", 0, "message", kind=dict).get("content")
    if isinstance(content, list):
        texts = (piece.get("text") for piece in content if isinstance(piece, dict))  # others are thoughts
        content = "".join(text for text in texts if isinstance(text, str))
    if content is not None and not isinstance(content, str):
        raise ValueError(f"choices.0.message.content is {content!r:.80}")
    return content or ""
