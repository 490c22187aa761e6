"""A row means what its format says; a row that does not fit is refused by number, or counted by its reason."""

from __future__ import annotations

from types import MappingProxyType

import pytest

from dpo_lightning.data.example import PreferenceExample
from dpo_lightning.data.formats import Pairs, Rankings, Texts, Transcripts, UnusableRow, infer
from dpo_lightning.errors import UsageError

HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Again\n\nAssistant:"
# A valid row of every format, its format, and what it means.
EXAMPLES = [
    (Pairs(), {"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}, ("2+2=", (" 4", " 5"))),
    (Rankings(), {"prompt": "2+2=", "responses": ["4", "5", "a"]}, ("2+2=", ("4", "5", "a"))),
    (Rankings(), {"prompt": "2+2=", "responses": ("4", "5")}, ("2+2=", ("4", "5"))),
    (Transcripts(), {"chosen": f"{HH} Yes.", "rejected": f"{HH} No."}, (HH, (" Yes.", " No."))),
    (Transcripts(), {"chosen": f"{HH} Yes.", "rejected": HH}, (HH, (" Yes.", ""))),
    (Texts(), {"text": "Once upon a time"}, ("", ("Once upon a time",))),
    (Texts(prompt="title"), {"text": "Once", "title": "Tale: "}, ("Tale: ", ("Once",))),
    (Pairs(prompt="q", chosen="good", rejected="bad"), {"q": "1", "good": "2", "bad": "3"}, ("1", ("2", "3"))),
    (Rankings(prompt="instruction", responses="output"), {"instruction": "1", "output": ["2", "3"]}, ("1", ("2", "3"))),
    (
        Transcripts(chosen="win", rejected="lose", answer="Bot:"),
        {"win": "Bot: a Bot: b", "lose": "Bot: a Bot: c"},
        ("Bot: a Bot:", (" b", " c")),
    ),
]


@pytest.mark.parametrize(("shape", "row", "expected"), EXAMPLES)
def test_a_row_means_what_its_format_says(shape, row, expected):
    assert shape(row, 5, "rows") == PreferenceExample(*expected, row=5)
    assert shape({**row, "other": None}, 5, "rows") == PreferenceExample(*expected, row=5)
    assert shape(MappingProxyType(row), 5, "rows") == PreferenceExample(*expected, row=5)


def refusal(shape, row) -> str:
    with pytest.raises(UsageError) as caught:
        shape(row, 7, "rows.jsonl")
    return str(caught.value)


def test_a_missing_column_is_named_with_row_columns_and_remedy():
    assert refusal(Pairs(), {"question": "1", "chosen": "2", "rejected": "3"}) == (
        "rows.jsonl, row 7: there is no column 'prompt'; the row has 'question', 'chosen', 'rejected'. Pairs reads "
        "'prompt', 'chosen', 'rejected'; name your columns by `data.init_args.format`, as in {class_path: Pairs, "
        "init_args: {prompt: your_column}}."
    )


def test_the_remedy_for_a_renamed_column_names_the_argument_not_the_column():
    text = refusal(Rankings(prompt="instruction", responses="output"), {"instruction": "1"})
    assert "there is no column 'output'; the row has 'instruction'." in text
    assert "init_args: {responses: your_column}}" in text


@pytest.mark.parametrize(("shape", "row", "expected"), EXAMPLES)
def test_every_column_is_needed(shape, row, expected):
    assert len(shape.columns()) == len(row)
    for column in shape.columns():
        text = refusal(shape, {name: value for name, value in row.items() if name != column})
        assert f"row 7: there is no column {column!r}; " in text


@pytest.mark.parametrize(("shape", "row", "expected"), EXAMPLES)
@pytest.mark.parametrize("wrong", [None, 3, {"role": "user"}, [3], [{"role": "user", "content": "a"}], ["a", None]])
def test_every_column_has_a_type(shape, row, expected, wrong):
    for column in shape.columns():
        kind = "a list of texts, best first" if column == getattr(shape, "responses", None) else "text"
        text = refusal(shape, {**row, column: wrong})
        assert text.startswith(f"rows.jsonl, row 7: column {column!r} must be {kind}, got ")
        assert repr(wrong) in text
        assert text.endswith(" Name another column by `data.init_args.format`, or change the row.")


def test_a_list_of_texts_is_no_text():
    row = {"prompt": "1", "chosen": ["2"], "rejected": "3"}
    assert "column 'chosen' must be text, got list: ['2']." in refusal(Pairs(), row)


def test_long_values_are_cut_in_messages():
    text = refusal(Pairs(), {"prompt": ["word"] * 1000, "chosen": "2", "rejected": "3"})
    assert len(text) < 250


@pytest.mark.parametrize("row", [["a"], "a", None, 3])
def test_a_row_is_an_object(row):
    name = type(row).__name__
    assert refusal(Texts(), row).startswith(f"rows.jsonl, row 7: expected an object with named columns, got {name}; ")


@pytest.mark.parametrize(
    ("shape", "row", "reason"),
    [
        (
            Transcripts(),
            {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: x"},
            "chosen and rejected differ before the last answer",
        ),
        (Transcripts(), {"chosen": HH, "rejected": "Assistant: x"}, "no '\\n\\nAssistant:' in the dialogue"),
        (Rankings(), {"prompt": "1", "responses": ["2"]}, "fewer than two responses"),
        (Rankings(), {"prompt": "1", "responses": []}, "fewer than two responses"),
        (
            Pairs(),
            {"prompt": "1", "chosen": "\ud83d", "rejected": "3"},
            "text with half a character (a lone surrogate)",
        ),
        (Rankings(), {"prompt": "1", "responses": ["2", "\udfff"]}, "text with half a character (a lone surrogate)"),
    ],
)
def test_a_row_without_an_example_says_why(shape, row, reason):
    with pytest.raises(UnusableRow) as caught:
        shape(row, 7, "rows.jsonl")
    assert str(caught.value) == reason


def test_transcripts_need_a_mark():
    with pytest.raises(
        UsageError, match="`answer` must not be empty; where prompts have a column of their own use Pairs"
    ):
        Transcripts(answer="")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["prompt", "chosen", "rejected"], Pairs()),
        (["rejected", "id", "chosen", "prompt"], Pairs()),
        (["prompt", "responses"], Rankings()),
        (["chosen", "rejected"], Transcripts()),
        (["chosen", "rejected", "text"], Transcripts()),
        (["text", "label"], Texts()),
    ],
)
def test_infer_finds_the_shape(columns, expected):
    assert infer(dict.fromkeys(columns, ""), 1, "rows") == expected


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"instruction": "1", "output": ["2"]}, "'instruction', 'output'"),
        ({"prompt": "1", "chosen": "2"}, "'prompt', 'chosen'"),
        ("text", "str"),
    ],
)
def test_infer_refuses_unknown_columns_naming_what_it_found(row, found):
    with pytest.raises(UsageError) as caught:
        infer(row, 2, "rows.jsonl")
    assert str(caught.value) == (
        f"rows.jsonl, row 2: cannot tell what its columns mean. Found {found}; known are Pairs: prompt, chosen, "
        "rejected; Rankings: prompt, responses; Transcripts: chosen, rejected; Texts: text. Name the columns by "
        "`data.init_args.format`, as in {class_path: Pairs, init_args: {prompt: question}}."
    )
