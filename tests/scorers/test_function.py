import pytest

from dpo_lightning.errors import UsageError
from dpo_lightning.scorers import Function, ScoreBook, Unscored

MODULE = """
import math
calls = []
def two(prompt, response): return len(prompt) + 10 * len(response)
def joined(text, scale=2): return scale * text.count("a")
def response(response): return len(response)
def batch(prompts, responses): calls.append(list(responses)); return [len(r) for r in responses]
def batch_of_texts(texts):
    import torch
    return torch.tensor([len(text) for text in texts])
def short(responses): return [1.0]
def none(response): pass
def text(response): return "5"
def fails(response): return 1 / (len(response) - 2)
def infinite(response): return math.inf if response == "bb" else 0
def three(a, b, c): pass
class Reward:
    def __call__(self, response): return -len(response)
reward = Reward()
number = 3
"""
PROMPTS, RESPONSES = ["p", "pp"], ["a", "bba"]


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "my_scores.py"
    import sys

    sys.modules.pop("my_scores", None)


@pytest.mark.parametrize(
    ("name", "batched", "expected"),
    [
        ("two", False, [11, 32]),
        ("joined", False, [2, 2]),
        ("response", False, [1, 3]),
        ("reward", False, [-1, -3]),
        ("batch", True, [1, 3]),
        ("batch_of_texts", True, [2, 5]),
    ],
)
def test_the_signature_says_what_a_function_is_given(name, batched, expected):
    scores = Function(path=f"my_scores.{name}", batched=batched).score(PROMPTS, RESPONSES)
    assert scores == expected
    assert all(type(score) is float for score in scores)


def test_builtins_take_the_joined_text():
    assert Function(path="builtins.len").score(PROMPTS, RESPONSES) == [2, 5]


def test_prompts_that_are_messages_are_for_functions_that_take_them_apart():
    prompts = [[{"role": "user", "content": "hello"}]]
    assert Function(path="my_scores.two").score(prompts, ["ab"]) == [21]
    assert Function(path="my_scores.response").score(prompts, ["ab"]) == [2]
    with pytest.raises(Unscored, match=r"takes one text, .* and this prompt is messages"):
        Function(path="my_scores.joined").score(prompts, ["ab"])


@pytest.mark.parametrize(
    ("name", "batched", "place", "said"),
    [
        ("fails", False, 1, "my_scores.fails failed: ZeroDivisionError: division by zero"),
        ("none", False, 0, "has to return a number, got None"),
        ("text", False, 0, "has to return a number, got '5'"),
        ("short", True, 0, "has to return a list of 3 numbers, one a response; got 1"),
        ("response", True, 0, "has to return a list of 3 numbers, one a response; got int"),
    ],
)
def test_a_response_without_a_number_is_named(name, batched, place, said):
    with pytest.raises(Unscored, match=said) as problem:
        Function(path=f"my_scores.{name}", batched=batched).score(["p"] * 3, ["a", "bb", "ccc"])
    assert problem.value.place == place


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("score", "`path` must be a module and a function in it"),
        ("no_module_here.score", "There is no module no_module_here"),
        ("my_scores.scor", "The module my_scores has no function 'scor'"),
        ("my_scores.number", "my_scores.number is no function, it is int"),
        ("my_scores.three", r"needs 3 arguments \(a, b, c\)"),
    ],
)
def test_a_path_that_leads_nowhere_is_explained(path, said):
    with pytest.raises(UsageError, match=said):
        Function(path=path).score(PROMPTS, RESPONSES)


def test_a_module_that_lacks_another_says_which(module):
    module.write_text("import what_is_missing\ndef score(text): return 1\n")
    with pytest.raises(ModuleNotFoundError, match="what_is_missing"):
        Function(path="my_scores.score").score(PROMPTS, RESPONSES)


def test_scores_are_kept_and_asked_for_once(module, tmp_path):
    scorer = Function(path="my_scores.batch", batched=True)
    with ScoreBook(scorer, tmp_path / "scores.jsonl") as book:
        assert book.score(["p", "p", "q"], ["a", "a", "a"]) == [1, 1, 1]
        assert book.score(["p", "p"], ["bb", "a"]) == [2, 1]
    with ScoreBook(scorer, tmp_path / "scores.jsonl") as book:
        assert book.score(["q", "p", "q"], ["a", "bb", "ccc"]) == [1, 2, 3]
    from my_scores import calls

    assert calls == [["a", "a"], ["bb"], ["ccc"]]


def test_scores_of_a_function_that_was_changed_are_asked_for_anew(module, tmp_path):
    def scored():
        with ScoreBook(Function(path="my_scores.response"), tmp_path / "scores.jsonl") as book:
            return book.score(["p"], ["abc"])

    assert scored() == [3]
    import sys

    module.write_text("def response(response): return 7  # another length, so that no byte code of before is taken\n")
    sys.modules.pop("my_scores")
    assert scored() == [7]


def test_scores_that_are_no_finite_numbers_are_refused():
    with (
        pytest.raises(Unscored, match="Function gave inf") as problem,
        ScoreBook(Function(path="my_scores.infinite")) as book,
    ):
        book.score(["p", "p", "p"], ["a", "a", "bb"])
    assert problem.value.place == 2
