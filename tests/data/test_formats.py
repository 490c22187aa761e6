"""A row means what its format says; a cell that does not fit is named by column, expectation and remedy."""

from __future__ import annotations

from collections import UserDict

import pytest
from chat_templates import assistant, user
from damage import DEEP, JUNK, check, damaged, scrambled
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import HH, SHAPES, TOOLS, answers, pair, read

from dpo_lightning.data.example import PreferenceExample, UnusableRow
from dpo_lightning.data.formats import Format, Pairs, SharedPrompts, ShareGPT, Transcripts
from dpo_lightning.data.rankings import Columns, Comparisons, Rankings
from dpo_lightning.data.reading import begin
from dpo_lightning.data.samples import Samples
from dpo_lightning.data.supervised import Alpaca, Completions, Messages, Texts
from dpo_lightning.errors import UsageError


def refusal(shape: Format, row) -> tuple[str, str]:
    with pytest.raises(UnusableRow) as caught:
        shape.read(row)
    return caught.value.reason, caught.value.detail


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_means_what_its_format_says(name):
    rows, shape, examples = SHAPES[name]
    assert read(rows, shape) == examples
    assert read([UserDict({**row, "other": object()}) for row in rows], shape) == examples


@pytest.mark.parametrize("name", SHAPES)
def test_reading_does_not_change_rows(name):
    rows, shape, _ = SHAPES[name]
    before = repr(rows)
    read(rows, shape)
    assert repr(rows) == before


RENAMED = [
    (
        Pairs(prompt="frage", context="text", chosen="gut", rejected="schlecht", system="rolle", tools="hilfen"),
        {"frage": "2+2?", "text": "Genau.", "gut": "4", "schlecht": "5", "rolle": None, "hilfen": TOOLS},
        answers("2+2?\n\nGenau.", "4", "5", tools=TOOLS),
    ),
    (
        ShareGPT(prompt="dialog", chosen="gut", rejected="schlecht", history="zuvor"),
        {"dialog": "2+2?", "gut": "4", "schlecht": "5", "zuvor": [["1+1?", "2"]]},
        answers([user("1+1?"), assistant("2"), user("2+2?")], "4", "5"),
    ),
    (
        Transcripts(chosen="gut", rejected="schlecht", answer="Bot:"),
        {"gut": "Bot: a Bot: b", "schlecht": "Bot: a Bot: c"},
        pair("Bot: a Bot:", " b", " c"),
    ),
    (
        SharedPrompts(chosen="gut", rejected="schlecht"),
        {"gut": "1 2", "schlecht": "1 3"},
        PreferenceExample(None, ("1 2", "1 3")),
    ),
    (
        Rankings(prompt="frage", responses="antworten", scores="noten"),
        {"frage": "2+2=", "antworten": ["5", "4"], "noten": [1, 2]},
        pair("2+2=", "4", "5"),
    ),
    (
        Samples(prompt="frage", responses="antworten"),
        {"frage": "2+2=", "antworten": ["4"]},
        pair("2+2=", "4")._replace(response=1),
    ),
    (
        Comparisons(prompt="frage", first="links", second="rechts", label="wahl", labels=("l", "r")),
        {"frage": "2+2=", "links": "5", "rechts": "4", "wahl": "r"},
        pair("2+2=", "4", "5"),
    ),
    (
        Columns(rows=Completions(prompt="fragen", completion="antworten")),
        {"fragen": ["2+2="], "antworten": ["4"]},
        pair("2+2=", "4"),
    ),
    (Texts(text="buch", prompt="titel"), {"buch": "Es war", "titel": "Ein Tag: "}, pair("Ein Tag: ", "Es war")),
    (
        Messages(messages="dialog", turns="last"),
        {"dialog": [user("a"), assistant("b"), user("c"), assistant("d")]},
        pair([user("a"), assistant("b"), user("c")], [assistant("d")]),
    ),
    (
        Completions(prompt="frage", completion="antwort"),
        {"frage": [user("2+2?")], "antwort": "4"},
        answers("2+2?", "4"),
    ),
    (
        Alpaca(prompt="auftrag", context="text", output="antwort"),
        {"auftrag": "Add.", "text": "2+2", "antwort": "4"},
        answers("Add.\n\n2+2", "4"),
    ),
]


@pytest.mark.parametrize(("shape", "row", "example"), RENAMED)
def test_columns_have_any_names(shape, row, example):
    assert read([row], shape) == [example]
    assert sorted(shape.columns()) == sorted(row)
    assert begin(iter([(1, {**row, "other": 1})]), shape, "rows").unread == ["other"]


@pytest.mark.parametrize(("shape", "row", "example"), RENAMED)
def test_a_source_without_a_column_is_refused_with_the_argument_that_names_it(shape, row, example):
    inner = shape.rows if isinstance(shape, Columns) else shape
    for column in shape.columns():
        rest = {name: value for name, value in row.items() if name != column}
        argument = next(name for name, value in vars(inner).items() if value == column)
        remedy = f"{{class_path: {type(inner).__name__}, init_args: {{{argument}: your_column}}}}"
        with pytest.raises(UsageError) as caught:
            begin(iter([(1, rest), (2, rest)]), shape, "rows.jsonl")
        text = str(caught.value)
        listed = ", ".join(map(repr, rest)) or "none"
        assert text.startswith(f"rows.jsonl: there is no column {column!r}; the rows have {listed}. {shape} is what")
        assert remedy in text
        if isinstance(shape, Columns):
            assert f"{{class_path: Columns, init_args: {{rows: {remedy}}}}}" in text


def test_a_source_without_rows_is_refused():
    with pytest.raises(UsageError, match=r"^rows.jsonl holds no rows.$"):
        begin(iter([]), Pairs(), "rows.jsonl")


OPTIONAL = {"context", "system", "history", "tools"}


@pytest.mark.parametrize(("shape", "row", "example"), RENAMED)
def test_a_row_without_a_column_is_named(shape, row, example):
    inner = shape.rows if isinstance(shape, Columns) else shape
    for argument, column in vars(inner).items():
        if column in row and argument not in OPTIONAL:
            reason, detail = refusal(shape, {name: value for name, value in row.items() if name != column})
            assert reason == "missing column"
            assert detail.startswith(f"there is no column {column!r}; the row has ")
            assert refusal(shape, {**row, column: None})[0] == "wrong type"


@pytest.mark.parametrize(("shape", "row", "example"), RENAMED)
@pytest.mark.parametrize("wrong", [3, 0.5, True, [3], [[["a"]]], float("nan"), object()])
def test_every_column_has_a_type(shape, row, example, wrong):
    for column in shape.columns():
        value = [wrong] if isinstance(shape, Columns) else wrong
        if isinstance(wrong, list) and isinstance(row[column], list):
            value = wrong * len(row[column])
        if value == [3] * 2:  # two scores that tie
            continue
        (reason,) = read([{**row, column: value}], shape)
        assert reason.reason == "wrong type"
        assert reason.detail.startswith(f"column {column!r}")
        assert " must be " in reason.detail
        assert reason.detail.endswith(" Name another column by `data.init_args.format`, or mend the row.")


@pytest.mark.parametrize(("shape", "row", "example"), RENAMED)
@pytest.mark.parametrize("wrong", [["a"], "a", None, 3])
def test_a_row_is_an_object(shape, row, example, wrong):
    reason, detail = refusal(shape, wrong)
    assert reason == "wrong type"
    assert detail.startswith('expected an object with named columns like {"prompt": ...}, got ')


@pytest.mark.parametrize(
    ("shape", "row", "reason", "detail"),
    [
        (
            Transcripts(),
            {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: x"},
            "chosen and rejected differ before the last answer",
            "up to the last '\\n\\nAssistant:' both must be the same.",
        ),
        (
            Transcripts(),
            {"chosen": HH, "rejected": "Assistant: x"},
            "no '\\n\\nAssistant:' in the dialogue",
            "column 'rejected' has none; see `answer`.",
        ),
        (
            SharedPrompts(),
            {"chosen": "yes", "rejected": "no"},
            "chosen and rejected share no beginning that ends with a word",
            "both must begin with the prompt; where it has a column of its own use Pairs.",
        ),
        (
            SharedPrompts(),
            {"chosen": "Q: a", "rejected": [user("Q")]},
            "wrong type",
            "column 'chosen' must be a message or a list of messages, got str: 'Q: a'.",
        ),
        (
            SharedPrompts(tools="tools"),
            {"chosen": "Q: a", "rejected": "Q: b", "tools": TOOLS},
            "wrong type",
            "column 'chosen' must be messages, since there are tools, got str: 'Q: a'.",
        ),
        (
            SharedPrompts(),
            {"chosen": [user("a"), {"role": "assistant"}], "rejected": [user("a"), assistant("b")]},
            "wrong type",
            "column 'chosen', message 2, its content, must be text, got null.",
        ),
        (
            Pairs(repeated=True),
            {"prompt": "Q", "chosen": "Q 1", "rejected": "2"},
            "the responses do not begin with the prompt",
            "`repeated` says that columns 'chosen' and 'rejected' begin with 'prompt'.",
        ),
        (
            Pairs(repeated=True),
            {"prompt": "", "chosen": "1", "rejected": "2"},
            "empty prompt",
            "column 'prompt' is blank",
        ),
        (Pairs(), {"prompt": " ", "chosen": "1", "rejected": "2"}, "empty prompt", "column 'prompt' is blank; fill it"),
        (
            Pairs(),
            {"prompt": "1", "chosen": "2", "rejected": [user("1"), assistant("3", name=4), 5]},
            "wrong type",
            "column 'rejected', message 3 must be an object like",
        ),
        (
            Pairs(context="context"),
            {"prompt": [user("1")], "context": "2", "chosen": "3", "rejected": "4"},
            "wrong type",
            "column 'prompt' must be text, since a context is to follow it, got list:",
        ),
        (
            Pairs(),
            {"prompt": "1", "chosen": "\ud83d", "rejected": "3"},
            "text with half a character (a lone surrogate)",
            "column 'chosen' holds one; no encoding has it, so mend the row.",
        ),
        (
            Rankings(),
            {"prompt": "1", "responses": ["2"]},
            "fewer than two responses",
            "column 'responses' has 1; a ranking needs two or more.",
        ),
        (Rankings(), {"prompt": "1", "responses": []}, "fewer than two responses", "column 'responses' has 0"),
        (
            Rankings(),
            {"prompt": "1", "responses": ["2", "\udfff"]},
            "text with half a character (a lone surrogate)",
            "column 'responses', response 2 holds one",
        ),
        (
            Rankings(),
            {"prompt": "1", "responses": ["2", 3]},
            "wrong type",
            "column 'responses', response 2 must be text or messages, got int: 3.",
        ),
        (
            Rankings(scores="scores"),
            {"prompt": "1", "responses": ["2", "3"], "scores": [1, 1.0]},
            "all responses tie",
            "column 'scores' gives all 2 the same score.",
        ),
        (
            Rankings(scores="scores"),
            {"prompt": "1", "responses": ["2", "3"], "scores": [1]},
            "wrong type",
            "column 'scores' must be a list of 2 scores, one a response, got list: [1].",
        ),
        *(
            (
                Rankings(scores="scores"),
                {"prompt": "1", "responses": ["2", "3"], "scores": [1, score]},
                "wrong type",
                f"column 'scores' must be a list of finite numbers, got {shown}.",
            )
            for score, shown in [
                (float("nan"), "float: nan"),
                (float("inf"), "float: inf"),
                (None, "null"),
                ("2", "str: '2'"),
                (True, "bool: True"),
            ]
        ),
        (
            Comparisons(),
            {"prompt": "1", "output_1": "2", "output_2": "3", "label": "Tie "},
            "all responses tie",
            "column 'label' says 'Tie '.",
        ),
        *(
            (
                Comparisons(),
                {"prompt": "1", "output_1": "2", "output_2": "3", "label": label},
                "wrong type",
                f"column 'label' must be 1 or 2, got {shown}.",
            )
            for label, shown in [
                (0, "int: 0"),
                (True, "bool: True"),
                (None, "null"),
                (1.5, "float: 1.5"),
                (float("nan"), "float: nan"),
                ([1], "list: [1]"),
                ("output_1", "str: 'output_1'"),
            ]
        ),
        (
            Columns(rows=Pairs()),
            {"prompt": ["a", "b"], "chosen": ["c"], "rejected": ["d", "e"]},
            "lists of different or no length",
            "there are {'prompt': 2, 'chosen': 1, 'rejected': 2}; each needs one value a row.",
        ),
        (Columns(rows=Texts()), {"text": []}, "lists of different or no length", "there are {'text': 0}"),
        (
            Columns(rows=Texts()),
            {"text": "a"},
            "wrong type",
            "column 'text' must be a list, one value a row, got str: 'a'.",
        ),
        (
            Alpaca(),
            {"instruction": "1", "output": []},
            "wrong type",
            "column 'output' must be text, or a list of texts",
        ),
        (
            Alpaca(),
            {"instruction": "1", "output": ["2", " "]},
            "empty response",
            "column 'output', text 2 holds an answer without a word.",
        ),
        (Alpaca(), {"instruction": "", "input": "", "output": "2"}, "empty prompt", "column 'instruction' is blank"),
        (
            Messages(),
            {"messages": [user("1")]},
            "no answer of the assistant's behind the prompt",
            "no message has the role 'assistant'.",
        ),
    ],
)
def test_a_row_without_an_example_says_why(shape, row, reason, detail):
    got = refusal(shape, row)
    assert got[0] == reason
    assert got[1].startswith(detail)


def test_nesting_beyond_all_measure_is_named():
    row = {"prompt": DEEP, "chosen": "1", "rejected": "2"}
    rows = [row, {**row, "prompt": user("1") | {"more": DEEP}}, {"prompt": "1", "chosen": "2", "rejected": "3"}]
    reasons = read(rows, Pairs())
    assert [str(reason) for reason in reasons[:2]] == [
        "wrong type: its lists and objects are nested too deeply; mend the row."
    ] * 2
    assert reasons[2] == pair("1", "2", "3")


def test_a_context_stands_behind_the_prompt_or_alone():
    rows = [{"instruction": "Add.", "input": " "}, {"instruction": "", "input": "2+2"}]
    assert read([{**row, "output": "4"} for row in rows], Alpaca()) == [answers("Add.", "4"), answers("2+2", "4")]


RESPONSES = {"prompt": "q", "responses": ["a", "b", "c", "d", "e"], "scores": [1, 3, 3.0, 2, 1]}


@pytest.mark.parametrize(
    ("ties", "reduce", "expected"),
    [
        # b and c share the best score, a and e the worst
        ("drop", None, ["bda"]),
        ("apart", None, ["bda", "cde"]),
        ("drop", "best_worst", ["ba"]),
        ("apart", "best_worst", ["ba", "ce"]),
        ("drop", "all_pairs", ["bd", "ba", "da"]),
        ("apart", "all_pairs", ["bd", "cd", "ba", "be", "ca", "ce", "da", "de"]),
    ],
)
def test_a_ranking_with_ties(ties, reduce, expected):
    shape = Rankings(scores="scores", ties=ties, reduce=reduce)
    assert read([RESPONSES], shape) == [pair("q", *responses) for responses in expected]


@pytest.mark.parametrize(("reduce", "expected"), [("best_worst", ["ac"]), ("all_pairs", ["ab", "ac", "bc"])])
def test_a_ranking_makes_pairs(reduce, expected):
    row = {"prompt": "q", "responses": ["a", "b", "c"]}
    assert read([row], Rankings(reduce=reduce)) == [pair("q", *responses) for responses in expected]


def test_scores_may_be_larger_than_a_float():
    row = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1e308, 10**400, -(10**400)]}
    assert read([row], Rankings(scores="scores")) == [pair("q", "b", "a", "c")]


@pytest.mark.parametrize(
    ("labels", "first", "second"),
    [
        ((1, 2), [1, "1", " 1 ", 1.0, "1.0"], [2, "2", 2.0]),
        ((0, 1), [0, "0", 0.0], [1, "1", 1.0, "1.0"]),
        ((1, 0), [1, 1.0], [0]),
        (("model_a", "model_b"), ["model_a"], ["model_b\n"]),
        (("True", "False"), [True, "True"], [False, "False"]),
    ],
)
def test_a_label_chooses(labels, first, second):
    rows = [{"prompt": "q", "output_1": "a", "output_2": "b", "label": label} for label in [*first, *second]]
    expected = [pair("q", "a", "b")] * len(first) + [pair("q", "b", "a")] * len(second)
    assert read(rows, Comparisons(labels=labels)) == expected


def test_samples_are_dropped_one_by_one():
    rows = [{"prompt": [user("q")], "responses": ["", "a", 3, "a"]}, {"prompt": "q", "responses": []}]
    empty, second, wrong, fourth, none = read(rows, Samples())
    assert (second, fourth) == (answers("q", "a")._replace(response=2), answers("q", "a")._replace(response=4))
    assert (empty.reason, empty.detail) == (
        "empty response",
        "column 'responses', response 1 holds an answer without a word.",
    )
    assert wrong.detail.startswith("column 'responses', response 3 must be text or messages, got int: 3.")
    assert none.reason == "no responses"


def test_rows_of_a_table_are_dropped_one_by_one():
    row = {"prompt": ["a", "", "c"], "chosen": ["d", "e", "f"], "rejected": ["g", "h", 3]}
    first, *others = read([row], Columns(rows=Pairs()))
    assert first == pair("a", "d", "g")
    assert [other.reason for other in others] == ["empty prompt", "wrong type"]


def test_examples_have_the_number_of_their_row():
    rows = [(7, {"prompt": ["a", "b"], "completion": ["c", "d"]}), (9, {"prompt": ["e"], "completion": ["f"]})]
    found = list(begin(iter(rows), Columns(rows=Completions()), "rows").examples())
    assert [(number, [item.row for item in items]) for number, items in found] == [(7, [7, 7]), (9, [9])]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Transcripts(answer=""),
            "`answer` must not be empty; where prompts have a column of their own use Pairs.",
        ),
        (lambda: Comparisons(labels=(1, "1")), r"`labels` must be two different ones, got [1, '1']."),
        (lambda: Rankings(ties="keep"), "`ties` must be drop or apart, got 'keep'."),
        (lambda: Rankings(reduce="best"), "`reduce` must be best_worst or all_pairs, or be left out, got 'best'."),
        (lambda: Messages(turns="every"), "`turns` must be all or last, got 'every'."),
    ],
)
def test_settings_are_checked_at_birth(make, message):
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == message


def test_a_format_tells_its_columns():
    assert str(Pairs(prompt="question", system="system")) == "Pairs (question, system, chosen, rejected)"
    assert str(Columns(rows=Alpaca())) == "Columns of Alpaca (instruction, input, output)"


FORMATS = {
    **{name: shape.format for name, shape in SHAPES.items()},
    **{f"renamed {number}": shape for number, (shape, _, _) in enumerate(RENAMED)},
    "ties apart": Rankings(scores="scores", ties="apart", reduce="all_pairs", system="system", context="context"),
    "all of a prompt": Pairs(context="input", system="system", history="history", tools="tools"),
    "last turn": Messages(turns="last", system="system", tools="tools"),
}
ROWS = [row for shape in SHAPES.values() for row in shape.rows] + [row for _, row, _ in RENAMED]


@given(st.data(), st.sampled_from(sorted(FORMATS)))
@settings(max_examples=650, derandomize=True, deadline=None)
def test_damaged_rows_make_examples_or_reasons(data, name):
    shape = FORMATS[name]
    own = [row for row in ROWS if set(shape.columns()) <= set(row)] or ROWS
    row = st.one_of(damaged(own), damaged(own), scrambled(shape.columns()), JUNK)
    rows = [own[0], *data.draw(st.lists(row, min_size=2, max_size=8))]
    check(rows, shape)
