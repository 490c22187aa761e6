"""What a column of a row holds: text, messages, tools, or a reason why the row cannot be used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dpo_lightning.data.example import Message, UnusableRow
from dpo_lightning.data.sources import Row

WRONG_TYPE = "wrong type"
MISSING = "missing column"
HALF_CHARACTER = "text with half a character (a lone surrogate)"
# Who speaks in ShareGPT's dialogues.
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}


def cell(row: Row, column: str) -> Any:
    """What stands in a column."""
    if not isinstance(row, Mapping):
        raise UnusableRow(
            WRONG_TYPE, f'expected an object with named columns like {{"prompt": ...}}, got {_shown(row)}.'
        )
    if column not in row:
        raise UnusableRow(
            MISSING,
            f"there is no column {column!r}; the row has {', '.join(map(repr, row)) or 'none'}. Name other columns by "
            "`data.init_args.format`, or mend the row.",
        )
    return row[column]


def text(row: Row, column: str) -> str:
    """The text in a column."""
    return as_text(cell(row, column), f"column {column!r}")


def as_text(value: Any, where: str) -> str:
    """A text that a tokenizer takes."""
    if not isinstance(value, str):
        raise wrong_type(where, "text", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UnusableRow(HALF_CHARACTER, f"{where} holds one; no encoding has it, so mend the row.") from None
    return value


def optional_text(row: Row, column: str | None) -> str:
    """The text in a column; nothing where no column is named, or the row has none or null."""
    return "" if column is None or row.get(column) is None else text(row, column)


def turns_in(row: Row, column: str | None) -> list[Message]:
    """Earlier turns of a dialogue as messages, from messages or from ``[question, answer]`` each."""
    value, where = None if column is None else row.get(column), f"column {column!r}"
    if value is None or (isinstance(value, (list, str)) and not value):
        return []
    if is_messages(value):
        return as_messages(value, where)
    if not isinstance(value, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in value):
        raise wrong_type(where, "a list of turns, each [question, answer]", value)
    said = [zip(("user", "assistant"), turn, strict=True) for turn in value]
    return [{"role": role, "content": as_text(words, where)} for turn in said for role, words in turn]


def is_messages(value: Any) -> bool:
    """Whether a value looks like a message or a list of them."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping)


def as_messages(value: Any, where: str) -> list[Message]:
    """Messages as ``{"role": ..., "content": ...}``, from that form or ShareGPT's ``{"from": ..., "value": ...}``.

    Keys that hold null are left out: columns of Arrow have every key in every message.
    """
    items = [value] if isinstance(value, Mapping) else value
    if not isinstance(items, list) or not items:
        raise wrong_type(where, "a message or a list of messages", value)
    return [_as_message(item, f"{where}, message {number}") for number, item in enumerate(items, start=1)]


def tools_in(row: Row, column: str | None) -> list[Any] | None:
    """Descriptions of tools: a list of them, or one written as JSON."""
    value, where = None if column is None else row.get(column), f"column {column!r}"
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise UnusableRow(
                WRONG_TYPE, f"{where} must be a list of tools, or one as JSON: {error}. Mend the row."
            ) from None
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise wrong_type(where, "a list of objects that describe tools", value)
    tools: list[Any] = _without_nulls(value, where)
    return tools or None


def wrong_type(where: str, expected: str, value: Any) -> UnusableRow:
    """The reason for a cell that holds something else than it should."""
    return UnusableRow(
        WRONG_TYPE,
        f"{where} must be {expected}, got {_shown(value)}. Name another column by `data.init_args.format`, or mend "
        "the row.",
    )


def _shown(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__}: {value!r:.80}"


def _as_message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise wrong_type(where, 'an object like {"role": "user", "content": ...}', item)
    message: Message = _without_nulls(dict(item), where)
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise wrong_type(f"{where}, `from`", f"one of {', '.join(SPEAKERS)}", speaker)
        message = {"role": SPEAKERS[speaker], "content": message.pop("value", None), **message}
    if not isinstance(message.get("role"), str):
        raise wrong_type(where, "an object with `role` and `content`, or `from` and `value`", item)
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = "".join(_text_of_part(part, where) for part in content)
    if not isinstance(content, str):
        raise wrong_type(f"{where}, its content,", "text", content)
    return {**message, "content": content}


def _text_of_part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise wrong_type(f"{where}, a part of its content,", 'of the form {"type": "text", "text": ...}', part)
    words: str = part["text"]
    return words


def _without_nulls(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        items = [(as_text(key, f"{where}, a key,"), item) for key, item in value.items()]
        return {key: _without_nulls(item, where) for key, item in items if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_nulls(item, where) for item in value]
    return as_text(value, where) if isinstance(value, str) else value
