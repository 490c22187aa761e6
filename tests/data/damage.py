"""Rows that went wrong in every way that JSON allows, for tests of what is made of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from shapes import TOOLS

from dpo_lightning.data.auto import ALIASES
from dpo_lightning.data.example import PreferenceExample, UnusableRow
from dpo_lightning.data.formats import Format
from dpo_lightning.data.reading import begin
from dpo_lightning.errors import UsageError

NAMES = sorted({alias for aliases in ALIASES.values() for alias in aliases} | {"input", "context", "choices", "id"})


def nested(depth: int) -> list:
    """Lists in lists."""
    inner: list = []
    for _ in range(depth):
        inner = [inner]
    return inner


DEEP = nested(5_000)


def _deep() -> list:
    """A value that hypothesis does not try to print."""
    return DEEP


PHRASES = ["Hi", "Q: 2+2\nA:", "Q: 2+2\nA: 4", "\n\nAssistant: x", "tie", "True", "null", '[{"role": "user"}]']
WORDS = st.sampled_from(["", " ", "\n", "a", "1", "[]", "{", "\ud83d", "a\udfff", *PHRASES])
NUMBERS = st.sampled_from([0, 1, 2, -1, 10**400, 0.5, 1.0, float("nan"), float("inf"), -0.0])
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
KEYS = st.sampled_from(["role", "content", "from", "value", "type", "text", "tool_calls", "name", "\ud83d"])
SPEAKERS = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "nobody", "", None, 3, ["user"]])
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": SPEAKERS, "content": SCALARS}),
    st.fixed_dictionaries({"from": SPEAKERS, "value": SCALARS}),
    st.dictionaries(KEYS, SCALARS, max_size=3),
)
JSON = st.recursive(
    st.one_of(SCALARS, MESSAGE, st.lists(MESSAGE, max_size=3), st.builds(_deep)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=6,
)
JUNK = st.one_of(
    st.sampled_from([None, True, 0, 3, 0.5, float("nan"), "", "\ud83d", [], {}, [[]], [None], [{}], TOOLS, "x"]).map(
        copy.deepcopy  # what is drawn may be damaged further
    ),
    JSON,
)


DIALOGUE = st.lists(
    st.sampled_from(
        [{"role": role, "content": words} for role in ("user", "assistant", "tool") for words in ("a", "b")]
    )
    | st.sampled_from([{"from": "human", "value": "a"}, {"from": "gpt", "value": "a"}])
    | st.sampled_from([{"role": "assistant", "content": ""}, {"role": "system", "content": "a"}]),
    min_size=1,
    max_size=4,
)
LIKELY = st.one_of(WORDS, WORDS, DIALOGUE, DIALOGUE, st.lists(WORDS, max_size=3), st.lists(NUMBERS, max_size=3), JSON)


def scrambled(columns: Sequence[str] = ()) -> st.SearchStrategy[dict[str, Any]]:
    """Anything in columns of known names, some of them always there."""
    more = st.dictionaries(st.sampled_from(NAMES), LIKELY, max_size=5 - min(len(columns), 4))
    return st.builds(dict.__or__, more, st.fixed_dictionaries(dict.fromkeys(columns, LIKELY)))


@st.composite
def damaged(draw: st.DrawFn, rows: Sequence[dict[str, Any]]) -> Any:
    """A row that was good until one or two places in it were dropped, replaced or emptied."""
    row: Any = copy.deepcopy(draw(st.sampled_from(list(rows))))
    for _ in range(draw(st.integers(0, 2))):
        holder, key = draw(st.sampled_from(_places(row) or [(None, None)]))
        if holder is None:
            return draw(JUNK)
        change = draw(st.sampled_from(["drop", "replace", "empty", "double", "wrap"]))
        if change == "drop":
            del holder[key]
        elif change == "replace":
            holder[key] = draw(JUNK)
        elif change == "empty":
            holder[key] = type(holder[key])() if holder[key] is not None else None
        elif change == "double" and isinstance(holder, list):
            holder.insert(key, holder[key])
        else:
            holder[key] = [holder[key]]
    return row


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in lists and objects, outermost ones among them as often as all inner ones."""
    if value is DEEP or not isinstance(value, (list, dict)):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    inner = [place for key in keys for place in _places(value[key])]
    return [(value, key) for key in keys] * max(1, len(inner) // max(1, len(keys))) + inner


def check(rows: Sequence[Any], shape: Format | None) -> Format | None:
    """Read rows; whatever they hold, each makes sound examples, or reasons in words. Returns the shape found."""
    try:
        reading = begin(iter(enumerate(rows, start=1)), shape, "rows")
    except UsageError as error:
        str(error).encode()
        return None
    found = list(reading.examples())
    assert [number for number, _ in found] == list(range(1, len(rows) + 1))
    for number, items in found:
        assert items, "a row vanished"
        for item in items:
            if isinstance(item, UnusableRow):
                assert item.reason
                assert item.detail
                str(item).encode()
            else:
                _check_example(item, number)
    return reading.format


def _check_example(example: PreferenceExample, number: int) -> None:
    assert type(example) is PreferenceExample
    assert example.row == number
    assert example.responses
    # as which it goes from process to process
    json.dumps([example.prompt, example.responses, example.tools], ensure_ascii=False).encode()
    kinds = {type(side) for side in example.responses}
    assert kinds in ({str}, {list})
    if kinds == {str}:
        assert example.tools is None
        assert example.prompt is None or isinstance(example.prompt, str)
        return
    assert isinstance(example.prompt, list)
    assert any(message["content"].strip() for message in example.prompt)
    for messages in (example.prompt, *example.responses):
        assert messages
        for message in messages:
            assert isinstance(message["role"], str)
            assert isinstance(message["content"], str)
    for response in example.responses:
        assert response[0]["role"] == response[-1]["role"] == "assistant"
