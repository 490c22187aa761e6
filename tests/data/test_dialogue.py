"""A prompt ends before what its responses say for themselves; rows that ask or answer something else are refused."""

from __future__ import annotations

import pytest
from chat_templates import assistant, system, tool, user
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.dialogue import (
    DIFFER_EARLIER,
    NO_ANSWER,
    NO_PROMPT,
    NO_RESPONSE,
    PROMPT_ANSWERED,
    PROMPT_ELSEWHERE,
    TWO_SYSTEMS,
    Setting,
    answered,
    shared,
    turns,
    word_ends,
)
from dpo_lightning.data.example import PreferenceExample, UnusableRow

NAMES = ("column 'prompt'", "column 'chosen'", "column 'rejected'")
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}


def refusal(read, *arguments) -> tuple[str, str]:
    with pytest.raises(UnusableRow) as caught:
        read(*arguments)
    return caught.value.reason, caught.value.detail


def sides(*dialogues):
    return list(zip(NAMES[1:], dialogues, strict=False))


# Answers to a prompt


def test_text_stays_text():
    assert answered("2+2=", [" 4", ""]) == PreferenceExample("2+2=", (" 4", ""))


def test_one_list_of_messages_makes_messages_of_all():
    expected = PreferenceExample([user("2+2?")], ([assistant("4")], [assistant("5")]))
    assert answered("2+2?", ["4", [assistant("5")]]) == expected
    assert answered([user("2+2?")], ["4", "5"]) == expected


@pytest.mark.parametrize("setting", [Setting(), Setting(system=" "), Setting(history=[])])
def test_a_setting_makes_messages_even_where_it_is_empty(setting):
    assert answered("2+2?", ["4"], (), setting) == PreferenceExample([user("2+2?")], ([assistant("4")],))


def test_system_history_and_tools_stand_in_their_order():
    setting = Setting("Count.", [user("1+1?"), assistant("2")], [{"name": "add"}])
    assert answered("2+2?", ["4"], (), setting) == PreferenceExample(
        [system("Count."), user("1+1?"), assistant("2"), user("2+2?")], ([assistant("4")],), tools=[{"name": "add"}]
    )


def test_a_system_message_is_said_once():
    setting = Setting("Count.")
    asked = [system("Count. "), user("2+2?")]
    assert answered(asked, ["4"], (), setting).prompt == asked
    repeated = [[system("Count."), user("2+2?"), assistant(answer)] for answer in "45"]
    assert answered("2+2?", repeated, (), setting).prompt == [system("Count."), user("2+2?")]


@pytest.mark.parametrize("prompt", [[system("Sing."), user("2+2?")], [system("")]])
def test_two_system_messages_that_differ_are_refused(prompt):
    reason, detail = refusal(answered, prompt, ["4"], (), Setting("Count."))
    assert reason == TWO_SYSTEMS
    assert detail == "the first message is not 'Count.', which the row's system column holds; keep one."


def test_responses_may_repeat_the_prompt():
    asked = [user("Hi"), assistant("Hello."), user("2+2?")]
    responses = [[*asked, assistant("4")], [*asked, assistant("5")]]
    expected = PreferenceExample(asked, ([assistant("4")], [assistant("5")]))
    assert answered(asked, responses) == expected
    assert answered("2+2?", responses) == expected
    assert answered(" Hi\n", responses) == expected
    assert answered(asked, [responses[0], "5"]) == expected


def test_a_response_may_call_tools():
    response = [CALL, tool("4"), assistant("It is 4.")]
    assert answered("2+2?", [response, "5"]).responses == (response, [assistant("5")])
    assert answered("2+2?", [[CALL]]).responses == ([CALL],)


@pytest.mark.parametrize(
    ("prompt", "responses", "reason", "detail"),
    [
        ("", ["4", "5"], NO_PROMPT, "column 'prompt' is blank; fill it, or leave the row out."),
        (" \n", ["4", "5"], NO_PROMPT, "column 'prompt' is blank"),
        ("", [[assistant("4")], "5"], NO_PROMPT, "column 'prompt' is blank"),
        ([user(" ")], ["4", "5"], NO_PROMPT, "nothing is asked before the answers"),
        ([system("")], ["4", "5"], NO_PROMPT, "nothing is asked before the answers"),
        (
            [user("2+2?"), assistant("4")],
            ["4", "5"],
            PROMPT_ANSWERED,
            "column 'prompt' must end with what is asked; cut its last message off.",
        ),
        (
            "2+2?",
            [[user("1+1?"), assistant("2")], [user("1+1?"), assistant("3")]],
            PROMPT_ELSEWHERE,
            "no message before the answers reads like column 'prompt', '2+2?'; name another column.",
        ),
        (
            [user("2+2?")],
            [[user("1+1?"), assistant("2")], [user("1+1?"), assistant("3")]],
            PROMPT_ELSEWHERE,
            "column 'chosen' holds a message of role 'user' that column 'prompt' lacks; give the answer alone, or "
            "behind the prompt's own messages.",
        ),
        ("2+2?", ["4", [user("2+2?"), assistant("5")]], PROMPT_ELSEWHERE, "column 'rejected' holds a message of role"),
        ("2+2?", ["4", [assistant("5"), user("No."), assistant("4")]], PROMPT_ELSEWHERE, "column 'rejected' holds a"),
        (
            "2+2?",
            [[user("2+2?"), assistant("4"), user("Why?"), assistant("So.")], [user("2+2?"), assistant("5")]],
            DIFFER_EARLIER,
            "column 'chosen' goes on with a message of role 'user', where the assistant's last answer should be.",
        ),
        ([user("2+2?")], [[user("2+2?")], "5"], NO_ANSWER, "column 'chosen' ends with the prompt."),
        ("2+2?", [[tool("4")], "5"], NO_ANSWER, "column 'chosen' must begin and end with an answer."),
        ("2+2?", [[CALL, tool("4")], "5"], NO_ANSWER, "column 'chosen' must begin and end with an answer."),
        ("2+2?", [[assistant(" ")], "5"], NO_RESPONSE, "column 'chosen' holds an answer without a word."),
        ("2+2?", ["4", [CALL, tool("4"), assistant("")]], NO_RESPONSE, "column 'rejected' holds an answer without a"),
        (None, ["4", "5"], "wrong type", "column 'prompt' must be text or messages, got null."),
        ("2+2?", ["4", None], "wrong type", "column 'rejected' must be text or messages, got null."),
        ("2+2?", ["4", []], "wrong type", "column 'rejected' must be text or messages, got list: []."),
        ("2+2?", ["4", ["5"]], "wrong type", "column 'rejected' must be text or messages, got list: ['5']."),
        ("2+2?", ["4", "\udfff"], "text with half a character (a lone surrogate)", "column 'rejected' holds one"),
        ("\udfff", ["4", "5"], "text with half a character (a lone surrogate)", "column 'prompt' holds one"),
        ("\udfff", [[assistant("4")]], "text with half a character (a lone surrogate)", "column 'prompt' holds one"),
    ],
)
def test_what_cannot_be_an_example_is_named_with_its_column(prompt, responses, reason, detail):
    got = refusal(answered, prompt, responses, NAMES[: 1 + len(responses)])
    assert got[0] == reason
    assert got[1].startswith(detail)


def test_history_goes_before_text_alone():
    setting = Setting(history=[user("1+1?"), assistant("2")])
    whole = [user("1+1?"), assistant("2"), user("2+2?")]
    assert answered(whole, ["4"], (), setting).prompt == whole
    assert refusal(answered, [user("2+2?")], ["4"], (), setting) == (
        PROMPT_ELSEWHERE,
        "earlier turns have a column, and messages with the prompt lack them; join the two.",
    )


# Dialogues with a beginning in common


def test_dialogues_are_split_where_they_part():
    asked = [user("Hi"), assistant("Hello."), user("2+2?")]
    example = shared(sides([*asked, assistant("4")], [*asked, assistant("5")]), [{"name": "add"}])
    assert example == PreferenceExample(asked, ([assistant("4")], [assistant("5")]), tools=[{"name": "add"}])


def test_equal_dialogues_part_at_their_last_answer():
    dialogue = [user("2+2?"), assistant("4")]
    assert shared(sides(dialogue, dialogue)) == PreferenceExample([user("2+2?")], ([assistant("4")],) * 2)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason", "detail"),
    [
        (
            [user("1+1?"), assistant("2")],
            [user("2+2?"), assistant("5")],
            DIFFER_EARLIER,
            "column 'chosen' goes on with a message of role 'user', where the assistant's last answer should be.",
        ),
        (
            [user("Hi"), assistant("Hello."), user("2+2?"), assistant("4")],
            [user("Hi"), assistant("Hey."), user("2+2?"), assistant("4")],
            DIFFER_EARLIER,
            "column 'chosen' goes on with a message of role 'user'",
        ),
        (
            [user("Hi"), assistant("a"), user("b"), assistant("c")],
            [user("Hi"), assistant("a")],
            DIFFER_EARLIER,
            "column",
        ),
        ([system("a"), user("Hi"), assistant("a")], [user("Hi"), assistant("a")], DIFFER_EARLIER, "column 'chosen'"),
        (
            [user("Hi"), assistant("a")],
            [user("Hi"), assistant("a"), assistant("b")],
            NO_ANSWER,
            "column 'chosen' ends with the prompt.",
        ),
        ([assistant("4")], [assistant("5")], NO_PROMPT, "nothing is asked before the answers; if another column holds"),
        ([user(""), assistant("4")], [user(""), assistant("5")], NO_PROMPT, "nothing is asked"),
        (
            [user("a"), assistant("")],
            [user("a"), assistant("5")],
            NO_RESPONSE,
            "column 'chosen' holds an answer without",
        ),
    ],
)
def test_dialogues_that_do_not_part_at_an_answer_are_refused(chosen, rejected, reason, detail):
    got = refusal(shared, sides(chosen, rejected))
    assert got[0] == reason
    assert got[1].startswith(detail)


# Texts with a beginning in common


@pytest.mark.parametrize(
    ("texts", "prompts"),
    [
        (("Q: 2+2\nA: 4", "Q: 2+2\nA: 5"), ["Q: 2+2\nA:", "Q: 2+2\n", "Q: 2+2", "Q:"]),
        (("the cat", "the car"), ["the"]),  # within a word nothing is split
        (("a\n\nb", "a\n\nc"), ["a\n\n", "a"]),
        (("same text", "same text"), ["same"]),  # each must go on
        (("ab", "ab c"), []),
        (("x", "y"), []),
        (("", "y"), []),
        (("你好。", "你好吗"), []),  # no space tells where a word ends
        (("你好\n一", "你好\n二"), ["你好\n", "你好"]),
    ],
)
def test_texts_may_be_split_where_words_end(texts, prompts):
    assert [texts[0][:place] for place in word_ends(texts)] == prompts


@given(st.lists(st.text("ab \n", max_size=8), min_size=2, max_size=3))
@settings(max_examples=300, derandomize=True, deadline=None)
def test_every_split_leaves_words_whole_and_something_to_say(texts):
    places = list(word_ends(texts))
    assert places == sorted(set(places), reverse=True)
    for place in places:
        assert len({text[:place] for text in texts}) == 1
        for text in texts:
            assert text[:place]
            assert text[place:]
            assert text[place - 1].isspace() or text[place].isspace()


# Dialogues for SFT

DIALOGUE = [system("Count."), user("Hi"), assistant("Hello."), user("2+2?"), assistant("4")]


def test_every_answer_or_the_last_is_learned():
    assert turns(DIALOGUE, True, Setting()) == PreferenceExample(DIALOGUE[:2], (DIALOGUE[2:],))
    assert turns(DIALOGUE, False, Setting()) == PreferenceExample(DIALOGUE[:4], (DIALOGUE[4:],))
    greeting = [assistant("Hello."), user("2+2?"), assistant("4")]
    assert turns(greeting, False, Setting()) == PreferenceExample(greeting[:2], ([assistant("4")],))


def test_a_system_message_goes_before_a_dialogue():
    example = turns(DIALOGUE[1:], True, Setting("Count.", tools=[{"name": "add"}]))
    assert example == PreferenceExample(DIALOGUE[:2], (DIALOGUE[2:],), tools=[{"name": "add"}])
    assert turns(DIALOGUE, True, Setting("Count.")).prompt == DIALOGUE[:2]
    assert refusal(turns, DIALOGUE, True, Setting("Sing."))[0] == TWO_SYSTEMS


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize(
    ("messages", "reason", "detail"),
    [
        ([user("Hi")], NO_ANSWER, "no message has the role 'assistant'."),
        ([*DIALOGUE, user("Bye")], NO_ANSWER, "the dialogue ends with a message of role 'user'; cut it off."),
        ([assistant("Hello.")], NO_PROMPT, "nothing is asked before the answers"),
        ([user(""), assistant("Hello.")], NO_PROMPT, "nothing is asked before the answers"),
        ([user("Hi"), assistant("")], NO_RESPONSE, "the dialogue holds an answer without a word."),
    ],
)
def test_dialogues_without_question_or_answer_are_refused(every, messages, reason, detail):
    got = refusal(turns, messages, every, Setting())
    assert got[0] == reason
    assert got[1].startswith(detail)


def test_only_answers_that_are_learned_need_words():
    messages = [user("Hi"), assistant(""), user("2+2?"), assistant("4")]
    assert refusal(turns, messages, True, Setting())[0] == NO_RESPONSE
    assert turns(messages, False, Setting()).responses == ([assistant("4")],)
