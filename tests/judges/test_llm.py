import json
import logging

import pytest
from chat_server import ChatServer, Reply, first_shown, longer, shown

from dpo_lightning.errors import UsageError
from dpo_lightning.judges import Comparison, LLMJudge, Verdict, position_bias

COMPARISONS = [Comparison("p", "long one", "short"), Comparison("p", "x", "yy"), Comparison("q", "aa", "bb")]


def judge(chat, server=None, **settings):
    return LLMJudge(server=chat.server(**(server or {})), **settings)


def test_the_verdict_is_the_mean_over_both_orders():
    with ChatServer(longer) as chat:
        assert judge(chat).compare(COMPARISONS) == [1.0, 0.0, 0.5]
        assert sorted(shown(question) for question in chat.questions) == sorted(
            pair for one in COMPARISONS for pair in ((one.first, one.second), (one.second, one.first))
        )


def test_a_judge_that_prefers_what_it_reads_first_makes_ties(caplog):
    with ChatServer(first_shown) as chat, caplog.at_level(logging.INFO):
        assert judge(chat).compare(COMPARISONS) == [0.5, 0.5, 0.5]
        assert judge(chat, both_orders=False).compare(COMPARISONS) == [1.0, 1.0, 1.0]
    assert "changed by the order    100.0%" in caplog.text
    assert "preferred as the first  100.0%" in caplog.text
    assert caplog.text.count("changed by the order") == 1


def test_bias_of_verdicts_by_hand():
    verdicts = [Verdict(1, 1), Verdict(1, 0), Verdict(0.5, 0), Verdict(0.5, 0.5), Verdict(1, None)]
    bias = position_bias(verdicts)
    assert bias.changed == 2 / 4
    assert bias.first == 4 / 5  # shown first won: 1 of (1, 1), both of (1, 0), the second of (.5, 0); 5 were no ties
    assert position_bias([Verdict(None, 1)]) is None


def test_an_answer_that_cannot_be_read_is_asked_for_again_and_then_left_out(tmp_path):
    def mumbles(number, question, body):
        first = shown(body["messages"][0]["content"])[0]
        if "x" not in first:
            return longer(number, body["messages"][0]["content"], body)
        reminded = len(body["messages"]) > 1
        return ("A" if first == "x1" else "I said so.") if reminded else "Hard to say"

    comparisons = [Comparison("p", "aa", "b"), Comparison("p", "x1", "b"), Comparison("p", "x2", "b")]
    with ChatServer(mumbles) as chat:
        assert judge(chat, both_orders=False).compare(comparisons, tmp_path / "answers.jsonl") == [1.0, 1.0, None]
        assert len(chat.bodies) == 5
        (again, *_) = [body["messages"] for body in chat.bodies if len(body["messages"]) > 1]
        assert [message["role"] for message in again] == ["user", "assistant", "user"]
        assert again[1]["content"] == "Hard to say"
        assert judge(chat, both_orders=False).compare(comparisons, tmp_path / "answers.jsonl") == [1.0, 1.0, None]
        assert judge(chat, both_orders=False, reminders=0).compare(comparisons[1:2]) == [None]
        assert len(chat.bodies) == 6


def test_one_order_that_cannot_be_read_leaves_no_verdict():
    def half(number, question, body):
        return "A" if shown(body["messages"][0]["content"])[0] == "long one" else "?"

    with ChatServer(half) as chat:
        assert judge(chat).compare(COMPARISONS[:1]) == [None]


def test_every_answer_is_kept_and_nothing_is_asked_twice(tmp_path):
    path = tmp_path / "answers.jsonl"
    with ChatServer(longer) as chat:
        judge(chat).compare(COMPARISONS[:2], path)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == 4
        assert {row["order"] for row in rows} == {"given", "turned"}
        assert all(row["text"].startswith("One says more.\n") for row in rows)
        assert all((row["input_tokens"], row["output_tokens"], row["model"]) == (100, 10, "judge-2026") for row in rows)
        verdicts = judge(chat, server={"timeout": 9.0, "concurrency": 1}).compare([*COMPARISONS, COMPARISONS[0]], path)
        assert verdicts == [1.0, 0.0, 0.5, 1.0]
        assert len(chat.bodies) == 6
        judge(chat, question="{prompt} Reply A:\n{first}\n\nReply B:\n{second}").compare(COMPARISONS[:1], path)
        judge(chat, server={"model": "other"}).compare(COMPARISONS[:1], path)
        judge(chat, server={"temperature": 1.0}).compare(COMPARISONS[:1], path)
        assert len(chat.bodies) == 12


def test_a_run_that_ends_early_goes_on(tmp_path):
    def dies(number, question, body):
        return longer(number, question, body) if number <= 3 else Reply(status=500, body="{}")

    path = tmp_path / "answers.jsonl"
    with ChatServer(dies) as chat:
        with pytest.raises(UsageError, match="gave no answer"):
            judge(chat, server={"retries": 0, "concurrency": 1}).compare(COMPARISONS, path)
        asked, chat.reply = len(chat.bodies), longer
        assert judge(chat).compare(COMPARISONS, path) == [1.0, 0.0, 0.5]
        assert len(chat.bodies) - asked == 3


def test_what_was_spent_in_earlier_runs_counts(tmp_path):
    with ChatServer(longer) as chat:
        with pytest.raises(UsageError, match=r"4 were asked .*2 are left"):
            judge(chat, server={"max_requests": 4}).compare(COMPARISONS, tmp_path / "answers.jsonl")
        with pytest.raises(UsageError, match=r"5 were asked .*1 are left"):
            judge(chat, server={"max_requests": 5}).compare(COMPARISONS, tmp_path / "answers.jsonl")
        assert len(chat.bodies) == 5
        assert judge(chat, server={"max_requests": 6}).compare(COMPARISONS, tmp_path / "answers.jsonl") == [
            1.0,
            0.0,
            0.5,
        ]


def test_a_question_that_the_server_refuses_is_counted(caplog):
    def picky(number, question, body):
        refusal = Reply(status=400, body='{"error": {"message": "too long"}}')
        return refusal if "long one" in question else longer(number, question, body)

    with ChatServer(picky) as chat, caplog.at_level(logging.INFO):
        assert judge(chat).compare(COMPARISONS) == [None, 0.0, 0.5]
    assert "without a verdict       1" in caplog.text
    assert "2 questions were not answered: status 400: too long" in caplog.text


@pytest.mark.parametrize("status", [400, 500])
def test_what_was_refused_or_failed_is_not_asked_again_unless_wished_for(tmp_path, caplog, status):
    def picky(number, question, body):
        return Reply(status=status, body="{}") if "bad" in question else longer(number, question, body)

    path = tmp_path / "answers.jsonl"
    comparisons = [Comparison(f"bad {number}", "aa", "b") for number in range(6)] + COMPARISONS
    expected = [None] * 6 + [1.0, 0.0, 0.5]
    with ChatServer(picky) as chat, caplog.at_level(logging.INFO):
        same = {"retries": 0, "first_wait": 0.001}
        assert judge(chat, server=same).compare(comparisons, path) == expected
        asked = len(chat.bodies)
        for concurrency in (1, 4):
            assert judge(chat, server={**same, "concurrency": concurrency}).compare(comparisons, path) == expected
            assert judge(chat, server=same).compare(comparisons[:6], path) == expected[:6]
        assert len(chat.bodies) == asked
        assert caplog.text.count(f"12 questions were not answered: status {status}") == 5
        chat.reply = longer
        assert judge(chat, server=same, ask_again=True).compare(comparisons, path) == [1.0] * 6 + expected[6:]
        assert len(chat.bodies) == asked + 12
        assert judge(chat, server=same).compare(comparisons, path) == [1.0] * 6 + expected[6:]
        assert len(chat.bodies) == asked + 12


def test_answers_of_before_requests_were_counted_are_read(tmp_path):
    path = tmp_path / "answers.jsonl"
    with ChatServer(longer) as chat:
        judge(chat).compare(COMPARISONS[:2], path)
        kept = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(
            "".join(json.dumps({**row, "requests": None}) + "\n" for row in kept).replace(', "requests": null', "")
        )
        with pytest.raises(UsageError, match="4 were asked"):
            judge(chat, server={"max_requests": 4}).compare(COMPARISONS, path)
        assert judge(chat).compare(COMPARISONS, path) == [1.0, 0.0, 0.5]
        assert len(chat.bodies) == 6


def test_what_was_paid_for_nothing_counts_in_later_runs(tmp_path):
    empty = Reply(body='{"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}')
    path = tmp_path / "answers.jsonl"
    with ChatServer(lambda *request: empty) as chat:
        for left in (3, 1):
            with pytest.raises(UsageError, match=r"`max_requests`, \d, may be passed by the next question"):
                judge(chat, server={"max_requests": 6 - left, "retries": 9}).compare(COMPARISONS, path)
        assert len(chat.bodies) == 5
        chat.reply = longer
        with pytest.raises(UsageError, match=r"10 were asked \(1000 \+ 100 tokens\), 1 are left"):
            judge(chat, server={"max_requests": 10, "concurrency": 1}).compare(COMPARISONS, path)


def test_no_key_is_written_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with ChatServer(longer) as chat:
        judge(chat).compare(COMPARISONS, tmp_path / "answers.jsonl")
    assert len(list(tmp_path.iterdir())) == 2
    assert all("sk-secret" not in path.read_text() for path in tmp_path.iterdir())
