"""Messages to text by a chat template, so that what is scored is exactly what the template adds for an answer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.data.dialogue import answered
from dpo_lightning.data.example import Message, PreferenceExample, UnusableRow
from dpo_lightning.errors import UsageError
from dpo_lightning.paths import resolve

REFUSED = "the chat template refuses the messages"
RENDERED_ANEW = "the chat template renders a prompt differently when an answer follows"
OWN = "package:data/templates/transcript.jinja and package:data/templates/alpaca.jinja"


class Segment(NamedTuple):
    """A piece of a response.

    Attributes:
        text: Its text.
        scored: Whether the assistant wrote it.
    """

    text: str
    scored: bool


class RenderedExample(NamedTuple):
    """A prompt and its responses as text.

    Attributes:
        prompt: The prompt; None where the responses are whole texts that begin with it.
        responses: Each response, piece by piece.
        templated: Whether a chat template wrote the special tokens, so that none are to be added.
    """

    prompt: str | None
    responses: tuple[tuple[Segment, ...], ...]
    templated: bool


@dataclass(frozen=True, kw_only=True)
class Chat:
    """How messages become text.

    Args:
        template: File with a Jinja chat template, instead of the tokenizer's own; for models without one there are
            package:data/templates/transcript.jinja and package:data/templates/alpaca.jinja.
        variables: What the template is given besides messages and tools, as in {enable_thinking: false}.
        texts: Put prompts and responses that are plain text into the template too, as messages of a user and of an
            assistant.
    """

    template: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    texts: bool = False

    def __post_init__(self) -> None:
        given = {"messages", *inspect.signature(Tokenizer.apply_chat_template).parameters} - {"documents"}
        if taken := sorted(given & set(self.variables)):
            raise UsageError(
                f"`data.init_args.chat.variables` cannot set {', '.join(taken)}: no variable of the template's own has "
                "such a name; leave it out."
            )

    def source(self, tokenizer: Tokenizer) -> str | dict[str, str] | None:
        """The template itself, if there is one; a tokenizer may have several by name."""
        if self.template is None:
            return tokenizer.chat_template
        path = Path(resolve(self.template)).expanduser()
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"`data.init_args.chat.template`: cannot read {self.template}: {error}. Give the path of a file with a "
                f"Jinja template in UTF-8; the package has {OWN}."
            ) from error


class Renderer:
    """Examples to text.

    Args:
        tokenizer: Its special tokens are known to the template.
        chat: Which template, and for what.
    """

    def __init__(self, tokenizer: Tokenizer, chat: Chat) -> None:
        self.tokenizer, self.chat, self.template = tokenizer, chat, chat.source(tokenizer)

    def __call__(self, example: PreferenceExample) -> RenderedExample:
        """The texts of an example.

        Raises:
            UnusableRow: If the template refuses the messages, or writes a prompt otherwise once it is answered.
            UsageError: If there is no template, or it is none.
        """
        prompt, responses = example.prompt, example.responses
        if self.chat.texts and isinstance(prompt, str):
            prompt, responses = answered([{"role": "user", "content": prompt}], responses)[:2]
        if not isinstance(prompt, list):
            texts = tuple((Segment(str(response), True),) for response in responses)
            return RenderedExample(prompt, texts, templated=False)
        start = self._render(prompt, True, example.tools)
        pieces = tuple(self._pieces(prompt, start, list(response), example.tools) for response in responses)
        return RenderedExample(start, pieces, templated=True)

    def ending(self) -> str:
        """What the template writes behind an answer; nothing where it refuses a plain dialogue."""
        answer = "Yes."
        dialogue = [{"role": "user", "content": "Are you there?"}, {"role": "assistant", "content": answer}]
        try:
            return self._render(dialogue, False, None).rpartition(answer)[2]
        except UnusableRow:
            return ""

    def _pieces(
        self, prompt: list[Message], start: str, response: list[Any], tools: list[Any] | None
    ) -> tuple[Segment, ...]:
        """What the template adds for the messages of a response, those of the assistant apart from the others."""
        pieces, written = [], start
        for place, message in enumerate(response):
            if message["role"] != "assistant":
                continue
            history = prompt + response[:place]
            if place:
                pieces.append(Segment(_added(written, self._render(history, True, tools)), False))
                written += pieces[-1].text
            pieces.append(Segment(_added(written, self._render([*history, message], False, tools)), True))
            written += pieces[-1].text
        return tuple(pieces)

    def _render(self, messages: list[Message], asks: bool, tools: list[Any] | None) -> str:
        if self.template is None:
            raise UsageError(
                "The rows hold messages, and the tokenizer has no chat template. Give one by `data.init_args.chat: "
                f"{{template: FILE}}`; for models that know none there are {OWN}."
            )
        try:
            text: str = self.tokenizer.apply_chat_template(  # type: ignore[assignment]
                messages,
                tools=tools,
                chat_template=self.template if isinstance(self.template, str) else None,  # or one by name
                add_generation_prompt=asks,
                tokenize=False,
                **self.chat.variables,
            )
        except TemplateSyntaxError as error:
            raise UsageError(
                f"The chat template {self.chat.template or 'of the tokenizer'} is no Jinja template: line "
                f"{error.lineno}: {error.message}. Mend it, or give another by `data.init_args.chat.template`."
            ) from error
        except (TemplateError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UnusableRow(REFUSED, f"{error}. Mend the row, or give another template.") from error
        return text


def _added(before: str, after: str) -> str:
    """What a rendered dialogue has more than its beginning."""
    if after.startswith(before):
        return after[len(before) :]
    same = next(place for place, (a, b) in enumerate(zip(before + "\0", after + "\0", strict=False)) if a != b)
    raise UnusableRow(
        RENDERED_ANEW,
        f"before an answer it ends in {before[same:][-60:]!r}, with one that stands {after[same : same + 60]!r}. "
        "Templates do so that open a think block for an answer, or take such blocks out of earlier answers: switch "
        "that off by `data.init_args.chat: {variables: {enable_thinking: false}}` if the template knows that variable, "
        "learn the last answer alone (Messages: {turns: last}), or give a template that does not.",
    )
