"""What a model is trained on is what it sees at inference: prompt, boundary, end token, limits; by hand and by law.

In the byte-level tokenizers every letter is a token, but for "ab", "xy", "xyz" and " a", which are one each.
"""

from __future__ import annotations

import random

import pytest

from dpo_lightning.data.example import PreferenceExample, TokenizedExample
from dpo_lightning.data.report import DataReport
from dpo_lightning.data.tokenize import CUT_PROMPT, CUT_RESPONSE, MERGED, NO_END, TWO_BEGINS, Tokenization, encode
from dpo_lightning.errors import UsageError

NO_ROOM = "prompt leaves no room for a response token (max_prompt_length cuts prompts)"


def tokenize(make, *rows, **limits) -> tuple[list[TokenizedExample], DataReport]:
    """Rows as (prompt, response, response, ...)."""
    report = DataReport("rows", rows=len(rows))
    examples = [
        PreferenceExample(prompt, tuple(responses), number) for number, (prompt, *responses) in enumerate(rows, 1)
    ]
    tokenization = Tokenization(tokenizer=make.tokenizer, **{"max_length": 10_000, **limits})
    return list(tokenization(examples, report)), report


def as_text(make, ids: list[int]) -> list[str]:
    return make.tokenizer.convert_ids_to_tokens(ids)


def only(make, *row, **limits) -> tuple[list[str], list[list[str]]]:
    """Tokens of prompt and responses of the one row, which is kept."""
    (example,), _ = tokenize(make, row, **limits)
    return as_text(make, example.prompt_ids), [as_text(make, ids) for ids in example.response_ids]


def dropped(make, *row, **limits) -> dict[str, int]:
    examples, report = tokenize(make, row, **limits)
    assert examples == []
    assert report.kept == 0
    return dict(report.dropped)


def random_rows(seed: int, num: int = 200) -> list[tuple[str, ...]]:
    """Texts full of merges, now and then empty or equal, with 1 to 3 responses."""
    rng = random.Random(seed)

    def word(longest: int) -> str:
        return "".join(rng.choice("ab ab xyz.E\n") for _ in range(rng.randint(0, longest)))

    return [(word(12), *(word(8) for _ in range(rng.randint(1, 3)))) for _ in range(num)]


# By hand.


@pytest.mark.parametrize(
    ("name", "prompt", "first", "second"),
    [
        ("llama", ["<s>", "x", "."], ["c", "</s>"], ["Ġa", "</s>"]),
        ("gpt2", ["x", "."], ["c", "</s>"], ["Ġa", "</s>"]),
        ("closing", ["<s>", "x", "."], ["c", "</s>"], ["Ġa", "</s>"]),
        ("qwen", ["x", "."], ["c", "</s>"], ["Ġa", "</s>"]),
        ("sentencepiece", ["<s>", "▁", "x", "."], ["c", "</s>"], ["▁a", "</s>"]),
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
        ("wordpiece", ["[CLS]"]),
    ],
)
def test_an_empty_prompt_is_the_begin_token(makes, name, prompt):
    tokens, responses = only(makes[name], "", "c", "xyz")
    assert tokens == prompt
    assert [response[-2:] for response in responses] == [["c", responses[0][-1]], ["xyz", responses[0][-1]]]


def test_an_empty_prompt_needs_a_begin_token(makes):
    assert dropped(makes["qwen"], "", "c") == {"empty prompt, and the tokenizer has no begin token": 1}


def test_a_begin_token_in_the_response_is_not_there_twice(makes):
    assert only(makes["gpt2"], "", "</s>c") == (["</s>"], [["c", "</s>"]])


def test_a_merge_across_the_boundary_leaves_the_prompt_alone(makes):
    for name in ("llama", "gpt2", "closing", "qwen"):
        (example,), report = tokenize(makes[name], ("xa", "bc", "c", "abx"))
        prompt, responses = only(makes[name], "xa", "bc", "c", "abx")
        assert prompt[-2:] == ["x", "a"]
        # "xa" + "bc" is x ab c: "bc" is tokenised by itself. The others are the rest of the whole.
        assert responses == [["b", "c", "</s>"], ["c", "</s>"], ["ab", "x", "</s>"]]
        assert report.noted[MERGED] == 1
        assert makes[name].tokenizer.decode(example.response_ids[0][:-1]) == "bc"


def test_a_merge_that_takes_the_whole_prompt(makes):
    assert only(makes["llama"], "xy", "z") == (["<s>", "xy"], [["z", "</s>"]])


@pytest.mark.parametrize("response", ["c</s>", "c"])
def test_the_end_token_stands_once(makes, response):
    for name in ("llama", "gpt2", "closing", "qwen", "sentencepiece"):
        assert only(makes[name], "x.", response)[1] == [["c", "</s>"]]


@pytest.mark.parametrize(("name", "begin"), [("llama", ["<s>"]), ("gpt2", []), ("closing", ["<s>"]), ("qwen", [])])
def test_a_prompt_that_ends_with_the_end_token_keeps_it(makes, name, begin):
    assert only(makes[name], "x</s>", "c") == ([*begin, "x", "</s>"], [["c", "</s>"]])


def test_padding_that_is_the_end_token_is_no_reason_to_drop_it(makes):
    tokenizer = makes["gpt2"].tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (example,), _ = tokenize(makes["gpt2"], ("x", "c"))
    assert example.response_ids[0][-1] == tokenizer.pad_token_id


def test_a_tokenizer_without_end_token_is_noted(makes):
    make = makes["llama"]
    bare = make._replace(tokenizer=type(make.tokenizer)(tokenizer_object=make.tokenizer.backend_tokenizer))
    (example,), report = tokenize(bare, ("x", "c", "y"))
    assert [as_text(make, ids) for ids in example.response_ids] == [["c"], ["y"]]
    assert report.noted[NO_END] == 2


def test_two_begin_tokens_are_noted(makes):
    _, report = tokenize(makes["llama"], ("<s>x", "c"), ("x", "c"))
    assert report.noted[TWO_BEGINS] == 1
    _, report = tokenize(makes["gpt2"], ("</s>x", "c"))
    assert report.noted[TWO_BEGINS] == 0


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
    ],
)
@pytest.mark.parametrize("name", ["llama", "closing"])
def test_limits_by_hand(makes, name, limits, prompt, response, cuts):
    (example,), report = tokenize(makes[name], ("def", "ghi"), **limits)
    assert as_text(makes[name], example.prompt_ids) == prompt.split()
    assert as_text(makes[name], example.response_ids[0]) == response.split()
    assert (report.noted[CUT_PROMPT], report.noted[CUT_RESPONSE]) == cuts


def test_a_prompt_without_begin_token_keeps_its_end(makes):
    assert only(makes["gpt2"], "def", "g", max_prompt_length=2) == (["e", "f"], [["g", "</s>"]])
    assert only(makes["gpt2"], "def", "g", max_prompt_length=1) == (["f"], [["g", "</s>"]])


def test_only_the_longer_response_is_cut(makes):
    (example,), report = tokenize(makes["llama"], ("d", "efg", "h"), max_length=4)
    assert [as_text(makes["llama"], ids) for ids in example.response_ids] == [["e", "f"], ["h", "</s>"]]
    assert report.noted[CUT_RESPONSE] == 1


def test_a_prompt_that_fills_the_length_leaves_no_room(makes):
    assert dropped(makes["llama"], "def", "g", max_length=4) == {NO_ROOM: 1}
    assert dropped(makes["llama"], "def", "g", max_length=2) == {NO_ROOM: 1}
    assert only(makes["llama"], "def", "g", max_length=5)[1] == [["g"]]


@pytest.mark.parametrize(
    ("name", "row", "limits", "reason"),
    [
        ("llama", ("d", "e", "e"), {}, "equal responses"),
        ("llama", ("d", "e", "f", "e"), {}, "equal responses"),
        ("llama", ("d", "", ""), {}, "equal responses"),
        ("llama", ("d", "efg", "efh"), {"max_length": 4}, "equal responses after truncation"),
        ("wordpiece", ("d", "Ef", "eF"), {}, "equal responses after tokenisation"),
        ("llama", ("d", "e", ""), {}, "empty response"),
        ("llama", ("d", "", "e"), {}, "empty response"),
        ("llama", ("", ""), {}, "empty response"),
        ("gpt2", ("", "</s>"), {}, "no response token"),
    ],
)
def test_examples_that_teach_nothing_are_dropped(makes, name, row, limits, reason):
    assert dropped(makes[name], *row, **limits) == {reason: 1}


def test_responses_that_differ_in_their_end_alone_are_kept(makes):
    assert only(makes["llama"], "d", "e", "ef", max_length=4)[1] == [["e", "</s>"], ["e", "f"]]


def test_mean_lengths_are_counted(makes):
    _, report = tokenize(makes["llama"], ("d", "e", "fgh"), ("d", "e", "e"))
    assert (report.kept, report.prompt_tokens, report.response_tokens) == (1, 2, 2 + 4)
    assert str(report).splitlines() == [
        "rows: 1 of 2 rows kept, read as nothing",
        "  dropped 1: equal responses",
        "  mean tokens an example: prompt 2, responses 6 together",
    ]


def test_more_rows_than_are_tokenised_at_a_time_stay_in_order(makes):
    rows = [(f"d{number}", "e" * (1 + number % 3)) for number in range(2_500)]
    examples, _ = tokenize(makes["llama"], *rows)
    assert [example.row for example in examples] == list(range(1, 2_501))
    assert [makes["llama"].tokenizer.decode(example.prompt_ids[1:]) for example in examples] == [r[0] for r in rows]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_length": 1}, r"`max_length` must be at least 2 \(a prompt and a response token\), got 1"),
        ({"max_prompt_length": 0}, r"`max_prompt_length` must be at least 1 and below `max_length` \(8\), .* got 0"),
        ({"max_prompt_length": 8}, r"below `max_length` \(8\), so that a response finds room, got 8"),
    ],
)
def test_limits_without_room_are_refused(makes, limits, message):
    with pytest.raises(UsageError, match=message):
        Tokenization(tokenizer=makes["llama"].tokenizer, **{"max_length": 8, **limits})


# By law, on random texts.


def at_inference(make, text: str) -> list[int]:
    """What a model is given to continue: all that the tokenizer makes, but for an end token behind it."""
    ids = make.tokenizer(text)["input_ids"]
    if make.adds_end:
        assert ids[-1] == make.tokenizer.eos_token_id
        ids = ids[:-1]
    return ids or [make.tokenizer.bos_token_id]


@pytest.mark.parametrize("seed", range(3))
def test_the_prompt_is_what_the_model_sees_at_inference(make, seed):
    rows = random_rows(seed)
    examples, report = tokenize(make, *rows)
    assert 50 < len(examples) < len(rows)
    for example in examples:
        assert example.prompt_ids == at_inference(make, rows[example.row - 1][0])
        assert len(example.response_ids) == len(rows[example.row - 1]) - 1  # one prompt for all of them
    assert report.kept == len(examples)


@pytest.mark.parametrize("seed", range(3))
def test_a_response_is_the_rest_of_the_whole_where_the_prompt_is_its_prefix(make, seed):
    rows, merged, end = random_rows(seed), 0, make.tokenizer.eos_token_id
    examples, report = tokenize(make, *rows)
    for example in examples:
        prompt, *responses = rows[example.row - 1]
        for text, ids in zip(responses, example.response_ids, strict=True):
            assert ids[-1] == end
            assert ids.count(end) == 1
            whole, before = at_inference(make, prompt + text), at_inference(make, prompt)
            if not prompt and not make.adds_begin:
                before = []
            if whole[: len(before)] == before:
                assert ids[:-1] == whole[len(before) :]
            else:
                merged += 1
                assert ids[:-1] == make.tokenizer(text, add_special_tokens=False)["input_ids"]
            if make.exact and whole[: len(before)] == before:
                decoded = make.tokenizer.decode(example.prompt_ids + ids, skip_special_tokens=True)
                # SentencePiece takes a space at the very beginning for its own.
                assert decoded.lstrip(" ") == (prompt + text).lstrip(" ")
    assert report.noted[MERGED] == merged > 0


@pytest.mark.parametrize("seed", range(3))
def test_byte_level_tokens_always_spell_the_text(makes, seed):
    rows = random_rows(seed)
    for name in ("llama", "gpt2", "closing", "qwen"):
        tokenizer = makes[name].tokenizer
        for example in tokenize(makes[name], *rows)[0]:
            prompt, *responses = rows[example.row - 1]
            for text, ids in zip(responses, example.response_ids, strict=True):
                assert tokenizer.decode(example.prompt_ids + ids, skip_special_tokens=True) == prompt + text


@pytest.mark.parametrize("seed", range(3))
def test_what_is_cut_is_cut_at_the_right_place(make, seed):
    rng, rows = random.Random(seed), random_rows(seed)
    whole = {example.row: example for example in tokenize(make, *rows)[0]}
    begin, cuts = make.tokenizer.bos_token_id, 0
    for _ in range(10):
        max_length = rng.randint(2, 14)
        max_prompt_length = rng.choice([None, *range(1, max_length)])
        examples, report = tokenize(make, *rows, max_length=max_length, max_prompt_length=max_prompt_length)
        for example in examples:
            full = whole[example.row]
            kept, prompt = example.prompt_ids, full.prompt_ids
            if max_prompt_length is None or len(prompt) <= max_prompt_length:
                assert kept == prompt
            else:
                assert len(kept) == max_prompt_length
                first = int(prompt[0] == begin)
                assert kept[:first] == prompt[:first]
                assert kept[first:] == prompt[len(prompt) - len(kept) + first :]
            for cut, response in zip(example.response_ids, full.response_ids, strict=True):
                assert cut == response[: max_length - len(kept)]
                cuts += cut != response
        assert report.rows == len(rows) == report.kept + sum(report.dropped.values())
        assert report.noted[CUT_RESPONSE] == sum(
            short != long
            for example in examples
            for short, long in zip(example.response_ids, whole[example.row].response_ids, strict=True)
        )
    assert cuts > 100


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
