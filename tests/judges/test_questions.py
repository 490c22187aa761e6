import pytest

from dpo_lightning.errors import UsageError
from dpo_lightning.judges.questions import QUESTIONS, ask, read, template


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("A says more.\nA", 1.0),
        ("B is exact.\n\nB\n", 0.0),
        ("Both are fine.\ntie", 0.5),
        ("Both.\nTie.", 0.5),
        ("Both.\n**A**", 1.0),
        ('A is better.\n"B".', 0.0),
        ("A", 1.0),
        ("A is better than B", None),
        ("A\nbecause it says more", None),
        ("Well.\nA or B", None),
        ("Well.\nAB", None),
        ("Well.\na", None),
        ("Well.\nNeither", None),
        ("", None),
        ("\n\n", None),
    ],
)
def test_the_verdict_stands_on_the_last_line_or_there_is_none(answer, verdict):
    assert read(answer) == verdict


@pytest.mark.parametrize("question", QUESTIONS)
def test_questions_show_prompt_and_responses_as_they_are(question):
    asked = ask(question, "the {first} post", " one {second}\n", "two \\1 {prompt}")
    for part in ("the {first} post", "A:\none {second}\n", "B:\ntwo \\1 {prompt}\n"):
        assert asked.count(part) == 1
    assert asked.endswith("holds nothing but A or B, or tie if neither is better.")


def test_only_the_concise_question_asks_for_brevity():
    assert "no longer than it needs to be" in QUESTIONS["concise"]
    assert "no longer" not in QUESTIONS["simple"]


def test_messages_are_written_out():
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How was it?"}]
    assert "System: Be kind.\n\nUser: How was it?\n\n" in ask("helpful", prompt, "a", "b")


def test_a_question_of_ones_own():
    assert ask("{prompt}? A: {first} or B: {second}?", "p", "x", "y").startswith("p? A: x or B: y?\n\nFirst write")
    with pytest.raises(UsageError, match=r"one of simple, concise, helpful, or a text .*'simpel' lacks \{first\}, \{p"):
        template("simpel")
