"""Requests to a server that speaks OpenAI's protocol: what is made again, and what ends the run."""

# Annotations are not postponed: jsonargparse reads those of a base class with the names of the subclass's file.
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

from dpo_lightning.errors import UsageError
from dpo_lightning.server.reply import receive

Result = TypeVar("Result")
Name = TypeVar("Name")
LONGEST_WAIT = 300.0  # seconds that a server may ask us to wait
REFUSED = (400, 413, 422)  # what is wrong with one request, as where it is too long
RETRIED = (408, 409, 425, 429)
NO_KEY = "none"  # the client wants one


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Where a server is, and how it is asked.

    Args:
        url: Its address, as in http://localhost:8000/v1.
        model: Name of the model.
        key_variable: Environment variable that holds the key; many servers on one's own machine need none.
        timeout: Seconds to wait for an answer; one that trickles in is given up within twice that.
        retries: How often a question is asked again.
        first_wait: Seconds before that, doubled each time, up to a minute.
        concurrency: Questions at a time.
    """

    url: str
    model: str
    key_variable: str | None = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 6
    first_wait: float = 1.0
    concurrency: int = 16

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UsageError(f"`url` must begin with http:// or https://, got {self.url!r}.")
        if self.concurrency < 1:
            raise UsageError(f"`concurrency` must be 1 or more, got {self.concurrency}.")
        for name in ("retries", "first_wait"):
            if getattr(self, name) < 0:
                raise UsageError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.timeout <= 0:
            raise UsageError(f"`timeout` must be more than 0 seconds, got {self.timeout}.")


class Refused(UsageError):
    """A request that the server takes for wrong.

    Attributes:
        said: What it says of it.
    """

    def __init__(self, url: str, said: str) -> None:
        super().__init__(f"{url} refuses what it is asked ({said}).")
        self.said = said


class Unanswered(UsageError):
    """A request that was made as often as the settings say.

    Attributes:
        said: What went wrong the last time.
    """

    def __init__(self, url: str, attempts: int, trouble: str) -> None:
        super().__init__(
            f"{url} gave no answer when asked {attempts} times; the last time {trouble}. What was answered is kept; "
            "give the same command to go on, with a longer timeout or more retries if need be."
        )
        self.said = trouble


class Line:
    """Requests to one server, many at a time.

    Args:
        connection: Where and how.

    Raises:
        UsageError: If the library that asks is not there.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection, self._openai = connection, _library()
        self._stop = threading.Event()
        self._key = os.environ.get(connection.key_variable or "", "").strip() or NO_KEY
        if not (self._key.isascii() and self._key.isprintable()):
            raise UsageError(
                f"The environment variable {connection.key_variable} holds no key: it has characters that no server "
                "takes in one, such as line breaks or letters with accents."
            )
        self._client = self._openai.OpenAI(
            base_url=connection.url,
            api_key=self._key,
            max_retries=0,  # the library's own waits can be neither set nor broken off
            timeout=self._openai.Timeout(connection.timeout, connect=min(connection.timeout, 10.0)),
        )
        self._reached = False

    def ask_no_more(self) -> None:
        """Ask nothing again; what is under way may be answered."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        """Whether nothing is asked again, so that who has no answer is not to blame."""
        return self._stop.is_set()

    def close(self) -> None:
        """Ask nothing more, and wait for nothing."""
        self._stop.set()
        self._client.close()

    def receive(self, method: Any, **request: Any) -> Any:
        """The reply to a request as plain data, to be called by what :meth:`ask` is given; see `receive` of reply."""
        return receive(method, self.connection.timeout, self._openai, **request)

    def may_have_answered(self, error: Exception) -> bool:
        """Whether a server may have answered, and charged, a request that gave an error."""
        if isinstance(error, self._openai.APIConnectionError):
            return type(error.__cause__).__name__ not in ("ConnectError", "ConnectTimeout")
        return not isinstance(error, self._openai.APIStatusError)

    def results(
        self, next_job: Callable[[], tuple[Name, Callable[[], Result]] | None]
    ) -> Iterator[tuple[Name, Result]]:
        """What jobs give, as it comes, with their names; the first error ends it, behind what others gave.

        Args:
            next_job: A job and its name; None where there is none at the moment, until another has ended.

        Raises:
            UsageError: If a job does.
        """
        ended = SimpleQueue[tuple[Name, Result | None, BaseException | None]]()

        def do(name: Name, job: Callable[[], Result]) -> None:
            try:
                ended.put((name, job(), None))
            except BaseException as error:  # is raised below
                ended.put((name, None, error))

        running = 0
        trouble: BaseException | None = None
        while True:
            while trouble is None and running < self.connection.concurrency and (todo := next_job()) is not None:
                # No pool: at the end of the process its threads are waited for, and with them what a server never says.
                threading.Thread(target=do, args=todo, daemon=True).start()
                running += 1
            if not running:
                break
            name, result, error = ended.get()
            running -= 1
            if error is None:
                yield name, result  # type: ignore[misc]
            else:
                trouble = trouble or error
                self.ask_no_more()
        if trouble is not None:
            raise trouble

    def ask(self, request: Callable[[Any], Result], retries: int | None = None) -> Result:
        """What a request gives, made as often as it takes.

        What is busy, slow or broken for a moment (429, 5xx, no answer in time, an answer without sense) is asked again.

        Args:
            request: Makes it, given a client of openai's; a ValueError says that the answer makes no sense, but a
                UsageError ends it.
            retries: How often it is made again, if not as often as the settings say.

        Raises:
            Refused: If the server takes it for wrong.
            Unanswered: If there was no answer.
            UsageError: If the server cannot be asked at all, or the request raises it.
        """
        connection, trouble = self.connection, ""
        retries = connection.retries if retries is None else retries
        for attempt in range(retries + 1):
            pause = 0.0
            try:
                result = request(self._client)
                self._reached = True
                return result
            except UsageError:
                raise
            except self._openai.APIConnectionError as error:
                trouble = self._no_answer(error)
            except self._openai.APIStatusError as error:
                self._reached = True
                said = f"status {error.status_code}: {self._said(error)}"
                if error.status_code in REFUSED:
                    raise Refused(connection.url, said) from error
                self._end_if_hopeless(error, said)
                trouble, pause = said, _asked_to_wait(error)
            except ValueError as error:
                self._reached = True
                trouble = f"an answer that makes no sense ({self._masked(str(error))})"
            if attempt < retries:
                backoff = min(60.0, connection.first_wait * 2**attempt) * random.uniform(0.5, 1.0)
                if self._stop.wait(max(backoff, min(pause, LONGEST_WAIT))):
                    break
        raise Unanswered(connection.url, attempt + 1, trouble)

    def _no_answer(self, error: Any) -> str:
        cause = type(error.__cause__).__name__
        if cause == "ConnectError" and not self._reached:
            raise UsageError(
                f"There is no server at {self.connection.url} ({error.__cause__}). Is it running, and is the address "
                "right?"
            ) from error
        if isinstance(error, self._openai.APITimeoutError) and cause != "ConnectTimeout":
            return f"no answer in {self.connection.timeout} s"
        return f"no connection ({self._masked(str(error.__cause__ or error))})"

    def _end_if_hopeless(self, error: Any, said: str) -> None:
        url, status = self.connection.url, error.status_code
        if status in (401, 403):
            raise UsageError(f"{url} wants another key ({said}). {self._about_key()}") from error
        if status == 404:
            raise UsageError(
                f"{url} knows no model {self.connection.model!r}, or nothing at this address, which mostly ends in /v1 "
                f"({said}).{self._models()}"
            ) from error
        if getattr(error, "code", None) == "insufficient_quota" or (status < 500 and status not in RETRIED):
            raise UsageError(f"{url} cannot be asked ({said}).") from error

    def _about_key(self) -> str:
        variable = self.connection.key_variable
        if variable is None:
            return "No key was sent; name the environment variable that holds one by `key_variable`."
        has = "holds a key that it refuses" if self._key != NO_KEY else "is not set"
        return f"The environment variable {variable} {has}; set it, or name another by `key_variable`."

    def _said(self, error: Any) -> str:
        message = error.body.get("message") if isinstance(error.body, dict) else error.body
        return self._masked(str(message or error.message))[:300]

    def _masked(self, said: str) -> str:
        """Without the key, which some servers repeat."""
        return said if self._key == NO_KEY else said.replace(self._key, "***")

    def _models(self) -> str:
        try:
            names = [model.id for model in self._client.models.list().data[:10]]
        except Exception:  # it was a guess
            return ""
        return f" It has {', '.join(map(repr, names))}." if names else ""


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
