"""A cell is text, messages or tools, or the reason says which cell it is, what was expected and what to do."""

from __future__ import annotations

from types import MappingProxyType

import pytest
from chat_templates import assistant, system, tool, user
from shapes import TOOLS, gpt, human

from dpo_lightning.data.cells import HALF_CHARACTER, MISSING, WRONG_TYPE, as_messages, cell, text, tools_in, turns_in
from dpo_lightning.data.example import UnusableRow

HALF = "a \ud83d b"
REMEDY = " Name another column by `data.init_args.format`, or mend the row."


def refusal(read, *arguments) -> tuple[str, str]:
    with pytest.raises(UnusableRow) as caught:
        read(*arguments)
    return caught.value.reason, caught.value.detail


def test_text_is_text():
    assert text({"a": " Grüße 🙂\n"}, "a") == " Grüße 🙂\n"
    assert text(MappingProxyType({"a": ""}), "a") == ""


@pytest.mark.parametrize("row", [["prompt"], "prompt", None, 3, True])
def test_a_row_is_an_object(row):
    reason, detail = refusal(cell, row, "prompt")
    assert reason == WRONG_TYPE
    assert detail.startswith('expected an object with named columns like {"prompt": ...}, got ')


def test_a_missing_column_is_named_with_those_that_are_there():
    assert refusal(cell, {"question": "1", "answer": "2"}, "prompt") == (
        MISSING,
        "there is no column 'prompt'; the row has 'question', 'answer'. Name other columns by "
        "`data.init_args.format`, or mend the row.",
    )
    assert "the row has none." in refusal(cell, {}, "prompt")[1]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "null"), (3, "int: 3"), (["a"], "list: ['a']"), ({"a": 1}, "dict: {'a': 1}"), (True, "bool: True")],
)
def test_other_types_are_named_with_column_and_value(value, shown):
    assert refusal(text, {"a": value}, "a") == (WRONG_TYPE, f"column 'a' must be text, got {shown}.{REMEDY}")


def test_long_values_are_cut():
    assert len(refusal(text, {"a": ["word"] * 10_000}, "a")[1]) < 250


def test_half_a_character_is_named():
    assert refusal(text, {"a": HALF}, "a") == (
        HALF_CHARACTER,
        "column 'a' holds one; no encoding has it, so mend the row.",
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (user("a"), [user("a")]),
        ([user("a"), assistant("b")], [user("a"), assistant("b")]),
        ([human("a"), gpt("b")], [user("a"), assistant("b")]),
        ([{"from": "system", "value": "s"}, {"from": "user", "value": "a"}], [system("s"), user("a")]),
        ([{"from": "observation", "value": "4"}], [tool("4")]),
        ([{"from": "chatgpt", "value": "4"}], [assistant("4")]),
        # Columns of Arrow have every key in every message.
        ([{"role": "user", "content": "a", "name": None, "tool_calls": None}], [user("a")]),
        ([{"role": None, "content": None, "from": "human", "value": "a"}], [user("a")]),
        ([{"role": "user", "content": "a", "name": "Ann"}], [{"role": "user", "content": "a", "name": "Ann"}]),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], [user("ab")]),
        ([{"role": "user", "content": ""}], [user("")]),
        # A call of a tool says nothing.
        (
            [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": None}}]}],
            [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}],
        ),
        ([MappingProxyType(user("a"))], [user("a")]),
    ],
)
def test_messages_become_role_and_content(value, expected):
    assert as_messages(value, "column 'a'") == expected


MESSAGES = [user("a"), assistant("b")]


@pytest.mark.parametrize(
    ("value", "beginning"),
    [
        (None, "column 'a' must be a message or a list of messages, got null."),
        ([], "column 'a' must be a message or a list of messages, got list: []."),
        ("hi", "column 'a' must be a message or a list of messages, got str: 'hi'."),
        (["hi"], 'column \'a\', message 1 must be an object like {"role": "user", "content": ...}, got str: \'hi\'.'),
        ([*MESSAGES, None], "column 'a', message 3 must be an object like"),
        ([[user("a")]], "column 'a', message 1 must be an object like"),
        ({}, "column 'a', message 1 must be an object with `role` and `content`, or `from` and `value`, got dict: {}."),
        ([{"content": "a"}], "column 'a', message 1 must be an object with `role` and `content`"),
        ([{"role": 3, "content": "a"}], "column 'a', message 1 must be an object with `role` and `content`"),
        ([{"role": "user"}], "column 'a', message 1, its content, must be text, got null."),
        ([{"role": "user", "content": None}], "column 'a', message 1, its content, must be text, got null."),
        ([{"role": "user", "content": 3}], "column 'a', message 1, its content, must be text, got int: 3."),
        (
            [*MESSAGES, {"role": "user", "content": {}}],
            "column 'a', message 3, its content, must be text, got dict: {}",
        ),
        ([{"from": "human"}], "column 'a', message 1, its content, must be text, got null."),
        (
            [{"from": "narrator", "value": "a"}],
            "column 'a', message 1, `from` must be one of human, user, gpt, chatgpt, assistant, model, bot, tool, "
            "observation, function_response, system, got str: 'narrator'.",
        ),
        ([{"from": ["human"], "value": "a"}], "column 'a', message 1, `from` must be one of human, user"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            'column \'a\', message 1, a part of its content, must be of the form {"type": "text", "text": ...}, got',
        ),
        ([{"role": "user", "content": ["a"]}], "column 'a', message 1, a part of its content, must be of the form"),
        ([{"role": "user", "content": "a", 3: "b"}], "column 'a', message 1, a key, must be text, got int: 3."),
    ],
)
def test_a_bad_message_is_named_with_its_place(value, beginning):
    reason, detail = refusal(as_messages, value, "column 'a'")
    assert reason == WRONG_TYPE
    assert detail.startswith(beginning)
    assert detail.endswith(REMEDY)


@pytest.mark.parametrize(
    "message",
    [
        user(HALF),
        {"role": HALF, "content": "a"},
        {"role": "user", "content": "a", "name": HALF},
        {"role": "user", "content": "a", HALF: 1},
        {"role": "user", "content": "a", "tool_calls": [{"function": {"name": HALF}}]},
        {"role": "user", "content": [{"type": "text", "text": HALF}]},
        human(HALF),
    ],
)
def test_half_a_character_is_found_anywhere_in_a_message(message):
    reason, detail = refusal(as_messages, [user("a"), message], "column 'a'")
    assert reason == HALF_CHARACTER
    assert detail.startswith("column 'a', message 2")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ([], None),
        ("", None),
        (" \n", None),
        ("null", None),
        ("[]", None),
        (TOOLS, TOOLS),
        ('[{"name": "add", "default": null}]', [{"name": "add"}]),
        ([{"name": "add", "parameters": None}], [{"name": "add"}]),
    ],
)
def test_tools_are_a_list_or_json(value, expected):
    assert tools_in({"tools": value}, "tools") == expected
    assert tools_in({}, "tools") is None
    assert tools_in({"tools": value}, None) is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("add", "column 'tools' must be a list of tools, or one as JSON: Expecting value: line 1 column 1 (char 0)."),
        ("[" * 100_000, "column 'tools' must be a list of tools, or one as JSON: "),
        ('"add"', "column 'tools' must be a list of objects that describe tools, got str: 'add'."),
        ('{"name": "add"}', "column 'tools' must be a list of objects that describe tools, got dict: "),
        (["add"], "column 'tools' must be a list of objects that describe tools, got list: ['add']."),
        (0, "column 'tools' must be a list of objects that describe tools, got int: 0."),
        (False, "column 'tools' must be a list of objects that describe tools, got bool: False."),
    ],
)
def test_other_tools_are_named(value, words):
    reason, detail = refusal(tools_in, {"tools": value}, "tools")
    assert reason == WRONG_TYPE
    assert detail.startswith(words)
    assert detail.endswith("end the row.")


def test_half_a_character_in_tools_is_named():
    for value in ([{"name": HALF}], [{HALF: 1}], '[{"name": "\\ud83d"}]'):
        assert refusal(tools_in, {"tools": value}, "tools")[0] == HALF_CHARACTER


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        ([], []),
        ("", []),
        ([["a", "b"], ["c", "d"]], [user("a"), assistant("b"), user("c"), assistant("d")]),
        ([human("a"), gpt("b")], [user("a"), assistant("b")]),
    ],
)
def test_earlier_turns_are_questions_with_answers_or_messages(value, expected):
    assert turns_in({"history": value}, "history") == expected
    assert turns_in({}, "history") == []
    assert turns_in({"history": value}, None) == []


@pytest.mark.parametrize(("value"), ["a", ["a"], [["a"]], [["a", "b", "c"]], [["a", "b"], None], 3, [[]]])
def test_other_turns_are_named(value):
    reason, detail = refusal(turns_in, {"history": value}, "history")
    assert reason == WRONG_TYPE
    assert detail.startswith("column 'history' must be a list of turns, each [question, answer], got ")
    assert refusal(turns_in, {"history": [["a", None]]}, "history")[1].startswith("column 'history' must be text, got ")
