"""Where a prompt ends and its responses begin, when some of it is messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dpo_lightning.data.cells import as_messages, as_text
from dpo_lightning.data.example import Message, PreferenceExample, UnusableRow

DIFFER_EARLIER = "chosen and rejected differ before the last answer"
NO_ANSWER = "no answer of the assistant's behind the prompt"
NO_PROMPT = "empty prompt"
NO_RESPONSE = "empty response"
NOTHING_SHARED = "chosen and rejected share no beginning that ends with a word"
PROMPT_ELSEWHERE = "the prompt is not what its responses answer"


def answered(
    prompt: object, responses: Sequence[object], system: str = "", tools: list[object] | None = None
) -> PreferenceExample:
    """An example of a prompt and its responses, each as text or as messages.

    Where all are text it stays text, unless a system message or tools ask for messages. Responses given as messages
    may be the answer alone or repeat the prompt.

    Raises:
        UnusableRow: If the responses answer different prompts, or nothing is asked or answered.
    """
    if isinstance(prompt, str) and not prompt.strip():
        raise UnusableRow(NO_PROMPT)
    if not (system or tools) and isinstance(prompt, str) and all(isinstance(side, str) for side in responses):
        texts = [as_text(side, f"response {number}") for number, side in enumerate(responses, start=1)]
        return PreferenceExample(as_text(prompt, "the prompt"), tuple(texts))
    sides = [_side(side, number) for number, side in enumerate(responses, start=1)]
    if isinstance(prompt, str):
        asked: list[Message] = [{"role": "user", "content": as_text(prompt, "the prompt")}]
        if all(side[0]["role"] != "assistant" for side in sides):
            example = shared(sides)
            asked, sides = list(example.prompt or ()), list(example.responses)  # type: ignore[arg-type]
            if not any(message["content"].strip() == prompt.strip() for message in asked):
                raise UnusableRow(
                    PROMPT_ELSEWHERE, f"no message before the answers reads {prompt!r:.80}; name another prompt column."
                )
    else:
        asked = as_messages(prompt, "the prompt")
        sides = [side[len(asked) :] if side[: len(asked)] == asked else side for side in sides]
    if system and asked[0]["role"] != "system":
        asked = [{"role": "system", "content": system}, *asked]
    return _checked(asked, sides, tools)


def shared(sides: Sequence[list[Message]], tools: list[object] | None = None) -> PreferenceExample:
    """An example of dialogues that have their beginning in common."""
    length = 0
    for together in zip(*sides, strict=False):
        if any(message != together[0] for message in together):
            break
        length += 1
    if length == min(map(len, sides)) == max(map(len, sides)):
        length -= 1  # the same dialogue: its last answer is the response
    return _checked(sides[0][:length], [side[length:] for side in sides], tools)


def word_ends(texts: Sequence[str]) -> Iterator[int]:
    """Places, last first, where what some texts share ends with a word or a line, and each of them goes on."""
    shortest = min(map(len, texts))
    alike = next((place for place in range(shortest) if len({text[place] for text in texts}) > 1), shortest)
    for place in range(min(alike, shortest - 1), 0, -1):
        before, behind = texts[0][place - 1], [text[place].isspace() for text in texts]
        if (not before.isspace() and all(behind)) or (before == "\n" and not any(behind)):
            yield place


def turns(messages: list[Message], every: bool, tools: list[object] | None = None) -> PreferenceExample:
    """An example of one dialogue: its prompt ends before its first answer, or before its last."""
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise UnusableRow(NO_ANSWER)
    if messages[-1]["role"] != "assistant":
        raise UnusableRow(NO_ANSWER, f"the dialogue ends with a message of the {messages[-1]['role']}'s; cut it off.")
    start = answers[0] if every else answers[-1]
    if start == 0:
        raise UnusableRow(NO_PROMPT, "the dialogue begins with an answer.")
    _check_answers(messages[start:])
    return PreferenceExample(messages[:start], (messages[start:],), tools=tools)


def _side(value: object, number: int) -> list[Message]:
    where = f"response {number}"
    if isinstance(value, str):
        return [{"role": "assistant", "content": as_text(value, where)}]
    return as_messages(value, where)


def _checked(asked: list[Message], sides: list[list[Message]], tools: list[object] | None) -> PreferenceExample:
    if not any(message["content"].strip() for message in asked):
        raise UnusableRow(NO_PROMPT)
    for side in sides:
        if any(message["role"] not in ("assistant", "tool") for message in side):
            raise UnusableRow(DIFFER_EARLIER)
        if not side or side[0]["role"] != "assistant" or side[-1]["role"] != "assistant":
            raise UnusableRow(NO_ANSWER)
        _check_answers(side)
    return PreferenceExample(asked, tuple(sides), tools=tools)


def _check_answers(messages: Sequence[Message]) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not all(answer["content"].strip() or answer.get("tool_calls") for answer in answers):
        raise UnusableRow(NO_RESPONSE)
