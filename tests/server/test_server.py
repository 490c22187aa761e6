import itertools
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from chat_server import ChatServer, Reply, longer

from dpo_lightning.errors import UsageError
from dpo_lightning.server import Server, Spent
from dpo_lightning.server.asking import EASY

NOBODY = "http://127.0.0.1:1/v1"


def questions(count):
    return [[{"role": "user", "content": f"question {number}"}] for number in range(count)]


def echo(number, question, body):
    return f"answer to {question}"


def texts(server, count=1, spent=None):
    asked = server.ask(questions(count)) if spent is None else server.ask(questions(count), spent)
    return {place: answer.text for place, answer in asked}


def test_answers_come_with_the_places_of_their_questions_several_at_a_time():
    def slow(number, question, body):
        return Reply(f"answer to {question}", after=0.05)

    with ChatServer(slow) as chat:
        assert texts(chat.server(concurrency=5), 20) == {n: f"answer to question {n}" for n in range(20)}
        assert chat.most_at_once == 5
        assert len(chat.bodies) == 20


def test_an_answer_is_handed_over_while_others_are_waited_for():
    release = threading.Event()

    def one_waits(number, question, body):
        if question == "question 0":
            release.wait(5)
        return question

    with ChatServer(one_waits) as chat:
        coming = chat.server(concurrency=2).ask(questions(3))
        assert [next(coming)[0], next(coming)[0]] == [1, 2]
        release.set()
        assert next(coming)[0] == 0


def test_a_request_says_what_the_settings_say():
    with ChatServer(echo) as chat:
        texts(chat.server(temperature=0.5, max_tokens=7, options={"seed": 3, "chat_template_kwargs": {"think": False}}))
        assert chat.bodies[0] == {
            "model": "judge", "messages": questions(1)[0], "temperature": 0.5, "max_tokens": 7, "seed": 3,
            "chat_template_kwargs": {"think": False},
        }  # fmt: skip
        texts(chat.server(temperature=None, limit_name="max_completion_tokens"))
        assert chat.bodies[1] == {"model": "judge", "messages": questions(1)[0], "max_completion_tokens": 1024}


def test_the_key_comes_from_the_environment_and_none_is_needed(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ChatServer(echo) as chat:
        server = chat.server(key_variable="MY_KEY")
        texts(server)
        texts(chat.server())
        assert [headers["authorization"] for headers in chat.headers] == ["Bearer sk-secret", "Bearer none"]
        assert "secret" not in repr(server)


@pytest.mark.parametrize(
    "trouble",
    [
        Reply(status=429, body='{"error": {"message": "too fast"}}'),
        Reply(status=500, body="oops"),
        Reply(status=503, body='{"error": {"message": "loading"}}'),
        Reply(status=408, body="{}"),
        Reply(body='{"id": "1", "choi'),
        Reply(body="<html>", headers={"content-type": "text/html"}),
        Reply(body='{"choices": []}'),
        Reply(body="null"),
        Reply(body="[]"),
        Reply(body='{"choices": 3}'),
        Reply(body='{"choices": {"0": "A"}}'),
        Reply(body='{"choices": [null]}'),
        Reply(body='{"choices": [{"message": "A"}]}'),
        Reply(body='{"choices": [{"message": {"content": 5}}]}'),
    ],
    ids=[
        "429",
        "500",
        "503",
        "408",
        "half",
        "html",
        "no choices",
        "null",
        "list",
        "3",
        "dictionary",
        "null choice",
        "message",
        "number",
    ],
)
def test_what_is_busy_slow_or_broken_is_asked_again(trouble):
    with ChatServer(lambda number, question, body: trouble if number < 3 else "yes") as chat:
        assert texts(chat.server()) == {0: "yes"}
        assert len(chat.bodies) == 3


@pytest.mark.parametrize(
    ("usage", "spent"),
    [
        ('{"prompt_tokens": 100, "completion_tokens": 10}', Spent(1, 100, 10)),
        ('{"prompt_tokens": -100, "completion_tokens": 10}', None),
        ('{"prompt_tokens": "100", "completion_tokens": "10"}', None),
        ('{"prompt_tokens": true, "completion_tokens": true}', None),
        ('"n/a"', None),
        ("null", None),
    ],
)
def test_a_count_of_tokens_that_is_none_is_taken_at_the_most(usage, spent):
    body = f'{{"choices": [{{"message": {{"content": "yes"}}}}], "usage": {usage}}}'
    with ChatServer(lambda *request: Reply(body=body)) as chat:
        server = chat.server(max_tokens=30)
        ((place, answer),) = server.ask(questions(1))
        assert (place, answer.text, answer.model) == (0, "yes", "")
        assert answer.spent == spent or (spent is None and answer.spent[1] > 100 and answer.spent[2] == 30)


def test_an_answer_in_parts_is_put_together():
    parts = '[{"type": "thinking", "thinking": []}, {"type": "text", "text": "Bet"}, {"type": "text", "text": "ter"}]'
    with ChatServer(lambda *request: Reply(body=f'{{"choices": [{{"message": {{"content": {parts}}}}}]}}')) as chat:
        assert texts(chat.server()) == {0: "Better"}


def test_what_is_slow_is_asked_again():
    def slow(number, question, body):
        return Reply("late", after=1.5) if number < 3 else "yes"

    with ChatServer(slow) as chat:
        assert texts(chat.server(timeout=0.5)) == {0: "yes"}
        assert len(chat.bodies) >= 3


def test_an_answer_that_comes_in_drops_is_waited_for_no_longer():
    drops = [b" "] * 40
    with ChatServer(lambda number, question, body: Reply("", drops=drops) if number < 3 else "yes") as chat:
        start = time.perf_counter()
        assert texts(chat.server(timeout=0.5, concurrency=1)) == {0: "yes"}
        assert time.perf_counter() - start < 3  # two times 40 drops are 8 s
        assert len(chat.bodies) == 3


@pytest.mark.parametrize("status", [200, 503])
@pytest.mark.parametrize(
    "trouble",
    [
        {"promised": 99},
        {"promised": 99, "after": 1.0},
        {"headers": {"content-encoding": "gzip"}},
    ],
    ids=["cut", "stalled", "garbled"],
)
def test_a_reply_that_breaks_off_is_asked_for_again(status, trouble):
    broken = Reply(status=status, drops=[b'{"choices": [{"mess'], **trouble)
    with ChatServer(lambda number, question, body: broken if number == 1 else "yes") as chat:
        assert texts(chat.server(timeout=0.5)) == {0: "yes"}
        assert len(chat.bodies) == 2


def test_the_server_says_how_long_to_wait():
    busy = Reply(status=429, body="{}", headers={"retry-after": "0.2"})
    with ChatServer(lambda number, question, body: busy if number == 1 else "yes") as chat:
        start = time.perf_counter()
        assert texts(chat.server()) == {0: "yes"}
        assert time.perf_counter() - start > 0.2


def test_waits_double():
    times = []

    def busy(number, question, body):
        if question == "question 0":
            times.append(time.perf_counter())
        return Reply(status=500, body="{}")

    with ChatServer(busy) as chat, pytest.raises(UsageError, match=r"no answer when asked 5 times; .* status 500"):
        texts(chat.server(first_wait=0.04, retries=4))
    waits = [after - before for before, after in itertools.pairwise(times)]
    for wait, least in zip(waits, (0.02, 0.04, 0.08, 0.16), strict=True):
        assert wait >= least


@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("poison", [0, 2, 7])
def test_a_question_that_always_fails_does_not_end_the_run_of_others(concurrency, poison):
    def poisoned(number, question, body):
        return Reply(status=500, body="{}") if question == f"question {poison}" else question

    with ChatServer(poisoned) as chat:
        answers = dict(chat.server(retries=2, concurrency=concurrency, first_wait=0.01).ask(questions(8)))
        answers.pop(None, None)
        assert answers[poison].text is None
        assert answers[poison].left_out
        assert answers[poison].error.startswith("status 500")
        assert sorted(answers) == list(range(8))
        assert all(answers[place].text == f"question {place}" for place in range(8) if place != poison)


def test_a_server_that_was_away_for_a_while_costs_no_question():
    away = range(4, 4 + 2 * 4)

    def returns(number, question, body):
        return Reply(status=503, body="{}") if number in away else question

    with ChatServer(returns) as chat:
        assert texts(chat.server(retries=1, concurrency=4), 12) == {n: f"question {n}" for n in range(12)}


def test_many_questions_that_fail_or_are_refused_do_not_end_the_run_of_one_that_is_answered():
    def picky(number, question, body):
        place = int(question.split()[1]) if question.startswith("question") else 0
        return "yes" if place in (0, 19) else Reply(status=500 if place % 5 == 0 else 400, body="{}")

    with ChatServer(picky) as chat:
        answers = dict(chat.server(retries=1, concurrency=1).ask(questions(20)[1:]))
    answers.pop(None)
    assert answers.pop(18).text == "yes"
    assert len(answers) == 18
    assert all(answer.left_out for answer in answers.values())


def test_a_server_that_goes_away_ends_the_run_and_what_was_answered_is_handed_over():
    def dies(number, question, body):
        return question if number <= 5 else Reply(status=502, body="{}")

    got = []
    with ChatServer(dies) as chat, pytest.raises(UsageError, match=r"gave no answer .* status 502"):
        got.extend(chat.server(retries=1, concurrency=2).ask(questions(50)))
    assert sum(answer.text is not None for _, answer in got) == 5
    assert len(chat.bodies) < 20


def test_no_server_at_all_ends_at_once():
    start = time.perf_counter()
    with pytest.raises(UsageError, match=f"no server at {NOBODY}.*refused"):
        texts(Server(url=NOBODY, model="m"), 40)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(("key", "said"), [("sk-wrong-one", "OPENAI_API_KEY holds a key that"), (None, "is not set")])
def test_a_wrong_key_ends_at_once_and_is_not_repeated(key, said, monkeypatch):
    if key is None:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    else:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    refusal = Reply(status=401, body=f'{{"error": {{"message": "Incorrect API key: {key}"}}}}')
    with ChatServer(lambda *request: refusal) as chat, pytest.raises(UsageError, match=said) as mistake:
        texts(chat.server(concurrency=2), 40)
    assert "sk-wrong-one" not in str(mistake.value)
    assert len(chat.bodies) <= 4


def test_an_unknown_model_ends_at_once_and_those_known_are_named():
    missing = Reply(status=404, body='{"error": {"message": "no such model"}}')
    with (
        ChatServer(lambda *request: missing) as chat,
        pytest.raises(UsageError, match=r"knows no model 'jugde', or .*no such model.* It has 'judge'\."),
    ):
        texts(chat.server(model="jugde", concurrency=2), 40)
    assert len(chat.bodies) <= 4


def test_a_quota_that_is_used_up_ends_at_once():
    empty = Reply(status=429, body='{"error": {"message": "pay first", "code": "insufficient_quota"}}')
    with ChatServer(lambda *request: empty) as chat, pytest.raises(UsageError, match=r"cannot be asked .*pay first"):
        texts(chat.server(concurrency=1), 40)
    assert len(chat.bodies) == 1


def test_a_question_that_is_refused_is_left_out():
    def picky(number, question, body):
        too_long = Reply(status=400, body='{"error": {"message": "too long"}}')
        return too_long if question == "question 0" else question

    with ChatServer(picky) as chat:
        answers = dict(chat.server(concurrency=1).ask(questions(3)))
    assert [answers[place].text for place in range(3)] == [None, "question 1", "question 2"]
    assert answers[0].error == "status 400: too long"


@pytest.mark.parametrize(("count", "asked"), [(3, 3 + 1), (100, 8 + 1)])  # and something easy
def test_a_server_that_refuses_everything_ends_the_run(count, asked):
    refusal = Reply(status=400, body='{"error": {"message": "no temperature, please"}}')
    with (
        ChatServer(lambda *request: refusal) as chat,
        pytest.raises(UsageError, match=r"refuses every question now .*no temperature"),
    ):
        texts(chat.server(concurrency=1), count)
    assert len(chat.bodies) == asked


def test_a_server_that_begins_to_refuse_everything_ends_the_run_and_leaves_nothing_out():
    def poor(number, question, body):
        return question if number <= 5 else Reply(status=400, body='{"error": {"message": "no credit"}}')

    got = []
    with (
        ChatServer(poor) as chat,
        pytest.raises(UsageError, match=r"refuses every question now \(status 400: no credit\)"),
    ):
        got.extend(chat.server(concurrency=1).ask(questions(60)))
    assert [answer.text is not None for _, answer in got] == [True] * 5
    assert len(chat.bodies) == 5 + 8 + 1  # and something easy


def test_what_was_broken_off_by_the_end_of_a_run_is_not_left_out():
    asked = Counter()

    def once_asked(count):
        end = time.monotonic() + 5
        while asked["question 0"] < count and time.monotonic() < end:
            time.sleep(0.01)

    def ends(number, question, body):
        asked[question] += 1
        if question == "question 0":
            return Reply(status=500, body="{}")
        if question == "question 4":  # is answered while question 0 has its second chance
            once_asked(5)
        if question == "question 5":  # ends the run before that is over
            once_asked(6)
            return Reply(status=401, body="{}")
        return Reply(question, after=0.05)

    got = []
    with ChatServer(ends) as chat, pytest.raises(UsageError, match="wants another key"):
        got.extend(chat.server(concurrency=3, retries=3, first_wait=0.1).ask(questions(8)))
    assert 6 <= asked["question 0"] < 8
    assert sum(answer.text is not None for _, answer in got) == 6
    assert not any(answer.left_out for _, answer in got)


def test_something_easy_that_fails_does_not_end_a_run_in_which_others_are_answered():
    arrived = threading.Event()

    def uneven(number, question, body):
        if question == EASY[0]["content"]:
            arrived.set()
            return Reply(status=503, body="{}", after=0.3)
        if question in ("question 0", "question 1", "question 2"):
            return Reply(status=500, body="{}")
        arrived.wait(5)
        return question

    with ChatServer(uneven) as chat:
        answers = dict(chat.server(concurrency=8, retries=0).ask(questions(12)))
    assert {place for place, answer in answers.items() if answer.left_out} == {0, 1, 2}
    assert sum(answer.text is not None for answer in answers.values()) == 9


def test_what_was_paid_before_a_wrong_key_counts():
    def late(number, question, body):
        return Reply("late", after=0.8) if number == 1 else Reply(status=401, body="{}")

    got = []
    with ChatServer(late) as chat, pytest.raises(UsageError, match="wants another key"):
        got.extend(chat.server(timeout=0.4, max_tokens=20).ask(questions(1)))
    ((place, answer),) = got
    assert (place, answer.text, answer.left_out, answer.spent[0], answer.spent[2]) == (0, None, False, 1, 20)


def test_a_cap_in_dollars_is_never_passed():
    prices = {"input_price": 10.0, "output_price": 100.0}  # 100 tokens and 10 tokens: 0.002 dollars an answer
    with ChatServer(echo) as chat:
        server = chat.server(**prices, max_spend=0.02, max_tokens=50)
        got = []
        with pytest.raises(UsageError, match=r"`max_spend`, 0.02 dollars, may be passed .* \d were asked .*0\.01"):
            got.extend(server.ask(questions(50)))
        assert len(got) == len(chat.bodies)
        cost = server.cost(Spent(len(got), 100 * len(got), 10 * len(got)))
        assert 0.01 < cost <= 0.02
        assert cost + 0.002 + 50 * 100e-6 > 0.02  # one more might have passed it


@pytest.mark.parametrize(("cap", "number"), [({"max_requests": 3}, 3), ({"max_total_tokens": 700}, 5)])
def test_caps_without_prices(cap, number):
    got = []
    with ChatServer(echo) as chat, pytest.raises(UsageError, match=next(iter(cap))):
        got.extend(chat.server(**cap, max_tokens=20).ask(questions(50)))
    assert len(got) == len(chat.bodies) == number


@pytest.mark.parametrize(
    ("trouble", "tokens"),
    [
        (Reply(body='{"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}'), (100, 10)),
        (Reply(body="{"), None),
        (Reply("late", after=1.0), None),
        (Reply(status=500, body="{}"), (0, 0)),
    ],
    ids=["no choices", "half", "late", "status"],
)
def test_what_may_have_been_charged_for_no_answer_counts(trouble, tokens):
    with ChatServer(lambda number, question, body: trouble if number == 1 else "yes") as chat:
        server = chat.server(max_requests=1, max_tokens=20, timeout=0.4)
        if tokens == (0, 0):
            assert texts(server) == {0: "yes"}
            return
        got = []
        with pytest.raises(UsageError, match=r"`max_requests`, 1, may be passed .* 1 were asked .* 1 are left"):
            got.extend(server.ask(questions(1)))
        assert len(chat.bodies) == 1
    ((place, answer),) = got
    assert (place, answer.text, answer.left_out) == (0, None, False)
    assert answer.spent[0] == 1
    assert answer.spent[1:] == tokens or (tokens is None and answer.spent[1] > 100 and answer.spent[2] == 20)


def test_an_answer_tells_of_all_that_was_paid_for_it():
    empty = Reply(body='{"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}')
    with ChatServer(lambda number, question, body: empty if number < 3 else "yes") as chat:
        ((_, answer),) = chat.server().ask(questions(1))
    assert (answer.text, answer.spent) == ("yes", Spent(3, 300, 30))


def test_what_was_spent_before_counts():
    with ChatServer(echo) as chat, pytest.raises(UsageError, match=r"10 were asked .* 5 are left"):
        texts(chat.server(max_requests=10), 5, spent=Spent(10, 0, 0))
    assert chat.bodies == []


def test_a_server_that_counts_no_tokens_is_taken_at_the_most():
    with ChatServer(lambda number, question, body: Reply("yes", counts=False)) as chat:
        ((_, answer),) = chat.server(max_tokens=30).ask(questions(1))
    assert answer.spent.output_tokens == 30
    assert answer.spent.input_tokens > len("question 0")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "localhost:8000"}, "`url` must begin with http"),
        ({"max_spend": 5.0, "input_price": 1.0}, "`max_spend` is in dollars, so it needs"),
        ({"concurrency": 0}, "`concurrency` must be 1 or more"),
        ({"retries": -1}, "`retries` must not be negative"),
        ({"timeout": 0.0}, "`timeout` must be more than 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        Server(**{"url": NOBODY, "model": "m", **settings})


def test_a_round_that_is_left_early_asks_no_more():
    with ChatServer(longer) as chat:
        chat.reply = lambda number, question, body: Reply(question, after=0.02)
        coming = chat.server(concurrency=2).ask(questions(50))
        next(coming)
        coming.close()
        time.sleep(0.1)
        assert len(chat.bodies) <= 4


ASKS = """
import signal, sys
from dpo_lightning.server import Server

signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    list(Server(url=sys.argv[1], model="judge").ask([[{"role": "user", "content": "?"}]]))
except KeyboardInterrupt:
    print("interrupted")
"""


def test_nobody_waits_for_an_answer_after_an_interrupt():
    asking = []

    def never(number, question, body):
        asking[0].send_signal(signal.SIGINT)
        time.sleep(60)
        return question

    with ChatServer(never) as chat:
        asking.append(subprocess.Popen([sys.executable, "-c", ASKS, chat.url], stdout=subprocess.PIPE, text=True))
        assert asking[0].communicate(timeout=50) == ("interrupted\n", None)
        assert len(chat.bodies) == 1


def test_a_connection_that_breaks_before_any_answer_is_made_again():
    def breaks(number, question, body):
        return None if number == 1 else question  # which breaks it off

    with ChatServer(breaks) as chat:
        assert texts(chat.server(concurrency=1)) == {0: "question 0"}
        assert len(chat.bodies) == 2


@pytest.mark.parametrize("key", ["sk-sec\nret", "sk-s\xe9cret"])
def test_what_can_be_no_key_is_refused_and_not_shown(key, monkeypatch):
    monkeypatch.setenv("MY_KEY", key)
    with ChatServer(echo) as chat, pytest.raises(UsageError, match="MY_KEY holds no key") as mistake:
        texts(chat.server(key_variable="MY_KEY"))
    assert key not in str(mistake.value)


def test_what_surrounds_a_key_is_left_out(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret \n")
    with ChatServer(echo) as chat:
        texts(chat.server(key_variable="MY_KEY"))
        assert chat.headers[0]["authorization"] == "Bearer sk-secret"
