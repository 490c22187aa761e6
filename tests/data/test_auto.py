"""The shape of a source is found from its first rows; where columns leave a doubt, it is asked for."""

from __future__ import annotations

import pytest
from chat_templates import assistant, system, user
from damage import DEEP, JUNK, check, damaged, scrambled
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import HH, SHAPES, TOOLS, answers, gpt, human, pair, read

from dpo_lightning.data.auto import ALIASES
from dpo_lightning.data.formats import Pairs, SharedPrompts, Transcripts
from dpo_lightning.data.rankings import Columns, Comparisons, Rankings
from dpo_lightning.data.reading import begin
from dpo_lightning.data.supervised import Alpaca, Completions, Messages, Texts
from dpo_lightning.errors import UsageError


def found(*rows):
    return begin(iter(enumerate(rows, start=1)), None, "rows").format


def refusal(*rows) -> str:
    with pytest.raises(UsageError) as caught:
        begin(iter(enumerate(rows, start=1)), None, "rows.jsonl")
    return str(caught.value)


def compared(*labels, first="output_1", second="output_2", column="label"):
    return [{"prompt": "q", first: "a", second: "b", column: label} for label in labels]


@pytest.mark.parametrize("name", SHAPES)
def test_the_shape_is_found(name):
    rows, shape, examples = SHAPES[name]
    if name == "a comparison by name":
        rows = [*rows, *compared("model_a", first="response_a", second="response_b", column="winner")]
        examples = [*examples, pair("q", "a", "b")]
    assert found(*rows) == shape
    assert read(rows) == examples


@pytest.mark.parametrize("name", sorted(set(SHAPES) - {"an instruction and its output"}))
def test_the_shape_is_found_in_spite_of_some_bad_rows(name):
    rows, shape, _ = SHAPES[name]
    if not isinstance(shape, (SharedPrompts, Columns)):  # of texts that begin alike nearly all have to
        assert found({}, *rows * 3, None) == shape
        assert found(*rows * 3, dict.fromkeys(rows[0])) == shape


def test_the_first_rows_decide():
    rows = [{"prompt": "1", "chosen": "2", "rejected": "3"}] * 100 + [{"text": "Once"}]
    reading = begin(iter(enumerate(rows, start=1)), None, "rows")
    assert reading.format == Pairs()
    *_, (number, (reason,)) = reading.examples()
    assert (number, reason.reason) == (101, "missing column")


def test_what_is_not_read_is_told():
    row = {"prompt": "1", "chosen": "2", "rejected": "3", "id": 4, "score_chosen": 5.0}
    assert begin(iter([(1, row)]), None, "rows").unread == ["id", "score_chosen"]


@pytest.mark.parametrize("prompt", ALIASES["prompt"])
@pytest.mark.parametrize("chosen", ALIASES["chosen"])
def test_aliases_of_pairs(prompt, chosen):
    for rejected in ALIASES["rejected"]:
        row = {rejected: "bad", chosen: "good", prompt: "q"}
        assert read([row]) == [pair("q", "good", "bad")]


@pytest.mark.parametrize("prompt", ALIASES["prompt"])
@pytest.mark.parametrize("completion", ALIASES["completion"])
def test_aliases_of_completions(prompt, completion):
    asked = answers("q", "a") if (prompt, completion) == ("instruction", "output") else pair("q", "a")
    assert read([{completion: "a", prompt: "q"}]) == [asked]


@pytest.mark.parametrize("column", ALIASES["messages"])
def test_aliases_of_messages(column):
    assert found({column: [user("q"), assistant("a")]}) == Messages(messages=column)
    assert read([{column: [human("q")], "chosen": gpt("a"), "rejected": gpt("b")}]) == [answers("q", "a", "b")]


@pytest.mark.parametrize("scores", ALIASES["scores"])
@pytest.mark.parametrize("responses", ALIASES["responses"])
def test_aliases_of_rankings(responses, scores):
    assert read([{"prompt": "q", responses: ["a", "b"], scores: [1, 2]}]) == [pair("q", "b", "a")]


@pytest.mark.parametrize(("first", "second"), list(zip(ALIASES["first"], ALIASES["second"], strict=True)))
@pytest.mark.parametrize("column", ALIASES["label"])
def test_aliases_of_comparisons(first, second, column):
    for labels in ((1, 2), ("1", "2"), (1.0, 2.0), (first, second), ("A", "B"), ("first", "second")):
        rows = compared(*labels, first=first, second=second, column=column)
        assert read(rows) == [pair("q", "a", "b"), pair("q", "b", "a")]


def test_a_row_nested_beyond_all_measure_does_not_hinder():
    row = {"prompt": "1", "chosen": "2", "rejected": "3"}
    *examples, reason = read([row, row, {**row, "prompt": DEEP}])
    assert examples == [pair("1", "2", "3")] * 2
    assert reason.detail == "its lists and objects are nested too deeply; mend the row."
    assert "nested too deeply" in refusal({**row, "prompt": DEEP})
    assert "cannot tell" in refusal({"prompt": DEEP, "responses": DEEP, "scores": DEEP})


# What is refused


def test_a_refusal_lists_columns_shapes_and_the_nearest():
    assert refusal({"promt": "1", "choosen": "2", "rejectd": "3"}) == (
        "rows.jsonl: cannot tell what its columns mean. Found 'promt', 'choosen', 'rejectd'.\n"
        "Nearest is Pairs (prompt, chosen, rejected)\n"
        "Known are\n"
        "  Pairs (prompt, chosen, rejected)\n"
        "  ShareGPT (conversations, chosen, rejected)\n"
        "  SharedPrompts (chosen, rejected)\n"
        "  Transcripts (chosen, rejected)\n"
        "  Rankings (prompt, responses)\n"
        "  Samples (prompt, responses)\n"
        "  Comparisons (prompt, output_1, output_2, label)\n"
        "  Messages (messages)\n"
        "  Completions (prompt, completion)\n"
        "  Alpaca (instruction, input, output)\n"
        "  Texts (text)\n"
        "Name shape and columns by `data.init_args.format`, as in {class_path: Pairs, init_args: {prompt: frage, "
        "chosen: gut, rejected: schlecht}}."
    )


@pytest.mark.parametrize(
    ("row", "nearest"),
    [
        ({"texts": "1"}, "Texts (text)"),
        ({"mesages": []}, "Messages (messages)"),
        ({"instruction": "1", "inputs": "2", "outptu": "3"}, "Alpaca (instruction, input, output)"),
        ({"prompt": "1", "output_1": "2", "output_2": "3"}, "Comparisons (prompt, output_1, output_2, label)"),
        ({"prompt": "1", "chosen": "2"}, "Pairs (prompt, chosen, rejected)"),
        ({1: "a", None: "b"}, ""),
    ],
)
def test_the_nearest_shape_is_that_of_the_likest_names(row, nearest):
    assert f"\nNearest is {nearest}" in refusal(row)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[1]], "Found list in place of an object."),
        ([None, "a"], "Found NoneType in place of an object."),
        ([{}], "Found objects without columns."),
    ],
)
def test_rows_without_columns_are_refused(rows, words):
    assert words in refusal(*rows)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        # an empty prompt is never guessed
        (
            [{"prompt": "", "chosen": "a", "rejected": "b"}],
            "Pairs (prompt, chosen, rejected), but of too many rows: empty",
        ),
        ([{"prompt": None, "chosen": "a", "rejected": "b"}], "column 'prompt' must be text or messages, got null"),
        (
            [{"chosen": [assistant("a")], "rejected": [assistant("b")]}],
            "empty prompt: nothing is asked before the answers",
        ),
        ([{"chosen": "a", "rejected": "b"}], "  or SharedPrompts (chosen, rejected), but of too many rows: chosen and"),
        (
            [{"chosen": "a", "rejected": "b"}],
            "both must begin with the prompt; where it has a column of its own use Pairs",
        ),
        ([{"messages": [assistant("a")]}], "empty prompt: nothing is asked before the answers"),
        # half a pair is nothing for SFT
        ([{"prompt": "q", "chosen": "a"}], "Found 'prompt', 'chosen'."),
        ([{"prompt": "q", "rejected": "a", "completion": "b"}], "Found 'prompt', 'rejected', 'completion'."),
        ([{"messages": [user("q"), assistant("a")], "chosen": "a"}], "Found 'messages', 'chosen'."),
        # one list of the record is shorter
        (
            [{"question": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e"]}],
            "Columns of Pairs (question, chosen, rejected), but of too many rows: lists of different or no length: "
            "there are {'question': 2, 'chosen': 2, 'rejected': 1}",
        ),
        # the dialogue holds the answer already
        (
            [{"conversations": [human("q"), gpt("a")], "chosen": gpt("a"), "rejected": gpt("b")}],
            "the prompt ends with an answer: column 'conversations' must end with what is asked",
        ),
        ([{"question": "q", "answer": ["a", "b"]}], "column 'answer' must be text or messages, got list: ['a', 'b']"),
        ([{"question": "q", "answer": 3}], "column 'answer' must be text or messages, got int: 3."),
        (
            [{"prompt": "q", "chosen": True, "rejected": False}],
            "column 'chosen' must be text or messages, got bool: True.",
        ),
        # a second text may be the prompt, or all of it
        (
            [{"prompt": "q", "text": "a"}],
            "does 'text' hold all there is to learn, or is 'prompt' part of it? Say so by",
        ),
        (
            [{"text": "q", "answer": "a"}],
            "does 'text' hold all there is to learn, or is 'answer' part of it? Say so by",
        ),
        ([{"text": "q", "responses": ["a", "b"]}], "or is 'responses' part of it?"),
        ([{"text": "q", "output_1": "a", "output_2": "b", "label": 1}], "or is 'output_1' part of it?"),
    ],
)
def test_what_is_not_told_is_not_guessed(rows, words):
    assert words in refusal(*rows)


@pytest.mark.parametrize("label", [True, False, 0, 1, "True", "false", "1", 1.0])
def test_unpaired_feedback_is_no_sft(label):
    message = "one completion a prompt with a label true or false is unpaired feedback, and no format here reads it"
    assert message in refusal({"prompt": "q", "completion": "a", "label": label})
    assert message in refusal({"messages": [user("q"), assistant("a")], "label": label})
    assert found({"text": "Once", "label": label}) == Texts()
    assert found({"prompt": "q", "completion": "a", "label": "math"}) == Completions()


@pytest.mark.parametrize(
    ("labels", "listed", "example"),
    [
        ([1, 1, 1], "'1'", "1, 2"),  # of 0 and 1, or of 1 and 2?
        ([2, 2], "'2'", "1, 2"),
        ([0, 1], "'0', '1'", "'0', '1'"),  # the second is better, or the first is better?
        ([0], "'0'", "1, 2"),
        ([0, 1, 2], "'0', '1', '2'", "1, 2"),
        ([1, 2, 3], "'1', '2', '3'", "1, 2"),
        ([-1, 1], "'-1', '1'", "'-1', '1'"),
        ([True, False], "'False', 'True'", "'False', 'True'"),
        ([None, "tie"], "none", "1, 2"),
        (["left", "right"], "'left', 'right'", "'left', 'right'"),
        ([0.3, 0.9], "'0.3', '0.9'", "'0.3', '0.9'"),
        (["\ud83d"], "'\\ud83d'", "1, 2"),
        (["x" * 1000], f"'{'x' * 39}", "1, 2"),
    ],
)
def test_what_a_label_means_is_never_guessed(labels, listed, example):
    assert refusal(*compared(*labels)) == (
        f"rows.jsonl: cannot tell which label means the first response: in the first {len(labels)} rows 'label' holds "
        f"{listed}. Name the two, that of the first response before that of the second, as in {{class_path: "
        f"Comparisons, init_args: {{label: label, labels: [{example}]}}}}."
    )


@pytest.mark.parametrize("more", [None, "tie", "Tie", "tie (bothbad)", "both", "neither", "", float("nan"), [1], {}])
def test_ties_and_gaps_do_not_blur_labels(more):
    assert found(*compared(1, 2, more)) == Comparisons()


def test_one_label_in_words_is_enough():
    assert found(*compared("output_2")) == Comparisons(labels=("output_1", "output_2"))


# Columns that change what others mean


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"question": "q", "context": "c", "answer": "a"}, "context"),
        ({"question": "q", "context": "c", "chosen": "a", "rejected": "b"}, "context"),
        ({"prompt": "q", "input": "c", "completion": "a"}, "input"),
        ({"instruction": "q", "input": "c", "context": "d", "output": "a"}, "context"),
        ({"instruction": "Answer.", "question": "q", "chosen": "a", "rejected": "b"}, "instruction"),
        ({"question": "q", "choices": ["a", "b"], "answer": "A"}, "choices"),
        ({"question": "q", "options": {"A": "a"}, "answer": "A"}, "options"),
        ({"system": "s", "system_prompt": "t", "prompt": "q", "completion": "a"}, "system_prompt"),
        ({"chosen": f"{HH} a", "rejected": f"{HH} b", "system": "s"}, "system"),
        ({"chosen": "Q: a", "rejected": "Q: b", "history": [["a", "b"]]}, "history"),
        ({"messages": [user("q"), assistant("a")], "history": [["a", "b"]]}, "history"),
        ({"text": "Once", "tools": TOOLS}, "tools"),
        ({"question": ["q"], "context": ["c"], "answer": ["a"]}, "context"),
    ],
)
def test_a_column_that_may_belong_to_the_prompt_is_not_left_out(row, column):
    text = refusal(row, row)
    assert text.startswith("rows.jsonl: looks like ")
    assert f", but {column!r} may belong to the prompt. Name shape and columns by `data.init_args.format`: one " in text


@pytest.mark.parametrize("empty", [None, "", " ", [], {}])
def test_an_empty_column_belongs_to_nothing(empty):
    assert found({"question": "q", "answer": "a", "context": empty, "choices": empty}) == Completions(
        prompt="question", completion="answer"
    )


def test_nulls_beside_a_prompt_do_not_make_it_messages():
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "system": None, "tools": None, "history": None}
    assert found(row) == Pairs()
    assert found(row, {**row, "system": "s"}) == Pairs(system="system")


def test_dialogues_need_no_instruction_beside_them():
    row = {"instruction": "q", "response": "a", "conversations": [human("q"), gpt("a")]}
    assert found(row) == Messages(messages="conversations")


@pytest.mark.parametrize(
    ("row", "because"),
    [
        ({"prompt": "q", "responses": ["a", "b"], "rank": [2, 1]}, "'rank' may say otherwise"),
        ({"prompt": "q", "responses": ["a", "b"], "score": [0.5, 1]}, "'score' may say otherwise"),
        ({"instruction": "q", "output": ["a", "b"], "scores": [0.5, 1]}, "'scores' may say otherwise"),
        ({"question": "q", "answers": ["a", "b"]}, "it may hold equals, or one that is right"),
        ({"question": "q", "candidates": ["a", "b"], "label": 1}, "it may hold equals, or one that is right"),
    ],
)
def test_a_list_is_best_first_only_where_nothing_speaks_against_it(row, because):
    responses = next(name for name in ("responses", "output", "answers", "candidates") if name in row)
    assert refusal(row) == (
        f"rows.jsonl: cannot tell whether {responses!r} is best first: {because}. Name shape and columns by "
        f"`data.init_args.format`, as in {{class_path: Rankings, init_args: {{responses: {responses}}}}} if it is, or "
        "with {scores: your_column}, higher is better. Responses in no order are {class_path: Samples, init_args: "
        f"{{responses: {responses}}}}}, for predict alone."
    )


def test_lists_of_other_things_do_not_rank():
    row = {"prompt": "q", "responses": ["a", "b"], "models": ["m", "n"], "tokens": [1, 2, 3], "places": []}
    assert found(row) == Rankings()


@pytest.mark.parametrize(
    "text",
    [
        "[{'content': 'q', 'role': 'user'}, {'content': 'a', 'role': 'assistant'}]",
        '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]',
        ' [ {"from" : "human", "value": "q"}]',
        '{"role": "user"}',
    ],
)
def test_messages_written_out_as_text_are_not_learned(text):
    message = "holds messages written out as text, which would be learned as it is: give them as lists of objects"
    for row in (
        {"chosen": f"{text} a", "rejected": f"{text} b"},
        {"prompt": text, "chosen": "a", "rejected": "b"},
        {"prompt": "q", "completion": text},
        {"text": text},
    ):
        assert message in refusal(row)
    assert "column 'messages' must be a message or a list of messages, got str" in refusal({"messages": text})
    assert found({"text": text}, {"text": "a"}) == Texts()  # one of them may be meant


# Traps


def test_lists_of_messages_are_no_columns():
    asked = [user("q"), assistant("a")]
    rows = [
        {"chosen": [*asked, user("r"), assistant(good)], "rejected": [*asked, user("r"), assistant("c")]}
        for good in "bd"
    ]
    assert found(*rows) == SharedPrompts()
    row = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    assert found(row) == Pairs()


def test_columns_may_hold_messages_and_numbers():
    row = {"prompt": ["q", "r"], "responses": [["a", "b"], ["c", "d"]], "scores": [[1, 2], [2, 1]]}
    assert found(row) == Columns(rows=Rankings(scores="scores"))
    assert read([row]) == [pair("q", "b", "a"), pair("r", "c", "d")]
    row = {"messages": [[user("q"), assistant("a")], [user("r"), assistant("b")]]}
    assert read([row]) == [answers("q", "a"), answers("r", "b")]
    assert found({"text": ["a", "b"]}, {"text": ["c"]}) == Columns(rows=Texts())


def test_columns_do_not_lose_what_belongs_to_a_prompt():
    row = {"instruction": ["q"], "context": ["c"], "response": ["a"], "other": ["x", "y"]}
    assert read([row]) == [pair("q\n\nc", "a")]
    row = {"system": ["s", ""], "question": ["q", "r"], "chosen": ["a", "b"], "rejected": ["c", "d"]}
    assert read([row]) == [answers([system("s"), user("q")], "a", "c"), answers("r", "b", "d")]


def test_most_texts_must_share_a_beginning():
    alike, other = {"chosen": "Q: a", "rejected": "Q: b"}, {"chosen": "a", "rejected": "b"}
    assert found(*[alike] * 9, other) == SharedPrompts()
    assert "share no beginning" in refusal(*[alike] * 8, other, other)
    assert found({"chosen": f"{HH} a", "rejected": f"{HH} b"}, alike) == Transcripts()


def test_most_responses_must_repeat_the_prompt_for_it_to_be_taken_off():
    again, plain = ({"prompt": "Q", "chosen": f"{head}a", "rejected": f"{head}b"} for head in ("Q ", ""))
    assert found(*[again] * 9, plain) == Pairs(repeated=True)
    assert found(*[plain] * 9, again) == Pairs()
    assert found({"prompt": "I", "chosen": "I am.", "rejected": "No."}) == Pairs()
    message = (
        "rows.jsonl: in 2 of the first 4 rows chosen and rejected begin with the prompt once more, in the others not."
    )
    assert refusal(again, again, plain, plain).startswith(message)


def test_an_instruction_with_output_is_alpaca_by_any_list():
    assert found({"instruction": "q", "output": ["a", "b"]}) == Alpaca(context=None)
    assert found({"instruction": "q", "input": "", "output": "a"}) == Alpaca()


@given(st.data(), st.sampled_from(sorted(SHAPES)))
@settings(max_examples=400, derandomize=True, deadline=None)
def test_damaged_rows_make_examples_or_reasons_or_a_refusal(data, name):
    rows = SHAPES[name].rows
    bad = st.one_of(damaged(rows), damaged(rows), JUNK)
    check([*rows * data.draw(st.integers(0, 3)), *data.draw(st.lists(bad, min_size=1, max_size=5))], None)


@given(st.data(), st.sampled_from([(), *(shape.format.columns() for shape in SHAPES.values())]))
@settings(max_examples=400, derandomize=True, deadline=None)
def test_any_cells_make_examples_or_reasons_or_a_refusal(data, columns):
    check(data.draw(st.lists(scrambled(columns), min_size=1, max_size=3)), None)
