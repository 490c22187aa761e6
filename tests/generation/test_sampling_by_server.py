"""A server of completions is asked as vLLM is, and its failures cost no row."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dpo_lightning.errors import UsageError
from dpo_lightning.generation import read_samples
from dpo_lightning.generation.command import sample_prompts
from dpo_lightning.generation.plan import seed_of
from dpo_lightning.server import line

PROMPTS = ["the film was", "a joy", "a joy", "we all loved every minute of this", "Human: what?\n\nAssistant:"]
ODD = {"nothing": b"null", "no list": b'{"choices": 3}', "null": b'{"choices": [null]}'}
WORDS = [" the", " end", " is", " slow", " we", " laughed"]


class VLLM(ThreadingHTTPServer):
    """Answers completions as vLLM does, once the failures of a prompt's list are spent.

    Attributes:
        failures: What befalls the first requests of every prompt.
        asked: Bodies of requests.
        tokens: Whether it takes prompts as tokens.
        left: Requests that it answers before it refuses all others.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.failures, self.asked, self.keys, self.tokens, self.left = [], [], set(), True, None
        self.counts, self.lock, self.running, self.most_running = Counter(), threading.Lock(), 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.running += 1
            self.server.most_running = max(self.server.most_running, self.server.running)
            self.server.asked.append(body)
            self.server.keys.add(self.headers["Authorization"])
            key = json.dumps([body["prompt"], body["seed"], body["temperature"]])
            number = self.server.counts[key]
            self.server.counts[key] += 1
            if self.server.left is not None:
                self.server.left -= 1
        try:
            self.answer(body, self.server.failures[number] if number < len(self.server.failures) else None)
        finally:
            with self.server.lock:
                self.server.running -= 1

    def answer(self, body, failure):
        if self.path != "/v1/completions":
            return self.send(404, {"error": {"message": f"no {self.path}"}})
        if self.server.left is not None and self.server.left < 0:
            return self.send(403, {"error": {"message": f"the budget is spent, {self.headers['Authorization']}"}})
        if not self.server.tokens and not (isinstance(body["prompt"], str) and "top_k" not in body):
            return self.send(400, {"error": {"message": f"{self.headers['Authorization']}: give a string"}})
        if isinstance(failure, int):
            return self.send(failure, {"error": {"message": "not now"}}, {"Retry-After": "0.01"})
        if failure == "slow":
            time.sleep(1.0)
        if failure == "malformed":
            return self.send(200, b'{"choices": [{"text"')
        if failure in ODD:
            return self.send(200, ODD[failure])
        if failure == "no JSON":
            return self.send(200, b"<html>", {"Content-Type": "text/html"})
        choices = [self.choice(body, index) for index in range(body["n"])]
        if failure == "too few":
            choices = choices[:-1]
        if failure == "aborted":
            choices[0]["finish_reason"] = "abort"
        usage = {"prompt_tokens": 3, "completion_tokens": 99, "total_tokens": 102}
        return self.send(
            200, {"id": "a", "object": "text_completion", "created": 1, "model": body["model"], "usage": usage,
                  "choices": choices[::-1]},
        )  # fmt: skip

    def choice(self, body, index):
        """The first ends by its end token, the second by a stop string where there is one, the others by length."""
        stop = (body.get("stop") or [None])[0] if index == 1 else None
        finished = index == 0 or stop is not None
        text = "".join(WORDS[(body["seed"] + index + place) % len(WORDS)] for place in range(1 + index))
        reason = "stop" if finished else "length"
        return {"index": index, "text": text, "finish_reason": reason, "stop_reason": stop, "logprobs": None}

    def send(self, status, content, headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Type": "application/json", **dict(headers), "Content-Length": str(len(data))}
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):  # who asked has lost patience
            self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.setattr(line.random, "uniform", lambda least, most: 0.01)  # pauses
    found = VLLM()
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


@pytest.fixture
def ask(vllm, tmp_path, monkeypatch, tiny_llama):
    """A function that samples from the server."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))

    def call(out="out.jsonl", **kwargs):
        settings = {"num_samples": 3, "server": vllm.url, "server_model": "mine", **kwargs}
        sample_prompts(tiny_llama, "prompts.jsonl", out, **settings)
        return read_samples(out)

    return call


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


def test_the_server_is_asked_for_what_the_model_here_would_write(vllm, ask, tokenizer):
    found = ask(temperatures=[1.0, 0.5], top_p=0.9, max_new_tokens=16, seed=3)
    assert [(one.temperature, one.row, one.prompt) for one in found] == [
        (temperature, row, prompt) for temperature in (1.0, 0.5) for row, prompt in enumerate(PROMPTS, start=1)
    ]
    assert sorted(body["prompt"] for body in vllm.asked) == sorted(tokenizer(PROMPTS * 2)["input_ids"])
    longest = next(body for body in vllm.asked if body["seed"] == seed_of(3, 1.0, 0))
    ids = max(tokenizer(PROMPTS)["input_ids"], key=len)
    assert longest == {
        "model": "mine", "prompt": ids, "n": 3, "temperature": 1.0, "top_p": 0.9, "max_tokens": 16,
        "seed": seed_of(3, 1.0, 0), "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
        "stop_token_ids": [tokenizer.eos_token_id],
    }  # fmt: skip
    assert len({body["seed"] for body in vllm.asked}) == 10
    assert vllm.keys == {"Bearer none"}


def test_choices_stand_in_their_order_with_tokens_counted_here(ask, tokenizer):
    for one in ask():
        counts = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in one.responses]
        assert [text.count(" ") for text in one.responses] == [1, 2, 3]
        assert one.finished == [True, False, False]
        assert one.tokens == [counts[0] + 1, counts[1], counts[2]]


def test_a_stop_string_counts_as_the_tokens_that_made_it(vllm, ask, tokenizer):
    for one in ask(stop="\\n\\n"):
        assert one.finished == [True, True, False]
        assert one.tokens[1] == len(tokenizer(one.responses[1] + "\n\n", add_special_tokens=False)["input_ids"])
    assert {tuple(body["stop"]) for body in vllm.asked} == {("\n\n",)}


def test_messages_are_rendered_here(vllm, ask, tokenizer):
    dialogue = [{"role": "user", "content": "a joy"}]
    Path("prompts.jsonl").write_text(json.dumps({"prompt": dialogue}) + "\n")
    assert ask()[0].prompt == dialogue
    (body,) = vllm.asked
    assert body["prompt"] == tokenizer.apply_chat_template(dialogue, add_generation_prompt=True)["input_ids"]


def test_a_server_that_takes_no_tokens_is_sent_text(vllm, ask, caplog):
    vllm.tokens = False
    assert len(ask(server_concurrency=1)) == len(PROMPTS)
    assert [body["prompt"] for body in vllm.asked[1:]] == sorted(PROMPTS, key=lambda text: -len(text))
    assert isinstance(vllm.asked[0]["prompt"], list)
    assert "The server takes no prompts as tokens" in caplog.text


@pytest.mark.parametrize(
    "failures", [[429], [500], [503, 429], ["malformed"], ["no JSON"], ["too few"], ["aborted", 500], ["slow"]], ids=str
)
def test_a_request_that_failed_is_sent_again(vllm, ask, failures):
    expected = ask("expected.jsonl")
    vllm.failures, before = failures, len(vllm.asked)
    vllm.counts.clear()
    assert ask(server_timeout=0.3 if "slow" in failures else 30.0) == expected
    assert len(vllm.asked) - before == (1 + len(failures)) * len(PROMPTS)


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (500, "status 500: not now"),
        (429, "status 429: not now"),
        ("slow", "no answer in 0.3 s"),
        ("malformed", "an answer that makes no sense"),
        ("too few", "an answer that makes no sense .2 completions instead of 3"),
        ("aborted", "completions ended by abort, length"),
        ("nothing", "choices is missing in null"),
        ("no list", "choices is 3"),
        ("null", "index is missing in null"),
    ],
)
def test_a_server_that_goes_on_failing_is_given_up(vllm, ask, failure, words):
    vllm.failures = [failure] * 9
    with pytest.raises(
        UsageError, match=rf"row \d: http://127.* asked 2 times; .*{words}.*the same command to go on, with a longer"
    ):
        ask(server_retries=1, server_timeout=0.3 if failure == "slow" else 30.0)


def test_a_refusal_is_not_repeated(vllm, ask):
    vllm.left = 0
    with pytest.raises(
        UsageError, match=r"row 4: http.* wants another key .status 403: the budget is spent, .*No key was sent"
    ):
        ask(server_concurrency=1)
    assert len(vllm.asked) == 1


@pytest.mark.parametrize("answered", [0, 1, 3, 7])
def test_a_call_that_ended_early_goes_on_with_what_is_missing(vllm, ask, answered):
    expected = ask("whole.jsonl", temperatures=[1.0, 0.5])
    vllm.left = answered
    with pytest.raises(UsageError, match="the budget is spent"):
        ask(temperatures=[1.0, 0.5], server_concurrency=1)
    assert len(Path("out.jsonl").read_text().splitlines()) == answered
    vllm.left = None
    vllm.asked.clear()
    assert ask(temperatures=[1.0, 0.5]) == expected
    assert len(vllm.asked) == 10 - answered
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_so_many_requests_are_made_at_a_time(vllm, ask):
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{number}"}) + "\n" for number in range(12)))
    vllm.failures = ["slow"]
    begun = time.perf_counter()
    ask(server_concurrency=6)
    assert vllm.most_running == 6
    assert time.perf_counter() - begun < 6


def test_nobody_there_and_no_key_are_said_in_words(ask, monkeypatch):
    with pytest.raises(UsageError, match=r"row \d: There is no server at http://127.0.0.1:9/v1 .*refused"):
        ask(server="http://127.0.0.1:9/v1", server_retries=0)
    with pytest.raises(UsageError, match="there is no environment variable MY_KEY"):
        ask(server_key_variable="MY_KEY")


def test_a_key_is_sent(vllm, ask, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    ask(server_key_variable="MY_KEY")
    assert vllm.keys == {"Bearer secret"}


def test_another_model_of_the_server_is_another_call(ask):
    ask()
    with pytest.raises(UsageError, match="was begun with server_model = 'mine', and now it is 'yours'"):
        ask(server_model="yours")


def test_a_key_that_the_server_repeats_is_not_shown(vllm, ask, monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    vllm.tokens = False
    ask(server_key_variable="MY_KEY")
    assert "Bearer ***: give a string" in caplog.text
    assert "sk-secret" not in caplog.text
    vllm.left = 0
    with pytest.raises(UsageError, match=r"the budget is spent, Bearer \*\*\*") as refusal:
        ask("other.jsonl", server_key_variable="MY_KEY")
    assert "sk-secret" not in str(refusal.value)
