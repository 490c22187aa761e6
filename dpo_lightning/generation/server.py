"""Completions by a server that speaks OpenAI's protocol, such as vLLM's."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.data.tokenize import encode
from dpo_lightning.errors import UsageError
from dpo_lightning.generation.plan import Chunk, Sampling
from dpo_lightning.generation.prompts import Asked
from dpo_lightning.generation.samples import Samples
from dpo_lightning.server.line import NO_KEY, masked

if TYPE_CHECKING:
    from collections.abc import Callable

    from openai import AsyncOpenAI

log = logging.getLogger(__name__)
PAUSE = 0.5  # seconds behind an answer that makes no sense, doubled each time


def continue_by_server(
    chunks: Sequence[Chunk],
    asked: Sequence[Asked],
    sampling: Sampling,
    add: Callable[[list[dict[str, Any]]], None],
    *,
    tokenizer: Tokenizer,
    url: str,
    model: str,
    key_variable: str | None = None,
    timeout: float = 600.0,
    retries: int = 5,
    concurrency: int = 32,
) -> None:
    """Rows of chunks by a server, each as soon as it is there.

    Prompts are sent as tokens, those that the model here would be given; where the server takes none, as text. A
    request that fails by a limit of rate, an error of the server's, silence or nonsense is sent again after a pause
    that grows.

    Args:
        chunks: What is to be made.
        asked: Prompts.
        sampling: How they are continued.
        add: Takes rows.
        tokenizer: Tokenizer of the model, which counts tokens.
        url: Address of the server.
        model: What the server calls the model.
        key_variable: Environment variable with the key of the server.
        timeout: Seconds that an answer may take.
        retries: How often a request that failed is sent again.
        concurrency: Requests at a time.

    Raises:
        UsageError: If the server cannot be reached, refuses, or goes on failing.
    """
    asks = _Asker(sampling, tokenizer, url, model, _key(key_variable), retries)
    todo = ((chunk, asked[place]) for chunk in chunks for place in chunk.places)
    asyncio.run(_work(asks, todo, add, timeout, concurrency))


async def _work(
    asks: _Asker,
    todo: Iterator[tuple[Chunk, Asked]],
    add: Callable[[list[dict[str, Any]]], None],
    timeout: float,
    concurrency: int,
) -> None:
    async with _client(asks.url, asks.key, timeout, asks.retries) as client:

        async def worker() -> None:
            for chunk, one in todo:
                add([await asks(client, chunk, one)])

        await asyncio.gather(*(worker() for _ in range(concurrency)))


class _Asker:
    """Asks for the completions of a prompt."""

    def __init__(self, sampling: Sampling, tokenizer: Tokenizer, url: str, model: str, key: str, retries: int) -> None:
        self.sampling, self.tokenizer, self.retries = sampling, tokenizer, retries
        self.url, self.model, self.key = url, model, key
        self.takes_tokens: bool | None = None  # not known yet

    async def __call__(self, client: AsyncOpenAI, chunk: Chunk, one: Asked) -> dict[str, Any]:
        """A row of samples.

        Raises:
            UsageError: If the server does not give them.
        """
        import openai

        pause, problem = PAUSE, ""
        for attempt in range(self.retries + 1):
            try:
                answer = await self._complete(client, chunk, one)
                return self._row(chunk, one, answer)
            except (json.JSONDecodeError, _Nonsense, openai.APIResponseValidationError) as error:
                problem = f"its answer makes no sense: {error}"
            except openai.APIStatusError as error:
                raise self._failed(one, f"it says {error.status_code}: {error.message}") from error
            except openai.APITimeoutError as error:
                raise self._failed(one, "it gives no answer in time; give it longer by --server_timeout") from error
            except openai.APIConnectionError as error:
                raise self._failed(one, f"it cannot be reached: {error.__cause__ or error}") from error
            if attempt < self.retries:
                await asyncio.sleep(pause)
                pause *= 2
        raise self._failed(one, problem)

    async def _complete(self, client: AsyncOpenAI, chunk: Chunk, one: Asked) -> Any:
        """The server's answer to a prompt as tokens, or as text where it takes no tokens."""
        import openai

        sampling = self.sampling
        create = functools.partial(
            client.completions.create, model=self.model, n=sampling.num_samples, max_tokens=sampling.max_new_tokens,
            temperature=chunk.temperature, top_p=sampling.top_p, seed=chunk.seed,
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
        )  # fmt: skip
        refusal: openai.APIStatusError | None = None
        if self.takes_tokens is not False:
            # None of the penalties and filters that a model's own generation config may hold.
            own = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": list(sampling.ends)}
            try:
                answer = await create(prompt=one.ids, extra_body=own)
                self.takes_tokens = True
                return answer
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if self.takes_tokens:
                    raise
                refusal = error
        answer = await create(prompt=self._text(one))
        if self.takes_tokens is None:
            self.takes_tokens = False
            log.warning(
                "The server takes no prompts as tokens (%s); they are sent as text, which it tokenises by itself.",
                masked(refusal.message, self.key) if refusal else "",
            )
        return answer

    def _text(self, one: Asked) -> str:
        """A prompt without the begin token, which the server puts before a text."""
        ids = one.ids[1:] if one.ids[0] == self.tokenizer.bos_token_id else one.ids
        return self.tokenizer.decode(ids)  # type: ignore[return-value]

    def _row(self, chunk: Chunk, one: Asked, answer: Any) -> dict[str, Any]:
        choices = sorted(getattr(answer, "choices", None) or [], key=lambda choice: choice.index)
        if len(choices) != self.sampling.num_samples:
            raise _Nonsense(f"{len(choices)} completions instead of {self.sampling.num_samples}")
        for choice in choices:
            if not isinstance(choice.text, str) or choice.finish_reason not in ("stop", "length"):
                raise _Nonsense(
                    f"a completion that ended by {choice.finish_reason!r}, with the text {choice.text!r:.40}"
                )
        responses = [choice.text for choice in choices]
        finished = [choice.finish_reason == "stop" for choice in choices]
        # What made it stop: a text of ours, or else a token, which has no text.
        closing = [getattr(choice, "stop_reason", None) for choice in choices]
        whole = [text + (end if isinstance(end, str) else "") for text, end in zip(responses, closing, strict=True)]
        counts = map(len, encode(self.tokenizer, whole, templated=True))
        tokens = [
            count + (ended and not isinstance(end, str))
            for count, ended, end in zip(counts, finished, closing, strict=True)
        ]
        return Samples(one.row, one.prompt, chunk.temperature, responses, tokens, finished)._asdict()

    def _failed(self, one: Asked, problem: str) -> UsageError:
        return UsageError(
            f"row {one.row}: the server {self.url} has not given completions: {masked(problem, self.key).rstrip('.')}. "
            "What was made before is kept; call the command again to go on."
        )


class _Nonsense(Exception):
    """An answer that is none."""


def _key(variable: str | None) -> str:
    if variable is None:
        return NO_KEY  # the client wants one
    if variable not in os.environ:
        raise UsageError(f"--server_key_variable: there is no environment variable {variable}; set it to the key.")
    return os.environ[variable]


def _client(url: str, key: str, timeout: float, retries: int) -> AsyncOpenAI:
    try:
        from openai import AsyncOpenAI
    except ImportError:
        raise UsageError('--server needs openai: pip install -c constraints.txt -e ".[server]".') from None
    return AsyncOpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries)
