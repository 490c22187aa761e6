"""What a model is trained on is what it sees at inference: prompt, boundary, end token, limits; by hand and by law.

In the byte-level tokenizers every letter is a token, but for "ab", "xy", "xyz" and " a", which are one each.
"""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
from chat_templates import BARE, assistant, user
from hypothesis import given, settings
from makes import BYTES, END, LETTERS, MAKES, MERGES, Make, bpe
from tokenizers import models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_lightning.data.dialogue import NO_PROMPT, NO_RESPONSE, NOTHING_SHARED
from dpo_lightning.data.example import PreferenceExample, TokenizedExample, UnusableRow
from dpo_lightning.data.tokenize import EQUAL, NOTHING_LEFT, TOO_LONG, Notes, Tokenization, encode
from dpo_lightning.errors import UsageError

BYTE_LEVEL = ("llama", "gpt2", "closing", "qwen")
LAW = settings(derandomize=True, deadline=None, max_examples=100)
Result = tuple[TokenizedExample, Notes] | UnusableRow


def tokenize(make, *rows, **limits) -> list[Result]:
    """Rows as (prompt, response, response, ...)."""
    examples = [
        PreferenceExample(prompt, tuple(responses), number) for number, (prompt, *responses) in enumerate(rows, 1)
    ]
    return list(Tokenization(tokenizer=make.tokenizer, **{"max_length": 10_000, **limits})(examples))


def usable(results: list[Result]) -> list[tuple[TokenizedExample, Notes]]:
    return [result for result in results if not isinstance(result, UnusableRow)]


def as_text(make, ids: list[int]) -> list[str]:
    return make.tokenizer.convert_ids_to_tokens(ids)


def only(make, *row, **limits) -> tuple[list[str], list[list[str]]]:
    """Tokens of prompt and responses of the one row, which is kept."""
    ((example, _),) = tokenize(make, row, **limits)
    assert example.scored is None  # plain text is the assistant's, all of it
    return as_text(make, example.prompt_ids), [as_text(make, ids) for ids in example.response_ids]


def notes(make, *row, **limits) -> dict[str, int]:
    """What is noted of the one row, which is kept; counts that are 0 are left out."""
    ((_, noted),) = tokenize(make, row, **limits)
    return {name: count for name, count in noted._asdict().items() if count}


def dropped(make, *row, **limits) -> UnusableRow:
    (result,) = tokenize(make, row, **limits)
    assert isinstance(result, UnusableRow)
    return result


def random_rows(seed: int, num: int = 200) -> list[tuple[str, ...]]:
    """Texts full of merges, now and then empty or equal, with 1 to 3 responses."""
    rng = random.Random(seed)

    def word(longest: int) -> str:
        return "".join(rng.choice("ab ab xyz.E\n") for _ in range(rng.randint(0, longest)))

    return [(word(12), *(word(8) for _ in range(rng.randint(1, 3)))) for _ in range(num)]


# The boundary by hand.


@pytest.mark.parametrize(
    ("name", "prompt", "first", "second"),
    [
        ("llama", ["<s>", "x", "."], ["c", "</s>"], ["Ġa", "</s>"]),
        ("gpt2", ["x", "."], ["c", "</s>"], ["Ġa", "</s>"]),
        ("closing", ["<s>", "x", "."], ["c", "</s>"], ["Ġa", "</s>"]),
        ("qwen", ["x", "."], ["c", "</s>"], ["Ġa", "</s>"]),
        ("sentencepiece", ["<s>", "▁", "x", "."], ["c", "</s>"], ["▁a", "</s>"]),
        ("always", ["<s>", "▁", "x", "."], ["c", "</s>"], ["▁a", "</s>"]),
        ("legacy", ["<s>", "▁", "x", "."], ["c", "</s>"], ["▁a", "</s>"]),
        ("wordpiece", ["[CLS]", "x", "."], ["c", "[SEP]"], ["a", "[SEP]"]),
    ],
)
def test_tokens_of_every_make(makes, name, prompt, first, second):
    assert only(makes[name], "x.", "c", " a") == (prompt, [first, second])


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("llama", ["<s>"]),
        ("gpt2", ["</s>"]),  # adds no begin token to texts, but has one
        ("closing", ["<s>"]),
        ("sentencepiece", ["<s>"]),
        ("always", ["<s>"]),
        ("legacy", ["<s>"]),
        ("wordpiece", ["[CLS]"]),
    ],
)
def test_an_empty_prompt_is_the_begin_token(makes, name, prompt):
    tokens, responses = only(makes[name], "", "c", "xyz")
    assert tokens == prompt
    assert [response[-2:] for response in responses] == [["c", responses[0][-1]], ["xyz", responses[0][-1]]]


def test_text_without_a_begin_token_is_learned_from_its_second_token_on(makes):
    assert only(makes["qwen"], "", "cab") == (["c"], [["ab", "</s>"]])
    assert only(makes["llama"], "", "cab") == (["<s>"], [["c", "ab", "</s>"]])


def test_responses_to_compare_need_something_before_them(makes):
    assert str(dropped(makes["qwen"], "", "c", "d")) == (
        f"{NO_PROMPT}: it has no tokens, the tokenizer has no begin token, and responses to compare need one before "
        "them."
    )


def test_a_begin_token_in_the_response_is_not_there_twice(makes):
    assert only(makes["gpt2"], "", "</s>c") == (["</s>"], [["c", "</s>"]])


def test_a_merge_across_the_boundary_leaves_the_prompt_alone(makes):
    for name in BYTE_LEVEL:
        prompt, responses = only(makes[name], "xa", "bc", "c", "abx")
        assert prompt[-2:] == ["x", "a"]
        # "xa" + "bc" is x ab c: "bc" is tokenised by itself. The others are the rest of the whole.
        assert responses == [["b", "c", "</s>"], ["c", "</s>"], ["ab", "x", "</s>"]]
        assert notes(makes[name], "xa", "bc", "c", "abx")["merged"] == 1


def test_a_merge_that_takes_the_whole_prompt(makes):
    assert only(makes["llama"], "xy", "z") == (["<s>", "xy"], [["z", "</s>"]])


@pytest.mark.parametrize("name", ["sentencepiece", "always", "legacy"])
@pytest.mark.parametrize(
    ("prompt", "response", "tokens"),
    [
        ("xa", "bc", ["b", "c"]),  # no space before it, as there would be before a text of its own
        ("x ", "ab", ["ab"]),  # the prompt keeps its space
        ("x ", "a", ["a"]),  # and is not to lose it to the token of " a"
        ("xa", "b\na", ["b", "\n", "a"]),
    ],
)
def test_a_response_by_itself_has_no_space_that_nobody_wrote(makes, name, prompt, response, tokens):
    if name == "legacy":
        tokens = ["<0x0A>" if token == "\n" else token for token in tokens]
    (kept, (found,)), alone = only(makes[name], prompt, response), only(makes[name], prompt, "c")[0]
    assert found == [*tokens, "</s>"]
    assert kept == alone


def with_spaces(merges: list[tuple[str, str]], normalizer: normalizers.Normalizer | None = None) -> Make:
    """A tokenizer that puts a space before every text."""
    tokenizer = bpe(["▁", *LETTERS], merges, [END])
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return MAKES["always"]()._replace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END))


def test_a_response_by_itself_is_told_apart_behind_something_that_does_not_merge_with_it():
    """It is tried behind a line's end, a full stop and a letter, and what has no token separates nothing."""
    merges = [("b", "\n"), ("\n", "\n")]
    assert only(with_spaces(merges), "b", "\nc") == (["▁", "b"], [["\n", "c", END]])
    merges.append((".", "\n"))
    assert only(with_spaces(merges), "b", "\nc") == (["▁", "b"], [["\n", "c", END]])
    make = with_spaces([("a", "b")], normalizers.Replace("\n", ""))
    assert only(make, "a", "bc") == (["▁", "a"], [["b", "c", END]])


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("ø", "x", ["x"]),  # the word "øx" is unknown, and so is "ø": the same token
        ("ø", "x y", ["x", "y"]),
        ("c ø", "øc x", ["[UNK]", "x"]),
        ("c ø", " øc", ["[UNK]"]),
        ("øc ", "x", ["x"]),
    ],
)
def test_an_unknown_prompt_does_not_swallow_its_response(makes, prompt, response, expected):
    assert only(makes["wordpiece"], prompt, response, "c")[1][0] == [*expected, "[SEP]"]


def test_an_unknown_response_by_itself_is_not_swallowed_either():
    """As in tokenizers of type Unigram: unknown letters behind each other are one token, and "\n" is unknown."""
    vocab = {token: place for place, token in enumerate(["<unk>", *"abxyz.", "ab"])}
    tokenizer = models.BPE(vocab=vocab, merges=[("a", "b")], unk_token="<unk>", fuse_unk=True)
    backend = type(bpe([], [], []))(tokenizer)
    backend.normalizer = normalizers.NFC()
    make = MAKES["llama"]()._replace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert only(make, "xa", "bé", "é", "éx") == (["x", "a"], [["b", "<unk>"], ["<unk>"], ["<unk>", "x"]])
    assert only(make, "xé", "é", "éx") == (["x", "<unk>"], [["<unk>"], ["<unk>", "x"]])
    assert notes(make, "xé", "é", "éx")["merged"] == 2


def test_an_unknown_token_with_another_meaning_says_nothing_of_what_it_stands_for():
    """As in GPT-2, where it is the end token and no letter is unknown."""
    tokenizer = bpe(BYTES, MERGES, [END])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token=END)
    assert notes(MAKES["qwen"]()._replace(tokenizer=fast), "x</s>", " c") == {"special": 1}


# The end token and what else is noted.


@pytest.mark.parametrize("response", ["c</s>", "c"])
def test_the_end_token_stands_once(makes, response):
    for name in (*BYTE_LEVEL, "sentencepiece", "always", "legacy"):
        assert only(makes[name], "x.", response)[1] == [["c", "</s>"]]


@pytest.mark.parametrize(("name", "begin"), [("llama", ["<s>"]), ("gpt2", []), ("closing", ["<s>"]), ("qwen", [])])
def test_a_prompt_that_ends_with_the_end_token_keeps_it(makes, name, begin):
    assert only(makes[name], "x</s>", "c") == ([*begin, "x", "</s>"], [["c", "</s>"]])


def test_padding_that_is_the_end_token_is_no_reason_to_drop_it(makes):
    tokenizer = makes["gpt2"].tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ((example, _),) = tokenize(makes["gpt2"], ("x", "c"))
    assert example.response_ids[0][-1] == tokenizer.pad_token_id


def test_a_tokenizer_without_end_token_is_noted(makes):
    make = makes["llama"]
    bare = make._replace(tokenizer=type(make.tokenizer)(tokenizer_object=make.tokenizer.backend_tokenizer))
    assert only(bare, "x", " c", " y") == (["<s>", "x"], [["Ġ", "c"], ["Ġ", "y"]])
    assert notes(bare, "x", " c", " y") == {"no_end": 2}
    assert notes(bare, "x", " c", " yyyy", max_length=5) == {"no_end": 1, "cut_responses": 1}  # once each


def test_no_end_token_stands_where_none_is_asked_for(makes):
    assert only(makes["llama"], "x", " c", " y", end_token=False) == (["<s>", "x"], [["Ġ", "c"], ["Ġ", "y"]])
    assert notes(makes["llama"], "x", " c", " y", end_token=False) == {}
    assert only(makes["llama"], "x", " c</s>", " y", end_token=False)[1][0] == ["Ġ", "c", "</s>"]  # it is the text's


def test_two_begin_tokens_are_noted(makes):
    assert notes(makes["llama"], "<s>x", " c") == {"two_begins": 1, "special": 1}
    assert notes(makes["llama"], "x", " c") == {}
    assert notes(makes["gpt2"], "</s>x", " c") == {"special": 1}


def test_special_tokens_in_a_text_are_noted_once_an_example(makes):
    assert notes(makes["llama"], "x", " c</s>", " y<pad>") == {"special": 1}
    assert notes(makes["llama"], "x", " c</s", " y") == {}
    bare = makes["llama"]._replace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=bpe(BYTES, MERGES, [])))
    assert notes(bare, "x", " c</s>") == {"no_end": 1}  # no special tokens, so none in a text
    added = MAKES["llama"]()
    added.tokenizer.add_tokens(["<call>"])
    assert notes(added, "x", " <call>") == {}  # a token, but not a special one
    added.tokenizer.add_tokens(["<|eot|>"], special_tokens=True)
    assert notes(added, "x", " <|eot|>") == {"special": 1}


@pytest.mark.parametrize(
    ("prompt", "response", "run_on"),
    [("x", "c", 1), ("x.", "c", 1), ("x ", "c", 0), ("x\n", "c", 0), ("x", " c", 0), ("x", "\nc", 0), ("x", ".", 0)],
)
def test_responses_that_run_on_are_noted(makes, prompt, response, run_on):
    assert notes(makes["llama"], prompt, response, " x").get("run_on", 0) == run_on


def test_an_empty_prompt_or_a_template_lets_nothing_run_on(makes):
    assert notes(makes["llama"], "", "c") == {}
    make = MAKES["llama"]()
    BARE.give(make.tokenizer)
    example = PreferenceExample([user("x")], ([assistant("c")],))
    (result,) = Tokenization(tokenizer=make.tokenizer, max_length=99)([example])
    assert result[1] == Notes(no_end=1)


# Limits by hand.


@pytest.mark.parametrize(
    ("limits", "prompt", "response", "cuts"),
    [
        # The whole is <s> d e f | g h i </s>: eight tokens.
        ({"max_length": 9}, "<s> d e f", "g h i </s>", (0, 0)),
        ({"max_length": 8}, "<s> d e f", "g h i </s>", (0, 0)),
        ({"max_length": 7}, "<s> d e f", "g h i", (0, 1)),  # only the end token is cut
        ({"max_length": 6}, "<s> d e f", "g h", (0, 1)),
        ({"max_length": 5}, "<s> d e f", "g", (0, 1)),  # room for one token
        ({"max_length": 8, "max_prompt_length": 5}, "<s> d e f", "g h i </s>", (0, 0)),
        ({"max_length": 8, "max_prompt_length": 4}, "<s> d e f", "g h i </s>", (0, 0)),
        ({"max_length": 8, "max_prompt_length": 3}, "<s> e f", "g h i </s>", (1, 0)),
        ({"max_length": 8, "max_prompt_length": 2}, "<s> f", "g h i </s>", (1, 0)),
        ({"max_length": 8, "max_prompt_length": 1}, "<s>", "g h i </s>", (1, 0)),
        ({"max_length": 7, "max_prompt_length": 3}, "<s> e f", "g h i </s>", (1, 0)),
        ({"max_length": 6, "max_prompt_length": 3}, "<s> e f", "g h i", (1, 1)),
        ({"max_length": 4, "max_prompt_length": 3}, "<s> e f", "g", (1, 1)),
        ({"max_length": 2, "max_prompt_length": 1}, "<s>", "g", (1, 1)),
        ({"max_length": 8, "max_prompt_length": 3, "truncation_side": "right"}, "<s> d e", "g h i </s>", (1, 0)),
        ({"max_length": 8, "max_prompt_length": 1, "truncation_side": "right"}, "<s>", "g h i </s>", (1, 0)),
        ({"max_length": 5, "max_prompt_length": 2, "truncation_side": "right"}, "<s> d", "g h i", (1, 1)),
    ],
)
@pytest.mark.parametrize("name", ["llama", "closing"])
def test_limits_by_hand(makes, name, limits, prompt, response, cuts):
    ((example, noted),) = tokenize(makes[name], ("def", "ghi"), **limits)
    assert as_text(makes[name], example.prompt_ids) == prompt.split()
    assert as_text(makes[name], example.response_ids[0]) == response.split()
    assert (noted.cut_prompt, noted.cut_responses) == cuts
    (drop,) = tokenize(makes[name], ("def", "ghi"), **limits, truncation="drop")
    if any(cuts):
        assert str(drop) == f"{TOO_LONG}: 4 prompt tokens, 8 with the longest response."
    else:
        assert drop == (example, noted)


def test_a_prompt_without_begin_token_keeps_its_end(makes):
    assert only(makes["gpt2"], "def", "g", max_prompt_length=2) == (["e", "f"], [["g", "</s>"]])
    assert only(makes["gpt2"], "def", "g", max_prompt_length=1) == (["f"], [["g", "</s>"]])
    assert only(makes["gpt2"], "</s>def", "g", max_prompt_length=2) == (["</s>", "f"], [["g", "</s>"]])


def test_only_the_longer_response_is_cut(makes):
    ((example, noted),) = tokenize(makes["llama"], ("d", " fg", " h"), max_length=5)
    assert [as_text(makes["llama"], ids) for ids in example.response_ids] == [["Ġ", "f", "g"], ["Ġ", "h", "</s>"]]
    assert noted == Notes(cut_responses=1)


def test_a_prompt_that_fills_the_length_leaves_no_room(makes):
    for max_length in (4, 2):
        assert str(dropped(makes["llama"], "def", "g", max_length=max_length)) == (
            f"{NOTHING_LEFT}: the prompt has 4 tokens of `max_length` {max_length}; `max_prompt_length` cuts it."
        )
    assert only(makes["llama"], "def", "g", max_length=5)[1] == [["g"]]
    assert dropped(makes["llama"], "def", "g", max_length=4, truncation="drop").reason == TOO_LONG


def test_the_longest_response_says_how_long_an_example_is(makes):
    assert str(dropped(makes["llama"], "d", "e", "fghi", max_length=6, truncation="drop")) == (
        f"{TOO_LONG}: 2 prompt tokens, 7 with the longest response."
    )


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_length": 1}, r"`max_length` must be at least 2 \(a prompt and a response token\), got 1"),
        ({"max_prompt_length": 0}, r"`max_prompt_length` must be at least 1 and below `max_length` \(8\), .* got 0"),
        ({"max_prompt_length": 8}, r"below `max_length` \(8\), so that a response finds room, got 8"),
        ({"truncation": "cut"}, r"`truncation` must be keep or drop, got 'cut'"),
        ({"truncation_side": "middle"}, r"`truncation_side` must be left or right, got 'middle'"),
        ({"num_responses": 0}, r"`num_responses` must be 1 or more, got 0"),
    ],
)
def test_limits_that_make_no_sense_are_refused(makes, limits, message):
    with pytest.raises(UsageError, match=message):
        Tokenization(tokenizer=makes["llama"].tokenizer, **{"max_length": 8, **limits})


# Examples that teach nothing.


@pytest.mark.parametrize(
    ("name", "row", "limits", "reason"),
    [
        ("llama", ("d", "e", "e"), {}, EQUAL),
        ("llama", ("d", "e", "f", "e"), {}, EQUAL),
        ("llama", ("d", "", ""), {}, EQUAL),
        ("llama", ("d", "efg", "efh"), {"max_length": 4}, f"{EQUAL} after truncation"),
        ("wordpiece", ("d", "Ef", "eF"), {}, f"{EQUAL} after tokenisation"),
        ("wordpiece", ("d", "Ef", "eF", "g"), {"max_length": 99}, f"{EQUAL} after tokenisation"),
        ("llama", ("d", "e", ""), {}, NO_RESPONSE),
        ("llama", ("d", "", "e"), {}, NO_RESPONSE),
        ("llama", ("", ""), {}, NO_RESPONSE),
        ("gpt2", ("", "</s>"), {}, f"{NOTHING_LEFT}: no token of a response is left behind the prompt."),
    ],
)
def test_examples_that_teach_nothing_are_dropped(makes, name, row, limits, reason):
    assert str(dropped(makes[name], *row, **limits)) == reason


def test_responses_that_differ_in_their_end_alone_are_kept(makes):
    assert only(makes["llama"], "d", "e", "ef", max_length=4)[1] == [["e", "</s>"], ["e", "f"]]


def test_what_is_dropped_leaves_the_others_in_order(makes):
    rows = [(f"d{number}", "e" * (1 + number % 3), "" if number % 7 == 0 else "x") for number in range(50)]
    results = tokenize(makes["llama"], *rows)
    assert [isinstance(result, UnusableRow) for result in results] == [number % 7 == 0 for number in range(50)]
    for example, _ in usable(results):
        assert makes["llama"].tokenizer.decode(example.prompt_ids[1:]) == rows[example.row - 1][0]
    assert tokenize(makes["llama"]) == []


def test_only_the_best_responses_are_looked_at(makes):
    ((example, noted),) = tokenize(makes["llama"], ("d", " e", " f", " f", "", "a"), num_responses=2)
    assert [as_text(makes["llama"], ids)[1] for ids in example.response_ids] == ["e", "f"]
    assert noted == Notes()
    ((example, _),) = tokenize(makes["llama"], ("d", " e", " f"), num_responses=5)
    assert len(example.response_ids) == 2


def test_a_text_and_a_rendered_text_that_are_the_same_have_tokens_of_their_own():
    """The text is given a begin token by the tokenizer; what a template writes is not."""
    make = MAKES["llama"]()
    BARE.give(make.tokenizer)
    text = PreferenceExample("x", ("c", "y"))
    messages = PreferenceExample([user("x")], ([assistant("c")], [assistant("y")]))
    for examples in ([text, messages], [messages, text]):
        results = Tokenization(tokenizer=make.tokenizer, max_length=99)(examples)
        for example, (tokens, _) in zip(examples, results, strict=True):
            begin, end = (["<s>"], ["</s>"]) if example is text else ([], [])
            assert as_text(make, tokens.prompt_ids) == [*begin, "x"]
            assert as_text(make, tokens.response_ids[0]) == ["c", *end]


# Whole texts, split where what they share ends.


@pytest.mark.parametrize(
    ("texts", "prompt", "responses"),
    [
        (("x. It is c", "x. It is y"), "x. It is", [" c", " y"]),  # not behind the space: it belongs to the word
        (("A: b\n\nB: xyz", "A: b\n\nB: xy"), "A: b\n\nB:", [" xyz", " xy"]),
        (("x\nab", "x\nac"), "x\n", ["ab", "ac"]),  # a line ends a word, too
        (("c. x", "c. x y"), "c.", [" x", " x y"]),  # both have something left to say
        (("c ab", "c ac"), "c", [" ab", " ac"]),
    ],
)
@pytest.mark.parametrize("name", [name for name in MAKES if name != "wordpiece"])
def test_whole_texts_are_split_behind_their_last_common_word(makes, name, texts, prompt, responses):
    make = makes[name]
    ((example, noted),) = tokenize(make, (None, *texts))
    assert make.spelled(example.prompt_ids).removeprefix(" ") == prompt.removeprefix(" ")
    assert [make.spelled(ids) for ids in example.response_ids] == responses
    assert noted == Notes()
    assert (example, noted) == tokenize(make, (prompt, *responses))[0]


def test_a_split_is_made_where_a_token_ends():
    """The words end behind "c", but a token does not: "c xyz" and "c x" begin with "c " as one token."""
    tokenizer = bpe(BYTES, [("c", "Ġ")], [END])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    make = MAKES["qwen"]()._replace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END))
    prompt, responses = only(make, None, "x y c ab", "x y c ac")
    assert prompt == ["x", "Ġ", "y"]
    assert responses == [["Ġ", "cĠ", "a", "b", "</s>"], ["Ġ", "cĠ", "a", "c", "</s>"]]


@pytest.mark.parametrize("texts", [("ab", "ac"), ("xyz", "c"), ("x", "x"), (" x", " y"), ("a b", "ab"), ("\nx", "\ny")])
def test_whole_texts_that_share_no_word_are_not_split(makes, texts):
    assert str(dropped(makes["llama"], None, *texts)) == NOTHING_SHARED


def test_equal_whole_texts_are_equal_responses(makes):
    assert str(dropped(makes["llama"], None, "x y z", "x y z")) == EQUAL


def test_all_whole_texts_say_where_the_prompt_ends_even_those_that_are_left_out(makes):
    texts = ("x y z a", "x y z c", "x y c")
    prompt, responses = only(makes["qwen"], None, *texts, num_responses=2)
    assert prompt == ["x", "Ġ", "y"]
    assert len(responses) == 2


# By law, on random texts.


def at_inference(make, text: str) -> list[int]:
    """What a model is given to continue: all that the tokenizer makes, but for an end token behind it."""
    ids = make.tokenizer(text)["input_ids"]
    if make.adds_end:
        assert ids[-1] == make.tokenizer.eos_token_id
        ids = ids[:-1]
    return ids or [make.tokenizer.bos_token_id]


def texts(name: str, min_size: int = 0, max_size: int = 12) -> st.SearchStrategy[str]:
    """Texts full of merges; where a tokenizer knows all letters or their bytes, of all kinds of letters."""
    more = "" if name in ("sentencepiece", "always", "wordpiece") else "é漢🙂\u0301"
    return st.text("aabb xyz.E\n" + more, min_size=min_size, max_size=max_size)


@pytest.mark.parametrize("name", MAKES)
@given(data=st.data())
@LAW
def test_prompt_and_responses_are_what_was_written(makes, name, data):
    """The letters of prompt and responses are in their tokens, in order, each once: by spelling and by offsets."""
    make, prompt = makes[name], data.draw(texts(name))
    responses = data.draw(st.lists(texts(name, 1, 8), min_size=1, max_size=3, unique=True))
    (result,) = tokenize(make, (prompt, *responses))
    if isinstance(result, UnusableRow):
        assert (name == "qwen" and not prompt) or f"{EQUAL} after tokenisation" == result.reason
        return
    (example, noted), end = result, make.tokenizer.eos_token_id
    if name == "qwen" and not prompt:  # no begin token: the first token of the text is the prompt
        (response,) = example.response_ids
        assert [*example.prompt_ids, *response] == [*make.tokenizer(responses[0])["input_ids"], end]
        return
    assert example.prompt_ids == at_inference(make, prompt)
    assert len(example.response_ids) == len(responses)
    merged = 0
    for text, ids in zip(responses, example.response_ids, strict=True):
        assert ids[-1] == end
        assert ids.count(end) == 1
        if nothing := not make.spelled(example.prompt_ids):  # the text begins with the response
            assert make.spelled(ids) in (make.keeps(text), " " + make.keeps(text))
        else:
            assert make.spelled(ids) == make.keeps(text)
        whole = make.tokenizer(prompt + text, add_special_tokens=make.adds_begin, return_offsets_mapping=True)
        begin = [] if nothing and not make.adds_begin else example.prompt_ids
        together = whole["input_ids"][: -1 if make.adds_end else None]
        if together[: len(begin)] != begin:
            merged += 1
            continue
        assert begin + ids[:-1] == together
        letters = {place for place, letter in enumerate(prompt + text) if not letter.isspace()}
        spans = [letters & set(range(*span)) for span in whole["offset_mapping"][: len(together)]]
        assert set().union(*spans[: len(begin)]) == {place for place in letters if place < len(prompt)}
        assert set().union(*spans[len(begin) :]) == {place for place in letters if place >= len(prompt)}
    assert noted.merged == merged


def test_the_law_has_cases_of_merges(makes):
    """On random rows, so that the law above is one about something."""
    for make in makes.values():
        results = tokenize(make, *random_rows(0))
        assert 50 < len(usable(results)) < 200
        assert sum(noted.merged for _, noted in usable(results)) > 0


@pytest.mark.parametrize("name", MAKES)
@given(data=st.data())
@LAW
def test_whole_texts_are_split_and_nothing_is_lost(makes, name, data):
    shared = data.draw(texts(name, 1))
    whole = [shared + rest for rest in data.draw(st.lists(texts(name, 1, 8), min_size=2, max_size=2, unique=True))]
    (result,) = tokenize(makes[name], (None, *whole))
    if isinstance(result, UnusableRow):
        assert result.reason in (NOTHING_SHARED, f"{EQUAL} after tokenisation")
        return
    example, noted = result
    make = makes[name]
    for text, ids in zip(whole, example.response_ids, strict=True):
        expected = at_inference(make, text)
        assert example.prompt_ids + ids[:-1] == expected
    assert noted.merged == 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_cut_is_cut_at_the_right_place(make, seed, side):
    rng, rows = random.Random(seed), random_rows(seed, num=60)
    whole = {example.row: example for example, _ in usable(tokenize(make, *rows))}
    begin, cuts = make.tokenizer.bos_token_id, 0
    for _ in range(4):
        max_length = rng.randint(2, 14)
        max_prompt_length = rng.choice([None, *range(1, max_length)])
        limits = {"max_length": max_length, "max_prompt_length": max_prompt_length, "truncation_side": side}
        results, drops = tokenize(make, *rows, **limits), tokenize(make, *rows, **limits, truncation="drop")
        assert len(results) == len(drops) == len(rows)
        for result, drop in zip(results, drops, strict=True):
            if isinstance(result, UnusableRow):
                assert isinstance(drop, UnusableRow)
                continue
            example, noted = result
            full = whole[example.row]
            kept, prompt = example.prompt_ids, full.prompt_ids
            if max_prompt_length is None or len(prompt) <= max_prompt_length:
                assert kept == prompt
            elif side == "right":
                assert kept == prompt[:max_prompt_length]
            else:
                assert len(kept) == max_prompt_length
                first = int(prompt[0] == begin)
                assert kept[:first] == prompt[:first]
                assert kept[first:] == prompt[len(prompt) - len(kept) + first :]
            room = max_length - len(kept)
            assert example.response_ids == [ids[:room] for ids in full.response_ids]
            short = sum(len(ids) > room for ids in full.response_ids)
            cuts += short
            assert noted.cut_responses == short
            assert noted.cut_prompt == (kept != prompt)
            if noted.cut_responses or noted.cut_prompt:
                assert drop.reason == TOO_LONG
            else:
                assert drop == result
    assert cuts > 20


def test_encode_takes_off_what_is_put_behind_a_text_and_nothing_else(makes):
    for name, expected in {
        "llama": ["<s>", "x", "</s>"],
        "gpt2": ["x", "</s>"],
        "closing": ["<s>", "x", "</s>"],
        "qwen": ["x", "</s>"],
    }.items():
        assert as_text(makes[name], encode(makes[name].tokenizer, ["x</s>"])[0]) == expected
    assert encode(makes["qwen"].tokenizer, ["", "x"])[0] == []
    assert encode(makes["llama"].tokenizer, []) == []
