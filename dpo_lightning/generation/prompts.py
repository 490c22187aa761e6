"""Prompts of a file, and the tokens that a model is given of them: those that it is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.data.cells import as_text, is_messages
from dpo_lightning.data.chat import OWN, Chat, RenderedExample, Renderer
from dpo_lightning.data.dialogue import answered
from dpo_lightning.data.example import PreferenceExample, UnusableRow
from dpo_lightning.data.files import as_source
from dpo_lightning.data.reading import begin
from dpo_lightning.data.sources import Row, Source
from dpo_lightning.data.tokenize import cut_prompt, encode, special_ids
from dpo_lightning.errors import UsageError
from dpo_lightning.paths import resolve
from dpo_lightning.scorers import Prompt

Numbered = tuple[int, Prompt]  # the number of its row
PLACE = "{prompt}"
PROMPT = "prompt"


class Asked(NamedTuple):
    """A prompt and what the model is given.

    Attributes:
        row: Number of its row, counted from 1; in JSON Lines that of its line.
        prompt: Text or messages, as they stand there.
        ids: Tokens.
    """

    row: int
    prompt: Prompt
    ids: list[int]


def read_prompts(prompts: str | Source, column: str | None = None, max_prompts: int | None = None) -> list[Numbered]:
    """The prompts of a file with the numbers of their rows.

    Args:
        prompts: A file or source of rows that data modules read.
        column: Column of the prompt, as text or messages; prompt unless named, or where there is none, what a data
            module takes for the prompt of a row.
        max_prompts: Take the first so many.

    Raises:
        UsageError: If there are none, or one cannot be used.
    """
    source = as_source(prompts)
    rows = list(islice(source.numbered(), max_prompts))
    if not rows:
        raise UsageError(f"{source} holds no prompts; give at least one row with a column {column or PROMPT!r}.")
    if column is None and isinstance(rows[0][1], Mapping) and PROMPT not in rows[0][1]:
        return _of_data(rows, str(source))
    return [(number, _prompt(row, column or PROMPT, f"{source}, row {number}")) for number, row in rows]


def _of_data(rows: Sequence[tuple[int, Row]], source: str) -> list[Numbered]:
    """Prompts of rows that have them in another shape, such as whole dialogues."""
    found: list[Numbered] = []
    for number, (first, *_) in begin(iter(rows), None, source).examples():
        if isinstance(first, UnusableRow):
            raise UsageError(f"{source}, row {number}: {first}")
        if first.prompt is None:
            raise UsageError(
                f"{source}, row {number}: what is the prompt is only known from the tokens of both responses; name a "
                "column that holds it by --column."
            )
        found.append((number, first.prompt))
    return found


def _prompt(row: Row, column: str, where: str) -> Prompt:
    value = row.get(column) if isinstance(row, Mapping) else None
    if not isinstance(value, str) and not is_messages(value):
        has = ", ".join(map(repr, row)) if isinstance(row, Mapping) else repr(row)[:80]
        raise UsageError(
            f"{where}: column {column!r} must hold a prompt, text or messages, got {value!r:.80}; the row has {has}. "
            "Name another column by --column, or mend the row."
        )
    try:
        if isinstance(value, str):
            return as_text(value, f"column {column!r}")
        prompt = answered(value, (), (f"column {column!r}",)).prompt
    except UnusableRow as reason:
        raise UsageError(f"{where}: {str(reason).replace('`data.init_args.format`', '--column')}") from None
    assert prompt is not None
    return prompt


def read_template(template: str) -> str | None:
    r"""A text that prompts are put into.

    Args:
        template: The text itself, ``\n`` in it a new line, or the path of a file with it, whose last line end does not
            count; nothing for none.

    Raises:
        UsageError: If it has no place for the prompt.
    """
    if not template:
        return None
    if PLACE in template:
        return unescaped(template)
    path = Path(resolve(template)).expanduser()
    try:
        text = path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--template {template!r} has no {PLACE} and is no file that can be read ({error}). Give a text with "
            f"{PLACE} in it, or the path of a file with one."
        ) from None
    if PLACE not in text:
        raise UsageError(f"--template: {template} has no {PLACE}, the place where a prompt is to stand; put it in.")
    return text


def unescaped(text: str) -> str:
    r"""A text of the command line, where shells leave ``\n`` and ``\t`` as they are."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


class PromptEncoding(NamedTuple):
    """How prompts become tokens: those that training on them would give the model.

    Attributes:
        chat: How messages become text.
        max_length: Most tokens of a prompt.
        truncation_side: Where a longer one is cut; at the left it keeps its begin token.
        template: Text that a prompt stands in; of messages the last one does.
    """

    chat: Chat = Chat()
    max_length: int | None = None
    truncation_side: str = "left"
    template: str | None = None

    def encode(self, tokenizer: Tokenizer, prompts: Sequence[Numbered]) -> list[Asked]:
        """Prompts with their tokens.

        Raises:
            UsageError: If one has no tokens, or there is no chat template for it, or that refuses it.
        """
        renderer = _renderer(tokenizer, prompts, self.chat)
        rendered = [_rendered(renderer, row, _put_into(self.template, prompt)) for row, prompt in prompts]
        ids: dict[bool, dict[str, list[int]]] = {}
        for templated in (False, True):
            texts = list({item.prompt or "" for item in rendered if item.templated is templated})
            ids[templated] = dict(zip(texts, encode(tokenizer, texts, templated), strict=True))
        bos = tokenizer.bos_token_id
        asked = []
        for (row, prompt), item in zip(prompts, rendered, strict=True):
            found = ids[item.templated][item.prompt or ""] or ([] if bos is None else [bos])
            if not found:
                raise UsageError(
                    f"row {row}: the prompt is empty, and the tokenizer has no begin token to start from; give it "
                    "some text."
                )
            asked.append(Asked(row, prompt, cut_prompt(found, self.max_length, bos, self.truncation_side)))
        return asked

    def ends(self, tokenizer: Tokenizer, prompts: Sequence[Numbered]) -> list[int]:
        """Tokens that end an answer: the tokenizer's end token, and what the chat template closes an answer with."""
        ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if self.chat.texts or any(not isinstance(prompt, str) for _, prompt in prompts):
            (closing,) = encode(tokenizer, [_renderer(tokenizer, prompts, self.chat).ending()], templated=True)
            special = special_ids(tokenizer)
            ends += [token for token in closing if token in special and token not in ends][:1]
        return ends


def _renderer(tokenizer: Tokenizer, prompts: Sequence[Numbered], chat: Chat) -> Renderer:
    messages = next((row for row, prompt in prompts if chat.texts or not isinstance(prompt, str)), None)
    if messages is not None and chat.source(tokenizer) is None:
        raise UsageError(
            f"row {messages}: the prompt is messages, and the tokenizer has no chat template. Give one by "
            f"--chat.template FILE; for models that know none there are {OWN}."
        )
    return Renderer(tokenizer, chat)


def _rendered(renderer: Renderer, row: int, prompt: Prompt) -> RenderedExample:
    try:
        return renderer(PreferenceExample(prompt, ()))
    except UnusableRow as reason:
        raise UsageError(f"row {row}: {reason}") from None


def _put_into(template: str | None, prompt: Prompt) -> Prompt:
    if template is None:
        return prompt
    if isinstance(prompt, str):
        return template.replace(PLACE, prompt)
    *before, last = prompt
    return [*before, {**last, "content": template.replace(PLACE, last["content"])}]
