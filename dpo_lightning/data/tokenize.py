"""Examples to token ids: one policy for the boundary, the end token and truncation.

The prompt's tokens are those that the model sees at inference, the same for every response. A response's tokens
are what tokenising prompt and response together adds to them; where tokens merge across the boundary, so that the
prompt is no prefix of the whole, the response is tokenised by itself, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.data.example import PreferenceExample, TokenizedExample
from dpo_lightning.data.formats import UnusableRow
from dpo_lightning.data.report import DataReport
from dpo_lightning.errors import UsageError

MERGED = "responses tokenised by themselves, since tokens merge across the boundary"
CUT_PROMPT = "prompts cut at their left"
CUT_RESPONSE = "responses cut at their right, without end token"
NO_END = "responses without end token, since the tokenizer has none: a model learns from them not to stop"
TWO_BEGINS = "prompts with two begin tokens: their text begins with one, and the tokenizer adds one"
CHUNK = 1_000


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """How examples become tokens.

    Args:
        tokenizer: Tokenizer of the model.
        max_length: Most tokens of prompt and response together; responses are cut at their right.
        max_prompt_length: Most tokens of a prompt; it is cut at its left but for a begin token, since the end of a
            dialogue matters most.
    """

    tokenizer: Tokenizer
    max_length: int
    max_prompt_length: int | None = None

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise UsageError(f"`max_length` must be at least 2 (a prompt and a response token), got {self.max_length}.")
        if self.max_prompt_length is not None and not 1 <= self.max_prompt_length < self.max_length:
            raise UsageError(
                f"`max_prompt_length` must be at least 1 and below `max_length` ({self.max_length}), so that a "
                f"response finds room, got {self.max_prompt_length}."
            )

    def __call__(self, examples: Sequence[PreferenceExample], report: DataReport) -> Iterator[TokenizedExample]:
        """Tokenised examples; what is dropped, merged or cut is counted in the report."""
        for start in range(0, len(examples), CHUNK):
            chunk = examples[start : start + CHUNK]
            prompts = iter(encode(self.tokenizer, [example.prompt for example in chunk]))
            texts = [example.prompt + response for example in chunk for response in example.responses]
            wholes = iter(encode(self.tokenizer, texts))
            for example in chunk:
                prompt, whole = next(prompts), [next(wholes) for _ in example.responses]
                try:
                    tokenized = self._one(example, prompt, whole, report)
                except UnusableRow as reason:
                    report.dropped[str(reason)] += 1
                    continue
                report.kept += 1
                report.prompt_tokens += len(tokenized.prompt_ids)
                report.response_tokens += sum(map(len, tokenized.response_ids))
                yield tokenized

    def _one(
        self, example: PreferenceExample, prompt: list[int], wholes: list[list[int]], report: DataReport
    ) -> TokenizedExample:
        if len(set(example.responses)) < len(example.responses):
            raise UnusableRow("equal responses")
        merged, responses = 0, []
        for text, whole in zip(example.responses, wholes, strict=True):
            if whole[: len(prompt)] == prompt:
                response = whole[len(prompt) :]
            else:
                response = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                merged += 1
            responses.append(self._with_end(response))
        bos = self.tokenizer.bos_token_id
        if not prompt and bos is not None:
            prompt = [bos]
            responses = [response[1:] if response[:1] == prompt else response for response in responses]
        if not prompt:
            raise UnusableRow("empty prompt, and the tokenizer has no begin token")
        kept = self._cut_prompt(prompt)
        room = self.max_length - len(kept)
        cut = [response[:room] for response in responses]
        if not all(example.responses):
            raise UnusableRow("empty response")
        if room < 1:
            raise UnusableRow("prompt leaves no room for a response token (max_prompt_length cuts prompts)")
        if not all(cut):
            raise UnusableRow("no response token")
        if len(set(map(tuple, cut))) < len(cut):
            raise UnusableRow(f"equal responses after {'truncation' if cut != responses else 'tokenisation'}")
        report.noted[MERGED] += merged
        report.noted[CUT_PROMPT] += len(kept) < len(prompt)
        report.noted[CUT_RESPONSE] += sum(len(response) > room for response in responses)
        report.noted[NO_END] += len(responses) if self.tokenizer.eos_token_id is None else 0
        report.noted[TWO_BEGINS] += prompt[:2] == [bos, bos]
        return TokenizedExample(kept, cut, example.row)

    def _with_end(self, response: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return response if end is None or response[-1:] == [end] else [*response, end]

    def _cut_prompt(self, prompt: list[int]) -> list[int]:
        limit = self.max_prompt_length
        if limit is None or len(prompt) <= limit:
            return prompt
        begin = prompt[:1] if prompt[0] == self.tokenizer.bos_token_id else []
        kept = limit - len(begin)
        return begin + (prompt[-kept:] if kept else [])


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that go on: as the tokenizer makes them, less what it puts behind a text.

    Some tokenizers close every text with an end token or a separator; no continuation should follow that.
    """
    if not texts:
        return []
    special = tokenizer("a", return_special_tokens_mask=True, verbose=False)["special_tokens_mask"]
    appended = special[::-1].index(0) if 0 in special else 0
    return [ids[: len(ids) - appended] for ids in tokenizer(list(texts), verbose=False)["input_ids"]]
