"""Examples to token ids: one policy for the boundary, the end token and truncation.

The prompt's tokens are those that the model sees at inference, the same for every response. A response's tokens
are what tokenising prompt and response together adds to them; where tokens merge across the boundary, so that the
prompt is no prefix of the whole, the response is tokenised by itself, and counted. A text response is closed by the
end token; behind messages stands what their chat template writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress, islice, pairwise
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.data.chat import Chat, RenderedExample, Renderer, Segment
from dpo_lightning.data.dialogue import NO_PROMPT, NO_RESPONSE, NOTHING_SHARED, word_ends
from dpo_lightning.data.example import PreferenceExample, TokenizedExample, UnusableRow
from dpo_lightning.errors import UsageError

TOO_LONG = "too long"
EQUAL = "equal responses"
NOTHING_LEFT = "nothing left to score"
NUM_SPLITS = 20  # places tried for the end of a prompt that responses share


class Notes(NamedTuple):
    """What happened to an example on its way, as counts.

    Attributes:
        cut_prompt: Prompts cut.
        cut_responses: Responses cut at their right, and so without end token.
        no_end: Responses without end token, though they are whole and one was asked for.
        merged: Responses tokenised by themselves, since tokens merge across the boundary.
        two_begins: Prompts with two begin tokens: their text has one, and the tokenizer adds one.
        special: 1 where a text holds a special token, which it becomes.
        run_on: 1 where a response's word follows the prompt without a space or line between them.
    """

    cut_prompt: int = 0
    cut_responses: int = 0
    no_end: int = 0
    merged: int = 0
    two_begins: int = 0
    special: int = 0
    run_on: int = 0


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """How examples become tokens.

    Args:
        tokenizer: Tokenizer of the model.
        max_length: Most tokens of prompt and response together.
        max_prompt_length: Most tokens of a prompt.
        truncation: Keep what is too long, cut, or drop it. Responses are cut at their right.
        truncation_side: Where a prompt is cut; its begin token stays.
        chat: How messages become text.
        num_responses: Keep the best so many responses.
        end_token: Close responses that are text by the end token.
    """

    tokenizer: Tokenizer
    max_length: int
    max_prompt_length: int | None = None
    truncation: Literal["keep", "drop"] = "keep"
    truncation_side: Literal["left", "right"] = "left"
    chat: Chat = field(default_factory=Chat)
    num_responses: int | None = None
    end_token: bool = True

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise UsageError(f"`max_length` must be at least 2 (a prompt and a response token), got {self.max_length}.")
        if self.max_prompt_length is not None and not 1 <= self.max_prompt_length < self.max_length:
            raise UsageError(
                f"`max_prompt_length` must be at least 1 and below `max_length` ({self.max_length}), so that a "
                f"response finds room, got {self.max_prompt_length}."
            )
        for name, choices in (("truncation", ("keep", "drop")), ("truncation_side", ("left", "right"))):
            if getattr(self, name) not in choices:
                raise UsageError(f"`{name}` must be {' or '.join(choices)}, got {getattr(self, name)!r}.")
        if self.num_responses is not None and self.num_responses < 1:
            raise UsageError(f"`num_responses` must be 1 or more, got {self.num_responses}.")

    def __call__(self, examples: Sequence[PreferenceExample]) -> Iterator[tuple[TokenizedExample, Notes] | UnusableRow]:
        """Each example tokenised, with what happened to it, or the reason why it cannot be used."""
        whole_texts = [str(text) for example in examples if example.prompt is None for text in example.responses]
        ids: dict[bool, dict[str, list[int]]] = {False: self._encode(whole_texts, templated=False), True: {}}
        rendered = [self._render(example, ids[False]) for example in examples]
        # Tokenizers are fastest on many texts at once.
        for templated, known in ids.items():
            items = [item for item in rendered if isinstance(item, RenderedExample) and item.templated is templated]
            known |= self._encode({text for item in items for text in _beginnings(item)} - known.keys(), templated)
        for example, item in zip(examples, rendered, strict=True):
            try:
                if isinstance(item, UnusableRow):
                    raise item
                tokens, notes = self._tokenize(item, ids[item.templated])
                special = any(map(self._special_texts.search, _contents(example)))
                yield tokens._replace(row=example.row, response=example.response), notes._replace(special=int(special))
            except UnusableRow as reason:
                yield reason

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.tokenizer, self.chat)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return special_ids(self.tokenizer)

    @cached_property
    def _special_texts(self) -> re.Pattern[str]:
        texts = self.tokenizer.convert_ids_to_tokens(sorted(self._special_ids))
        return re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    @cached_property
    def _unknown(self) -> int | None:
        """The token of all characters that the tokenizer does not know, unless it has another meaning too."""
        tokenizer = self.tokenizer
        others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        return None if tokenizer.unk_token_id in others else tokenizer.unk_token_id

    def _encode(self, texts: Iterable[str], templated: bool) -> dict[str, list[int]]:
        texts = list(texts)
        return dict(zip(texts, encode(self.tokenizer, texts, templated), strict=True))

    def _continues(self, whole: list[int], before: list[int]) -> bool:
        """Whether tokens begin with those of a beginning of their text, and those stand for that beginning alone."""
        return whole[: len(before)] == before and (self._unknown is None or before[-1:] != [self._unknown])

    def _render(self, example: PreferenceExample, ids: dict[str, list[int]]) -> RenderedExample | UnusableRow:
        try:
            item = self._renderer(example._replace(responses=example.responses[: self.num_responses]))
            return self._split(example, ids) if item.prompt is None else item
        except UnusableRow as reason:
            return reason

    def _split(self, example: PreferenceExample, ids: dict[str, list[int]]) -> RenderedExample:
        """Whole texts split where what they share ends with a word and with a token."""
        texts = [str(response) for response in example.responses]
        for place in islice(word_ends(texts), NUM_SPLITS):
            prompt = texts[0][:place]
            ids |= self._encode([prompt], templated=False)
            if prompt.strip() and all(self._continues(ids[text], ids[prompt]) for text in texts):
                kept = texts[: self.num_responses]
                answered = example._replace(prompt=prompt, responses=tuple(text[place:] for text in kept))
                return self._renderer(answered)
        raise UnusableRow(NOTHING_SHARED)

    def _tokenize(self, item: RenderedExample, ids: dict[str, list[int]]) -> tuple[TokenizedExample, Notes]:
        texts = ["".join(piece.text for piece in pieces) for pieces in item.responses]
        if len(set(texts)) < len(texts):
            raise UnusableRow(EQUAL)
        if not all(texts):
            raise UnusableRow(NO_RESPONSE)
        whole_prompt = item.prompt or ""
        prompt, bos = ids[whole_prompt], self.tokenizer.bos_token_id
        responses = [self._response(item, pieces, ids) for pieces in item.responses]
        if not prompt and bos is not None:
            prompt = [bos]
            responses = [response.without_begin(bos) for response in responses]
        elif not prompt and len(responses) == 1 and len(responses[0].ids) > 1:
            # Plain text without a begin token: its own first token is given, and the others are learned.
            prompt, responses = responses[0].ids[:1], [responses[0].from_second()]
        if not prompt:
            raise UnusableRow(
                NO_PROMPT,
                "it has no tokens, the tokenizer has no begin token, and responses to compare need one before them.",
            )
        kept = cut_prompt(prompt, self.max_prompt_length, bos, self.truncation_side)
        room = self.max_length - len(kept)
        cut = [response.cut(room) for response in responses]
        notes = Notes(
            cut_prompt=int(len(kept) < len(prompt)),
            cut_responses=sum(len(response.ids) > room for response in responses),
            no_end=sum(self.end_token and not self._ends(one) for one in responses if len(one.ids) <= room),
            merged=sum(response.merged for response in responses),
            two_begins=int(bos is not None and prompt[:2] == [bos, bos]),
            run_on=int(not item.templated and any(map(_runs_on, [whole_prompt] * len(texts), texts))),
        )
        if self.truncation == "drop" and (notes.cut_prompt or notes.cut_responses):
            longest = len(prompt) + max(len(response.ids) for response in responses)
            raise UnusableRow(TOO_LONG, f"{len(prompt):,} prompt tokens, {longest:,} with the longest response.")
        if not all(any(response.scored) for response in cut):
            raise UnusableRow(
                NOTHING_LEFT,
                f"the prompt has {len(kept):,} tokens of `max_length` {self.max_length:,}; `max_prompt_length` cuts it."
                if room < 1
                else "no token of a response is left behind the prompt.",
            )
        if len({tuple(response.ids) for response in cut}) < len(cut):
            raise UnusableRow(f"{EQUAL} after {'truncation' if notes.cut_responses else 'tokenisation'}")
        scored = [response.scored for response in cut]
        partly = None if all(map(all, scored)) else scored
        return TokenizedExample(kept, [response.ids for response in cut], 0, partly), notes

    def _response(self, item: RenderedExample, pieces: tuple[Segment, ...], ids: dict[str, list[int]]) -> _Response:
        tokens: list[int] = []
        scored: list[bool] = []
        wholes, merged = [ids[text] for text in _beginnings(item._replace(responses=(pieces,)))], False
        for piece, (before, whole) in zip(pieces, pairwise(wholes), strict=True):
            follows = self._continues(whole, before)
            part = whole[len(before) :] if follows else self._alone(piece.text)
            tokens, scored, merged = tokens + part, scored + [piece.scored] * len(part), merged or not follows
        response = _Response(tokens, scored, merged)
        end = self.tokenizer.eos_token_id
        if item.templated or not self.end_token or end is None or response.ids[-1:] == [end]:
            return response
        return _Response([*response.ids, end], [*response.scored, True], merged)

    def _alone(self, text: str) -> list[int]:
        """Tokens of a text that continues something, without the space that some tokenizers put before any text."""
        for before in ("\n", ".", "a"):
            ids = self._encode([before, before + text], templated=True)
            if ids[before] and self._continues(ids[before + text], ids[before]):
                return ids[before + text][len(ids[before]) :]
        return self._encode([text], templated=True)[text]

    def _ends(self, response: _Response) -> bool:
        """Whether a special token closes a response; a template may put a line's end behind it."""
        return not self._special_ids.isdisjoint(compress(response.ids[-3:], response.scored[-3:]))


class _Response(NamedTuple):
    ids: list[int]
    scored: list[bool]
    merged: bool

    def cut(self, room: int) -> _Response:
        return self._replace(ids=self.ids[: max(room, 0)], scored=self.scored[: max(room, 0)])

    def without_begin(self, bos: int) -> _Response:
        return self.from_second() if self.ids[:1] == [bos] else self

    def from_second(self) -> _Response:
        return self._replace(ids=self.ids[1:], scored=self.scored[1:])


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that stand for no text."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {token for token, content in added if content.special}


def cut_prompt(ids: list[int], limit: int | None, bos: int | None, side: str = "left") -> list[int]:
    """A prompt of no more tokens than the limit; cut at its left it keeps its begin token."""
    if limit is None or len(ids) <= limit:
        return ids
    if side == "right":
        return ids[:limit]
    begin = ids[:1] if ids[0] == bos else []
    kept = limit - len(begin)
    return begin + (ids[-kept:] if kept else [])


def encode(tokenizer: Tokenizer, texts: Sequence[str], templated: bool = False) -> list[list[int]]:
    """Token ids of texts that go on: as the tokenizer makes them, less what it puts behind a text.

    Some tokenizers close every text with an end token or a separator; no continuation should follow that. Where a chat
    template wrote the special tokens, none are added.
    """
    if not texts:
        return []
    if templated:
        return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    special = tokenizer("a", return_special_tokens_mask=True, verbose=False)["special_tokens_mask"]
    appended = special[::-1].index(0) if 0 in special else 0
    return [ids[: len(ids) - appended] for ids in tokenizer(list(texts), verbose=False)["input_ids"]]


def _beginnings(item: RenderedExample) -> list[str]:
    """The prompt, and it with every beginning of a response that ends with a piece."""
    texts = [item.prompt or ""]
    for pieces in item.responses:
        text = texts[0]
        for piece in pieces:
            text += piece.text
            texts.append(text)
    return texts


def _contents(example: PreferenceExample) -> Iterator[str]:
    """What people wrote, without what a template adds."""
    for part in (example.prompt, *example.responses):
        if isinstance(part, list):
            yield from (message["content"] for message in part)
        else:
            yield part or ""


def _runs_on(prompt: str, response: str) -> bool:
    return bool(prompt) and not prompt[-1].isspace() and response[0].isalnum()
