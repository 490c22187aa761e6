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
            prompts = iter(self._encode([example.prompt for example in chunk]))
            wholes = iter(self._encode([e.prompt + response for e in chunk for response in e.responses]))
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
        prompt = self._without_end(prompt, example.prompt)
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
        if room < 1 or not all(text and response for text, response in zip(example.responses, cut, strict=True)):
            raise UnusableRow("no response token" if all(example.responses) else "empty response")
        if len(set(map(tuple, cut))) < len(cut):
            raise UnusableRow("equal responses after truncation")
        report.noted[MERGED] += merged
        report.noted[CUT_PROMPT] += len(kept) < len(prompt)
        report.noted[CUT_RESPONSE] += sum(len(response) > room for response in responses)
        return TokenizedExample(kept, cut, example.row)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, verbose=False)["input_ids"]

    def _without_end(self, prompt: list[int], text: str) -> list[int]:
        """A prompt without the end token that some tokenizers append to everything."""
        end = self.tokenizer.eos_token_id
        appended = end is not None and len(prompt) > 1 and prompt[-1] == end
        return prompt[:-1] if appended and not text.endswith(str(self.tokenizer.eos_token)) else prompt

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
