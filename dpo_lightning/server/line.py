"""One round of questions to a server: what is asked again, and what ends the run."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_lightning.errors import UsageError

if TYPE_CHECKING:
    from dpo_lightning.server.settings import Server

Messages = list[dict[str, Any]]
LONGEST_WAIT = 300.0  # seconds that a server may ask us to wait
REFUSED = (400, 413, 422)  # what is wrong with one question, as where it is too long
RETRIED = (408, 409, 425, 429)
MANY_REFUSED = 8
NO_KEY = "none"


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

    def plus(self, other: Spent) -> Spent:
        """Both together."""
        return Spent(*(mine + others for mine, others in zip(self, other, strict=True)))


class Answer(NamedTuple):
    """What came back.

    Attributes:
        text: The answer; None where the server refused or failed this question and answered others.
        spent: What it took.
        model: What answered, as the server calls it.
        error: Why there is none.
    """

    text: str | None
    spent: Spent = Spent()
    model: str = ""
    error: str = ""


class Line:
    """The connections of one round of questions."""

    def __init__(self, server: Server) -> None:
        self.server, self.openai = server, _library()
        self.stop, self.pool = threading.Event(), ThreadPoolExecutor(server.concurrency)
        self.key = os.environ.get(server.key_variable) or NO_KEY
        self.client = self.openai.OpenAI(
            base_url=server.url,
            api_key=self.key,
            max_retries=0,  # the library's own waits can be neither set nor broken off
            timeout=self.openai.Timeout(server.timeout, connect=min(server.timeout, 10.0)),
        )
        self.reached, self.answered, self.refused = False, 0, 0
        self.refusal: UsageError | None = None  # where the server has answered nothing

    def close(self) -> None:
        """Ask nothing more."""
        self.stop.set()
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.client.close()

    def answer(self, question: Messages) -> Answer:
        """The answer to one question, asked as often as it takes.

        Raises:
            UsageError: If the server cannot be asked.
        """
        server, answered_before, trouble = self.server, self.answered, ""
        for attempt in range(server.retries + 1):
            pause = 0.0
            try:
                answer = self._ask(question)
                self.answered, self.refusal = self.answered + 1, None
                return answer
            except self.openai.APIConnectionError as error:
                slow = (
                    isinstance(error, self.openai.APITimeoutError) and "Connect" not in type(error.__cause__).__name__
                )
                if not slow and not self.reached:
                    raise UsageError(
                        f"There is no server at {server.url} ({error.__cause__ or error}). Is it running, and is the "
                        "address right?"
                    ) from error
                trouble = f"no answer in {server.timeout} s" if slow else f"no connection ({error.__cause__})"
            except self.openai.APIStatusError as error:
                self.reached = True
                if error.status_code in REFUSED:
                    return self._refused(error)
                self._end_if_hopeless(error)
                trouble, pause = f"status {error.status_code}: {self._said(error)}", _asked_to_wait(error)
            except ValueError as error:
                self.reached = True
                trouble = f"an answer that is no chat completion ({error})"
            if attempt < server.retries:
                backoff = min(60.0, server.first_wait * 2**attempt) * random.uniform(0.5, 1.0)
                if self.stop.wait(max(backoff, min(pause, LONGEST_WAIT))):
                    break
        if self.answered > answered_before:
            return Answer(None, error=trouble)
        raise UsageError(
            f"{server.url} gave no answer when asked {attempt + 1} times; the last time {trouble}. What was answered "
            "is kept; give the same command to go on, with more `timeout` or `retries` if need be."
        )

    def _ask(self, question: Messages) -> Answer:
        server = self.server
        options: dict[str, Any] = {server.limit_name: server.max_tokens}
        if server.temperature is not None:
            options["temperature"] = server.temperature
        completion: Any = self.client.chat.completions.create(
            model=server.model, messages=question, extra_body=server.options, **options
        )
        if not getattr(completion, "choices", None) or getattr(completion.choices[0], "message", None) is None:
            raise ValueError(f"{completion!r:.80}")
        self.reached = True
        usage = completion.usage
        counts = (usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage is not None else (0, 0)
        return Answer(completion.choices[0].message.content or "", Spent(1, *counts), completion.model or "")

    def _refused(self, error: Any) -> Answer:
        said = f"status {error.status_code}: {self._said(error)}"
        self.refused += 1
        self.refusal = None if self.answered else UsageError(f"{self.server.url} refuses every question ({said}).")
        if self.refusal is not None and self.refused >= MANY_REFUSED:
            raise self.refusal from error
        return Answer(None, error=said)

    def _end_if_hopeless(self, error: Any) -> None:
        server, status, code = self.server, error.status_code, getattr(error, "code", None)
        if status in (401, 403):
            has = "holds a key that it refuses" if self.key != NO_KEY else "is not set"
            raise UsageError(
                f"{server.url} wants another key (status {status}: {self._said(error)}). The environment variable "
                f"{server.key_variable} {has}; set it, or name another by `key_variable`."
            ) from error
        if status == 404:
            raise UsageError(
                f"{server.url} knows no model {server.model!r}, or no chat completions at this address, which as a "
                f"rule ends in /v1 (status 404: {self._said(error)}).{self._models()}"
            ) from error
        if code == "insufficient_quota" or (status < 500 and status not in RETRIED):
            raise UsageError(f"{server.url} cannot be asked (status {status}: {self._said(error)}).") from error

    def _said(self, error: Any) -> str:
        message = error.body.get("message") if isinstance(error.body, dict) else error.body
        return masked(str(message or error.message), self.key)[:300]

    def _models(self) -> str:
        try:
            names = [model.id for model in self.client.models.list().data[:10]]
        except Exception:  # it was a guess
            return ""
        return f" It has {', '.join(map(repr, names))}." if names else ""


def masked(said: str, key: str) -> str:
    """What a server said, without the key, which some repeat."""
    return said if key in ("", NO_KEY) else said.replace(key, "***")


def _asked_to_wait(error: Any) -> float:
    try:
        return float(error.response.headers.get("retry-after", 0))
    except ValueError:  # a date
        return 0.0


def _library() -> Any:
    try:
        import openai
    except ImportError as error:
        raise UsageError(
            'Asking a server needs the extra server: pip install -c constraints.txt -e ".[server]"'
        ) from error
    return openai
