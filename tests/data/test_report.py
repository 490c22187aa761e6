"""Every figure of a data report worked by hand, in words, as markdown and as JSON."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from dpo_lightning.data.example import TokenizedExample, UnusableRow
from dpo_lightning.data.report import NOTES, DataReport, Dropped
from dpo_lightning.data.table import record, records_table
from dpo_lightning.data.tokenize import Notes
from dpo_lightning.errors import UsageError


def example(row: int, prompt: int, *responses: int, **notes: int):
    """A row of a token table with so many tokens in the prompt and in each response."""
    ids = [[number] * length for number, length in enumerate(responses)]
    return record(row, (TokenizedExample([7] * prompt, ids, row), Notes(**notes)))


def unusable(row: int, reason: str, detail: str = ""):
    return record(row, UnusableRow(reason, detail))


def report(*records, batch_size: int = 8, **kwargs) -> DataReport:
    found = DataReport("train", "rows.jsonl", "Pairs (a, b)", [], batch_size, rows=len(records), **kwargs)
    found.count(records_table(list(records)))
    return found


PAIRS = [example(1, 3, 4, 2), example(2, 2, 1, 5), example(3, 1, 3, 3)]


def test_pairs_by_hand():
    """Prompts 3 + 2 + 1 = 6 tokens, chosen 4 + 1 + 3, rejected 2 + 5 + 3: 24 in the stream.

    As rows the longest is 3 + 4 = 2 + 5 = 7: one batch of 3 examples has 6 rows of 7, three batches of one have
    2 rows of 7, of 7 and of 4.
    """
    whole, single = report(*PAIRS, batch_size=3), report(*PAIRS, batch_size=1)
    assert whole.lengths == {
        "prompt": Counter({3: 1, 2: 1, 1: 1}),
        "chosen": Counter({4: 1, 1: 1, 3: 1}),
        "rejected": Counter({2: 1, 5: 1, 3: 1}),
    }
    assert (whole.responses, whole.kept, whole.num_dropped) == ({2: 3}, 3, 0)
    assert whole.longer == {"chosen": 1, "neither": 1, "rejected": 1}
    assert whole.stream_tokens == single.stream_tokens == 24
    assert (whole.padded_tokens, single.padded_tokens) == (6 * 7, 2 * (7 + 7 + 4))


def test_up_to_four_responses_by_hand():
    """Best of 2 tokens against 3, 1 and 2; best of 5 against 1; one alone: 4 pairs. Rows of 5, 6 and 7 tokens."""
    records = [example(1, 2, 2, 3, 1, 2), example(2, 1, 5, 1), example(3, 4, 3)]
    whole, single = report(*records, batch_size=3), report(*records, batch_size=1)
    assert whole.responses == {4: 1, 2: 1, 1: 1}
    assert whole.lengths == {
        "prompt": {2: 1, 1: 1, 4: 1},
        "chosen": {2: 1, 5: 1, 3: 1},
        "rejected": {3: 1, 1: 2, 2: 1},
    }
    assert whole.longer == {"chosen": 2, "neither": 1, "rejected": 1}
    assert whole.stream_tokens == (2 + 8) + (1 + 6) + (4 + 3)
    assert whole.padded_tokens == (4 + 2 + 1) * 7
    assert single.padded_tokens == 4 * (2 + 3) + 2 * (1 + 5) + 1 * (4 + 3)
    table = {name: (figure, remark) for name, figure, remark in whole.table()}
    assert table["responses"] == ("7", "1 of 1, 1 of 2, 1 of 4")
    assert table["chosen is longer"] == ("50.0%", "of pairs; equally long 25.0%")


def test_one_response_by_hand():
    single = report(example(1, 2, 3), example(2, 1, 5), batch_size=2)
    assert single.lengths == {"prompt": {2: 1, 1: 1}, "chosen": {3: 1, 5: 1}}
    assert (single.stream_tokens, single.padded_tokens) == (11, 12)
    names = [name for name, *_ in single.table()]
    assert names == ["read as", "rows read", "examples kept", "prompt tokens", "response tokens", "tokens"]
    assert sum(single.longer.values()) == 0


def test_padding_is_that_of_shuffled_batches():
    # Sorted, each batch of two would hold equal lengths and nothing would be padded.
    records = [example(number, 1, length, length) for number, length in enumerate([1, 1, 9, 9] * 8)]
    shuffled = report(*records, batch_size=2)
    assert shuffled.stream_tokens == 16 * (1 + 2) + 16 * (1 + 18)
    fewest = 16 * 2 * 2 + 16 * 2 * 10
    assert fewest < shuffled.padded_tokens <= 32 * 2 * 10
    assert shuffled.padded_tokens == report(*records, batch_size=2).padded_tokens


@pytest.mark.parametrize(
    ("lengths", "mean", "median", "high", "most"),
    [(range(1, 21), "10", 10, 19, 20), (range(1, 4), "2", 2, 3, 3), ([1] * 19 + [1000], "51", 1, 1, "1,000")],
)
def test_lengths_are_summed_up(lengths, mean, median, high, most):
    lines = {name: line for name, *line in report(*(example(1, length, 1) for length in lengths)).table()}
    assert lines["prompt tokens"] == [mean, f"on the mean; median {median}, 95 % {high}, most {most}"]


def test_drops_are_counted_by_reason_with_their_first_rows():
    records = [
        unusable(2, "too long", "9 tokens."),
        example(3, 1, 1, 2),
        unusable(4, "empty"),
        unusable(5, "too long", "8 tokens."),
        *(unusable(row, "empty") for row in (6, 6, 7, 8, 9)),
    ]
    found = report(*records)
    assert found.dropped == {
        "too long": Dropped(2, [2, 5], False, "9 tokens."),
        "empty": Dropped(6, [4, 6, 7, 8, 9], False, ""),
    }
    assert (found.kept, found.num_dropped) == (1, 8)
    lines = [line for line in found.table() if line[0] == "dropped"]
    assert lines == [
        ("dropped", "6", "empty (rows 4, 6, 7, 8, 9)"),
        ("dropped", "2", "too long (rows 2, 5): 9 tokens."),
    ]
    found.count(records_table([unusable(9, "empty")]))
    assert not found.dropped["empty"].more
    found.count(records_table([unusable(10, "empty"), unusable(9, "empty")]))
    lines = [line for line in found.table() if line[0] == "dropped"]
    assert lines[0] == ("dropped", "9", "empty (rows 4, 6, 7, 8, 9, ...)")


def test_one_row_of_several_examples_is_one_row():
    # Rows are those of the source, drops those of its examples.
    found = report(unusable(1, "empty"), unusable(1, "empty"), example(1, 1, 1))
    found.rows = 1
    lines = found.table()
    assert ("dropped", "2", "empty (row 1)") in lines
    assert ("examples in them", "3", "") in lines
    assert ("examples kept", "1", "33.33%") in lines


def test_what_happened_is_summed_over_examples():
    notes = {name: number for number, name in enumerate(Notes._fields, start=1)}
    found = report(example(1, 1, 1, **notes), example(2, 1, 2, **notes), example(3, 1, 3))
    assert found.noted == {name: 2 * number for name, number in notes.items()}
    said = [(figure, remark) for name, figure, remark in found.table() if name == "of those kept"]
    assert said == [(str(2 * notes[name]), what) for name, what in NOTES.items()]
    assert set(NOTES) == set(Notes._fields)
    assert not any(name == "of those kept" for name, *_ in report(example(1, 1, 1)).table())


def test_the_table_in_a_terminal():
    found = report(*PAIRS, unusable(4, "empty", "it is blank."), batch_size=3, origin="tokenised in 0.1 s")
    found.unread, found.duplicates = ["id", "date"], 1
    found.noted["merged"] = 2
    assert str(found) == (
        "train: rows.jsonl\n"
        "  read as                  Pairs (a, b)\n"
        "  columns not read      2  id, date\n"
        "  rows read             4  tokenised in 0.1 s\n"
        "  examples kept         3  75.00%\n"
        "  dropped               1  empty (row 4): it is blank.\n"
        "  of those kept         2  responses tokenised by themselves, since tokens merge across the boundary\n"
        "  of those kept         1  equal to an earlier one\n"
        "  prompt tokens         2  on the mean; median 2, 95 % 3, most 3\n"
        "  chosen tokens         3  on the mean; median 3, 95 % 4, most 4\n"
        "  rejected tokens       3  on the mean; median 3, 95 % 5, most 5\n"
        "  chosen is longer  33.3%  of pairs; equally long 33.3%\n"
        "  tokens               24  in the stream, once through; padded rows would hold 42 (1.75x), 3 examples a batch"
    )


def test_markdown_is_a_table_whatever_the_cells_hold():
    found = report(*PAIRS, unusable(4, "a|b", "two\nlines"))
    title, blank, head, rule, *body = found.markdown().split("\n")
    assert (title, blank, head, rule) == ("**train: rows.jsonl**", "", "| | | |", "|---|--:|---|")
    assert "| dropped | 1 | a\\|b (row 4): two lines |" in body
    assert len(body) == len(found.table())
    assert all(line.replace("\\|", "").count("|") == 4 for line in body)


def test_json_holds_every_count():
    found = report(*PAIRS, unusable(4, "empty", "it is blank."), batch_size=3, origin="tokenised")
    found.noted["merged"], found.duplicates, found.unread = 2, 1, ["id"]
    plain = json.loads(json.dumps(found.to_json()))
    lengths, noted = plain.pop("lengths"), plain.pop("noted")
    assert plain == {
        "split": "train",
        "source": "rows.jsonl",
        "format": "Pairs (a, b)",
        "unread": ["id"],
        "batch_size": 3,
        "rows": 4,
        "kept": 3,
        "origin": "tokenised",
        "dropped": {"empty": {"count": 1, "rows": [4], "more": False, "detail": "it is blank."}},
        "duplicates": 1,
        "responses": {"2": 3},
        "longer": {"chosen": 1, "neither": 1, "rejected": 1},
        "stream_tokens": 24,
        "padded_tokens": 42,
    }
    assert noted["merged"] == 2
    assert set(lengths) == {"prompt", "chosen", "rejected"}
    chosen = lengths["chosen"]
    assert {name: chosen[name] for name in ("mean", "median", "percentile_95", "most")} == {
        "mean": pytest.approx(8 / 3),
        "median": 3,
        "percentile_95": 4,
        "most": 4,
    }
    # 1, 3 and 4 tokens, of at most 4: a bin each.
    assert (chosen["counts"], chosen["edges"]) == ([1, 0, 1, 1], [0.0, 1.25, 2.5, 3.75, 5.0])


@pytest.mark.parametrize("longest", [1, 2, 19, 20, 21, 1000])
def test_histograms_hold_every_length(longest):
    lengths = [1, 1, (longest + 1) // 2, longest]
    found = json.loads(json.dumps(report(*(example(1, length, 1) for length in lengths)).to_json()))
    histogram = found["lengths"]["prompt"]
    assert sum(histogram["counts"]) == 4
    assert len(histogram["counts"]) == len(histogram["edges"]) - 1 <= 20
    assert histogram["edges"][0] == 0
    for low, high, count in zip(histogram["edges"], histogram["edges"][1:], histogram["counts"], strict=False):
        assert count == sum(low <= length < high for length in lengths)


def random_records(seed: int, num: int):
    rng = random.Random(seed)
    for row in range(num):
        if rng.random() < 0.3:
            yield unusable(row, rng.choice(["empty", "equal", "too long"]), f"{rng.random()}")
        else:
            notes = {name: rng.randint(0, 2) for name in Notes._fields}
            yield example(row, rng.randint(1, 9), *rng.choices(range(1, 9), k=rng.randint(1, 4)), **notes)


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_counting_in_chunks_is_counting_at_once(size):
    records = list(random_records(0, 100))
    once = report(*records)
    chunks = DataReport("train", "rows.jsonl", "Pairs (a, b)", [], 8, rows=100)
    for start in range(0, 100, size):
        chunks.count(records_table(records[start : start + size]))
    # Which examples stand in one batch, and so how far they are padded, is another matter.
    chunks.padded_tokens = once.padded_tokens
    assert chunks.to_json() == once.to_json()
    assert str(chunks) == str(once)


def test_nothing_kept_is_a_report_too():
    for found in (report(), report(unusable(1, "empty")), DataReport("train", "a stream", "Texts (text)", [], 8)):
        assert found.lengths == {}
        assert "examples kept" in str(found)
        assert json.loads(json.dumps(found.to_json()))["kept"] == 0
    assert [name for name, *_ in report(unusable(1, "empty")).table()] == [
        "read as",
        "rows read",
        "examples kept",
        "dropped",
    ]


def test_drops_are_refused_by_the_first_row_and_its_reason():
    report(*PAIRS).refuse_drops()
    with pytest.raises(UsageError) as caught:
        report(unusable(3, "empty", "it is blank."), PAIRS[0], unusable(5, "too long")).refuse_drops()
    assert str(caught.value) == (
        "rows.jsonl, row 3: empty: it is blank.\n"
        "2 of 3 examples cannot be used, and `data.init_args.strict` allows none."
    )
    with pytest.raises(UsageError, match=r"^rows\.jsonl, row 4: empty\n1 of 1 examples"):
        report(unusable(4, "empty")).refuse_drops()
    several = report(unusable(4, "empty"), *PAIRS)
    several.rows = 1  # examples are counted, of which a row may hold many
    with pytest.raises(UsageError, match=r"\n1 of 4 examples cannot be used"):
        several.refuse_drops()
