"""Where a prompt ends and its responses begin, when some of it is messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dpo_lightning.data.cells import as_messages, as_text, is_messages, wrong_type
from dpo_lightning.data.example import Message, PreferenceExample, UnusableRow

DIFFER_EARLIER = "chosen and rejected differ before the last answer"
NO_ANSWER = "no answer of the assistant's behind the prompt"
NO_PROMPT = "empty prompt"
NO_RESPONSE = "empty response"
NOTHING_SHARED = "chosen and rejected share no beginning that ends with a word"
PROMPT_ANSWERED = "the prompt ends with an answer"
PROMPT_ELSEWHERE = "the prompt is not what its responses answer"
TWO_SYSTEMS = "two system messages that differ"


class Setting(NamedTuple):
    """What stands before an answer besides its prompt.

    Attributes:
        system: A system message.
        history: Earlier turns.
        tools: Tools that the model may call.
    """

    system: str = ""
    history: Sequence[Message] = ()
    tools: list[object] | None = None


def answered(
    prompt: object, responses: Sequence[object], names: Sequence[str] = (), setting: Setting | None = None
) -> PreferenceExample:
    """An example of a prompt and its responses, each as text or as messages.

    Where all are text it stays text, unless there is a setting, be it empty: rows of one source are alike. Responses
    given as messages may be the answer alone or repeat the prompt.

    Args:
        prompt: The prompt.
        responses: The responses, best first.
        names: What messages call the prompt and each response.
        setting: What else the model is given; None where no column says anything of it.

    Raises:
        UnusableRow: If the responses answer different prompts, or nothing is asked or answered.
    """
    where, *places = names or ("the prompt", *(f"response {number}" for number in range(1, len(responses) + 1)))
    if isinstance(prompt, str) and not prompt.strip():
        raise UnusableRow(NO_PROMPT, f"{where} is blank; fill it, or leave the row out.")
    if setting is None and isinstance(prompt, str) and all(isinstance(side, str) for side in responses):
        return PreferenceExample(as_text(prompt, where), tuple(map(as_text, responses, places)))
    sides = [(place, _messages(side, place, "assistant")) for place, side in zip(places, responses, strict=True)]
    asked, setting = _messages(prompt, where, "user"), setting or Setting()
    if isinstance(prompt, str) and all(side[0]["role"] != "assistant" for _, side in sides):
        asked, sides = _asked_within(asked[0], where, sides)
    elif isinstance(prompt, str):
        asked = [*setting.history, *asked]
    else:
        sides = [(place, side[len(asked) :] if side[: len(asked)] == asked else side) for place, side in sides]
        if asked[-1]["role"] == "assistant":
            raise UnusableRow(PROMPT_ANSWERED, f"{where} must end with what is asked; cut its last message off.")
    for place, side in sides:
        if other := _other(side):
            raise UnusableRow(
                PROMPT_ELSEWHERE,
                f"{place} holds a message of role {other!r:.40} that {where} lacks; give the answer alone, or behind "
                "the prompt's own messages.",
            )
    if any(turn not in asked for turn in setting.history):
        raise UnusableRow(
            PROMPT_ELSEWHERE, f"earlier turns have a column, and messages with {where} lack them; join the two."
        )
    return _checked(_with_system(asked, setting.system), sides, setting.tools)


def shared(sides: Sequence[tuple[str, list[Message]]], tools: list[object] | None = None) -> PreferenceExample:
    """An example of dialogues that have their beginning in common, each behind what messages call it."""
    length, lengths = 0, [len(side) for _, side in sides]
    for together in zip(*(side for _, side in sides), strict=False):
        if any(message != together[0] for message in together):
            break
        length += 1
    if length == min(lengths) == max(lengths):
        length -= 1  # the same dialogue: its last answer is the response
    return _checked(sides[0][1][:length], [(place, side[length:]) for place, side in sides], tools)


def word_ends(texts: Sequence[str]) -> Iterator[int]:
    """Places, last first, where what some texts share ends with a word or a line, and each of them goes on."""
    shortest = min(map(len, texts))
    alike = next((place for place in range(shortest) if len({text[place] for text in texts}) > 1), shortest)
    for place in range(min(alike, shortest - 1), 0, -1):
        before, behind = texts[0][place - 1], [text[place].isspace() for text in texts]
        if (not before.isspace() and all(behind)) or (before == "\n" and not any(behind)):
            yield place


def turns(messages: list[Message], every: bool, setting: Setting) -> PreferenceExample:
    """An example of one dialogue: its prompt ends before its first answer, or before its last."""
    messages = _with_system(messages, setting.system)
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise UnusableRow(NO_ANSWER, "no message has the role 'assistant'.")
    if messages[-1]["role"] != "assistant":
        raise UnusableRow(
            NO_ANSWER, f"the dialogue ends with a message of role {messages[-1]['role']!r:.40}; cut it off."
        )
    start = answers[0] if every else answers[-1]
    _check_asked(messages[:start])
    _check_answers("the dialogue", messages[start:])
    return PreferenceExample(messages[:start], (messages[start:],), tools=setting.tools)


def _messages(value: object, where: str, role: str) -> list[Message]:
    """Messages as they are, and text as a message of a role."""
    if isinstance(value, str):
        return [{"role": role, "content": as_text(value, where)}]
    if not is_messages(value):
        raise wrong_type(where, "text or messages", value)
    return as_messages(value, where)


def _asked_within(
    question: Message, where: str, sides: list[tuple[str, list[Message]]]
) -> tuple[list[Message], list[tuple[str, list[Message]]]]:
    """What dialogues have in common, a question among it, and how each of them goes on."""
    asked = shared(sides).prompt
    assert isinstance(asked, list)
    if not any(message["content"].strip() == question["content"].strip() for message in asked):
        raise UnusableRow(
            PROMPT_ELSEWHERE,
            f"no message before the answers reads like {where}, {question['content']!r:.80}; name another column.",
        )
    return asked, [(place, side[len(asked) :]) for place, side in sides]


def _with_system(messages: list[Message], system: str) -> list[Message]:
    if not system.strip():
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"].strip() != system.strip():
        raise UnusableRow(
            TWO_SYSTEMS, f"the first message is not {system!r:.80}, which the row's system column holds; keep one."
        )
    return messages


def _checked(
    asked: list[Message], sides: Sequence[tuple[str, list[Message]]], tools: list[object] | None
) -> PreferenceExample:
    for place, side in sides:
        if other := _other(side):
            raise UnusableRow(
                DIFFER_EARLIER if len(sides) > 1 else NO_ANSWER,
                f"{place} goes on with a message of role {other!r:.40}, where the assistant's last answer should be.",
            )
        if not side or side[0]["role"] != "assistant" or side[-1]["role"] != "assistant":
            raise UnusableRow(
                NO_ANSWER, f"{place} {'must begin and end with an answer' if side else 'ends with the prompt'}."
            )
        _check_answers(place, side)
    _check_asked(asked)
    return PreferenceExample(asked, tuple(side for _, side in sides), tools=tools)


def _other(messages: Sequence[Message]) -> str | None:
    """Who speaks in a response besides the assistant and its tools."""
    return next((message["role"] for message in messages if message["role"] not in ("assistant", "tool")), None)


def _check_asked(messages: Sequence[Message]) -> None:
    if not any(message["content"].strip() for message in messages if message["role"] != "assistant"):
        raise UnusableRow(NO_PROMPT, "nothing is asked before the answers; if another column holds it, name a format.")


def _check_answers(place: str, messages: Sequence[Message]) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not all(answer["content"].strip() or answer.get("tool_calls") for answer in answers):
        raise UnusableRow(NO_RESPONSE, f"{place} holds an answer without a word.")
