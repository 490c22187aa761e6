"""Completions by a server that speaks OpenAI's protocol, such as vLLM's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.data.tokenize import encode
from dpo_lightning.errors import UsageError
from dpo_lightning.generation.plan import Chunk, Sampling
from dpo_lightning.generation.prompts import Asked
from dpo_lightning.generation.samples import Samples
from dpo_lightning.server import Connection, Line, Refused
from dpo_lightning.server.reply import part

log = logging.getLogger(__name__)


def continue_by_server(
    chunks: Sequence[Chunk],
    asked: Sequence[Asked],
    sampling: Sampling,
    add: Callable[[list[dict[str, Any]]], None],
    *,
    tokenizer: Tokenizer,
    connection: Connection,
) -> None:
    """Rows of chunks by a server, each as soon as it is there.

    Prompts are sent as tokens, those that the model here would be given; where the server takes none, as text.

    Args:
        chunks: What is to be made.
        asked: Prompts.
        sampling: How they are continued.
        add: Takes rows.
        tokenizer: Tokenizer of the model, which counts tokens.
        connection: Where the server is.

    Raises:
        UsageError: If the server cannot be reached, refuses, or goes on failing.
    """
    line = Line(connection)
    asks = _Asker(sampling, tokenizer, line)
    todo = ((chunk, asked[place]) for chunk in chunks for place in chunk.places)
    jobs = ((one.row, partial(asks, chunk, one)) for chunk, one in todo)
    try:
        for _, row in line.results(lambda: next(jobs, None)):
            add([row])
    finally:
        line.close()


class _Asker:
    """Asks for the completions of a prompt."""

    def __init__(self, sampling: Sampling, tokenizer: Tokenizer, line: Line) -> None:
        self.sampling, self.tokenizer, self.line = sampling, tokenizer, line
        self.takes_tokens: bool | None = None  # not known yet

    def __call__(self, chunk: Chunk, one: Asked) -> dict[str, Any]:
        """A row of samples.

        Raises:
            UsageError: If the server does not give them.
        """
        try:
            return self._ask(chunk, one)
        except UsageError as error:
            raise UsageError(f"row {one.row}: {error}") from error

    def _ask(self, chunk: Chunk, one: Asked) -> dict[str, Any]:
        """Of a prompt as tokens, or as text where the server takes no tokens."""
        # None of the penalties and filters that a model's own generation config may hold.
        own = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": list(self.sampling.ends)}
        refusal = ""
        if self.takes_tokens is not False:
            try:
                row = self.line.ask(partial(self._row, chunk, one, prompt=one.ids, extra_body=own))
                self.takes_tokens = True
                return row
            except Refused as error:
                if self.takes_tokens:
                    raise
                refusal = error.said
        row = self.line.ask(partial(self._row, chunk, one, prompt=self._text(one)))
        if self.takes_tokens is None:
            self.takes_tokens = False
            log.warning(
                "The server takes no prompts as tokens (%s); they are sent as text, which it tokenises by itself.",
                refusal,
            )
        return row

    def _text(self, one: Asked) -> str:
        """A prompt without the begin token, which the server puts before a text."""
        ids = one.ids[1:] if one.ids[0] == self.tokenizer.bos_token_id else one.ids
        return self.tokenizer.decode(ids)  # type: ignore[return-value]

    def _row(self, chunk: Chunk, one: Asked, client: Any, **prompt: Any) -> dict[str, Any]:
        sampling = self.sampling
        answer = self.line.receive(
            client.completions, model=self.line.connection.model,
            n=sampling.num_samples, max_tokens=sampling.max_new_tokens, temperature=chunk.temperature,
            top_p=sampling.top_p, seed=chunk.seed,
            **({"stop": list(sampling.stop)} if sampling.stop else {}), **prompt,
        )  # fmt: skip
        choices = sorted(part(answer, "choices", kind=list), key=lambda choice: part(choice, "index", kind=int))
        if len(choices) != sampling.num_samples:
            raise ValueError(f"{len(choices)} completions instead of {sampling.num_samples}")
        responses = [part(choice, "text", kind=str) for choice in choices]
        ended_by = [part(choice, "finish_reason", kind=str) for choice in choices]
        if not {*ended_by} <= {"stop", "length"}:
            raise ValueError(f"completions ended by {', '.join(sorted({*ended_by}))}")
        finished = [reason == "stop" for reason in ended_by]
        # What made it stop: a text of ours, or else a token, which has no text.
        closing = [choice.get("stop_reason") for choice in choices]
        whole = [text + (end if isinstance(end, str) else "") for text, end in zip(responses, closing, strict=True)]
        counts = map(len, encode(self.tokenizer, whole, templated=True))
        tokens = [
            count + (ended and not isinstance(end, str))
            for count, ended, end in zip(counts, finished, closing, strict=True)
        ]
        return Samples(one.row, one.prompt, chunk.temperature, responses, tokens, finished)._asdict()
