"""Tokens are made once and found again, until anything changes them; a start that dies leaves nothing half done."""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import pickle
import random
import re
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_lightning.data import key, table
from dpo_lightning.data.chat import Chat
from dpo_lightning.data.example import PreferenceExample, TokenizedExample, UnusableRow
from dpo_lightning.data.files import Files
from dpo_lightning.data.formats import Format, Pairs
from dpo_lightning.data.rankings import Columns, Rankings
from dpo_lightning.data.reading import begin
from dpo_lightning.data.sources import HubDataset, Rows, Source
from dpo_lightning.data.supervised import Texts
from dpo_lightning.data.table import Examples, record, records_table, tokenize
from dpo_lightning.data.tokenize import Notes, Tokenization
from dpo_lightning.errors import UsageError

ROWS = [{"prompt": f"p{number}", "chosen": " good", "rejected": " bad", "other": " sad"} for number in range(7)]
DIALOGUE = [{"role": "user", "content": "Hm?"}]
TEMPLATE = (
    "{{ greeting }}{% for message in messages %}{{ message.role }}:{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own; here lie the tokens."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "dpo_lightning"


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """All texts that any tokenizer was given in lists, as examples are."""
    texts: list[str] = []
    whole = PreTrainedTokenizerBase.__call__

    def spy(self, text, **kwargs):
        texts.extend(text if isinstance(text, list) else [])
        return whole(self, text, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", spy)
    return texts


@pytest.fixture
def tokenizer(makes, tmp_path):
    """A tokenizer that a test may change."""
    makes["llama"].tokenizer.save_pretrained(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


@pytest.fixture
def made(tokenizer):
    """A table by what is other than usual: rows or source, format, what to do with the tokenizer, settings."""

    def make(source=ROWS, shape=None, change=lambda tokenizer: None, cache=True, num_proc=None, **settings):
        change(tokenizer)
        tokenization = Tokenization(**{"tokenizer": tokenizer, "max_length": 64, **settings})
        source = source if isinstance(source, Source) else Rows(source)
        return tokenize(source, shape, tokenization, cache=cache, num_proc=num_proc)

    return make


def listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


# What the tokens are.


def test_tokens_are_those_of_reading_and_tokenising_row_by_row(makes, made, monkeypatch):
    rng = random.Random(0)
    texts = ["", "x", "xa", "b", " good", "ab ab", "z" * 20, "\ud800"]
    rows = [{"prompt": rng.choice(texts), "responses": rng.choices(texts, k=rng.randint(1, 4))} for _ in range(200)]
    monkeypatch.setattr(table, "CHUNK", 7)
    made_table = made(rows, Rankings(), max_length=12)
    tokenization = Tokenization(tokenizer=makes["llama"].tokenizer, max_length=12)
    expected = []
    for _, items in begin(Rows(rows).numbered(), Rankings(), "rows").examples():
        for item in items:
            expected += tokenization([item]) if isinstance(item, PreferenceExample) else [item]
    kept = [result[0] for result in expected if not isinstance(result, UnusableRow)]
    assert 20 < len(kept) < 180
    assert [example._replace(digest=None) for example in made_table.kept()] == kept
    reasons = [(result.reason, result.detail) if isinstance(result, UnusableRow) else ("", "") for result in expected]
    assert list(zip(made_table.tokens["reason"], made_table.tokens["detail"], strict=True)) == reasons
    notes = [result[1] for result in expected if not isinstance(result, UnusableRow)]
    assert {name: made_table.kept().column(name).tolist() for name in Notes._fields} == {
        name: [getattr(note, name) for note in notes] for name in Notes._fields
    }
    assert (made_table.rows, len(made_table.tokens)) == (200, 200)


def test_masks_of_dialogues_are_kept(made, tmp_path):
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    answer = {"role": "assistant", "content": "Yes."}
    tokens = made([{"messages": [*DIALOGUE, answer, *DIALOGUE, answer]}], chat=Chat(template=str(tmp_path / "t.jinja")))
    (example,) = tokens.kept()
    assert [type(value) for value in example.scored[0][:1]] == [bool]
    assert len(example.scored[0]) == len(example.response_ids[0])
    assert 0 < sum(example.scored[0]) < len(example.scored[0])


def test_rows_of_several_examples_count_once(made):
    rows = [{"prompt": ["a", "b"], "responses": [["x", "y"], ["x", "x"]]}, {"prompt": ["c"], "responses": [["x", "y"]]}]
    tokens = made(rows, Columns(rows=Rankings()))
    assert (tokens.rows, tokens.tokens["row"][:], tokens.tokens["reason"][:]) == (
        2,
        [1, 1, 2],
        ["", "equal responses", ""],
    )
    assert [example.row for example in tokens.kept()] == [1, 2]


class Nothing(Format):
    """Finds nothing in any row."""

    def columns(self):
        return ("prompt",)

    def read(self, row):
        return []


def test_a_row_in_which_a_format_finds_nothing_is_dropped_with_a_reason(made):
    tokens = made(ROWS, Nothing())
    assert (tokens.rows, tokens.tokens["reason"][:]) == (7, ["no example in the row"] * 7)
    assert len(tokens.kept()) == 0


def test_any_text_survives_the_way_to_the_disk(made, makes, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages[0].note is number }}" + TEMPLATE)
    rows = [
        {"prompt": "\0 ✓ \u2028 🙂", "responses": ["\\ud800", "é\r\n"]},
        {"prompt": [{"role": "user", "content": "Hm?", "note": 3.5}], "responses": ["a", "b"]},
    ]
    tokens = made(rows, Rankings(), chat=Chat(template=str(tmp_path / "t.jinja")), max_length=500).kept()
    decode = makes["llama"].tokenizer.decode
    assert [[decode(ids) for ids in (example.prompt_ids, *example.response_ids)] for example in tokens] == [
        ["<s>\0 ✓ \u2028 🙂", "\\ud800</s>", "é\r\n</s>"],
        ["Trueuser:Hm?</s>assistant:", "a</s>", "b</s>"],
    ]


def test_examples_are_a_sequence():
    examples = [TokenizedExample([1, number], [[number], [2, 3]], number) for number in range(6)]
    notes = Notes()
    records = [record(e.row, (e, notes)) for e in examples]
    examples = [e._replace(digest=item["digest"]) for e, item in zip(examples, records, strict=True)]
    whole = Examples(datasets.Dataset(records_table(records)))
    assert len(whole) == 6
    assert (whole[0], whole[-1], whole[np.int64(2)]) == (examples[0], examples[-1], examples[2])
    assert whole[1:6:2] == examples[1:6:2]
    assert whole[::-1] == examples[::-1]
    assert whole.__getitems__([4, 0, 4]) == [examples[4], examples[0], examples[4]]
    assert list(whole.select([5, 1])) == [examples[5], examples[1]]
    joined = Examples.joined([whole.select([3]), whole.select([0, 2])])
    assert list(joined) == [examples[3], examples[0], examples[2]]
    assert joined.prompts().tolist() == whole.select([3, 0, 2]).prompts().tolist()
    with pytest.raises(IndexError):
        whole[6]


def test_digests_tell_examples_and_prompts_apart():
    def digests(prompt, responses, scored=None, begin=0):
        row = record(1, (TokenizedExample(prompt, responses, 1, scored), Notes()), begin)
        return row["digest"], row["prompt_digest"]

    same = digests([0, 5], [[1], [2]])
    assert digests([0, 5], [[1], [2]]) == same
    others = [[[2], [1]], [[1, 2]], [[1], [2], [3]], [[1], [3]], [[1], [2, 0]]]
    found = [
        same,
        *(digests([0, 5], responses) for responses in others),
        digests([0, 5], [[1], [2]], [[True], [False]]),
    ]
    assert len({whole for whole, _ in found}) == len(found)
    assert {prompt for _, prompt in found} == {same[1]}
    assert digests([0, 6], [[1], [2]])[1] != same[1]
    assert digests([0, 5, 1], [[2]])[0] != digests([0, 5], [[1, 2]])[0]
    # Behind a begin token alone every text is one of its own; a prompt of one word is a prompt.
    assert digests([0], [[1]])[1] != digests([0], [[2]])[1]
    assert digests([0], [[1]]) == digests([0], [[1]])
    assert digests([5], [[1]])[1] == digests([5], [[2]])[1]
    # Where there is no begin token it is the first of a text.
    assert digests([5], [[1]], begin=None)[1] != digests([5], [[2]], begin=None)[1]


def test_a_prompt_of_one_token_is_shared_and_none_is_not(makes):
    rows = [{"prompt": "", "text": "x"}, {"prompt": "", "text": "y"}, {"prompt": "p", "text": "x"}, {"prompt": "p"}]
    rows[3]["text"] = "y"
    for name in ("llama", "gpt2"):
        tokenization = Tokenization(tokenizer=makes[name].tokenizer, max_length=9)
        prompts = tokenize(Rows(rows), Texts(prompt="prompt"), tokenization).kept().prompts()
        assert len(set(prompts[:2])) == 2
        assert len(set(prompts[2:])) == 1


# When they are found again.


def test_a_second_start_tokenises_nothing(made, encoded, cache):
    first = made()
    assert not first.cached
    assert any(text.startswith("p3") for text in encoded)
    encoded.clear()
    second = made()
    assert second.cached
    assert encoded == []
    assert second.tokens[:] == first.tokens[:]
    assert (second.format, second.unread, second.rows) == ("Pairs (prompt, chosen, rejected)", ["other"], 7)
    assert re.search(r"rows read +7  tokenised in \d\.\d s\n", str(first.report("train", "rows", 4)))
    assert re.search(r"rows read +7  tokens found in the cache\n", str(second.report("train", "rows", 4)))
    assert [folder.name.count(".") for folder in listed(cache)] == [0]


def add_token(tokenizer):
    tokenizer.add_tokens(["good"])


def add_special_token(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})


def change_end_token(tokenizer):
    tokenizer.eos_token = tokenizer.pad_token


def change_begin_token(tokenizer):
    tokenizer.bos_token = tokenizer.eos_token


def lower_case(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def give_template(tokenizer):
    tokenizer.chat_template = TEMPLATE


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 63},
        {"max_prompt_length": 63},
        {"truncation": "drop"},
        {"truncation_side": "right"},
        {"num_responses": 2},
        {"chat": Chat(variables={"greeting": "Hello"})},
        {"shape": Pairs(rejected="other")},
        {"shape": Pairs(repeated=True), "source": [{**ROWS[0], "chosen": "p0 a", "rejected": "p0 b"}]},
        {"source": ROWS[:6]},
        {"source": [*ROWS, ROWS[0]]},
        {"source": ROWS[::-1]},
        {"source": [{**ROWS[0], "chosen": " good."}, *ROWS[1:]]},
        {"change": add_token},
        {"change": add_special_token},
        {"change": change_end_token},
        {"change": change_begin_token},
        {"change": lower_case},
        {"change": give_template},
    ],
    ids=lambda change: "-".join(getattr(value, "__name__", name) for name, value in change.items()),
)
def test_whatever_changes_tokens_is_tokenised_anew(made, change):
    made()
    assert not made(**change).cached
    assert made(**change).cached


def test_settings_are_told_apart_by_name(made):
    # The same values under other names.
    assert not made(max_length=10, max_prompt_length=4, num_responses=None).cached
    assert not made(max_length=10, max_prompt_length=None, num_responses=4).cached


def test_the_text_of_a_template_counts_and_not_its_name(made, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(TEMPLATE)
    rows = [{"prompt": DIALOGUE, "chosen": "a", "rejected": "b"}]
    assert not made(rows, chat=Chat(template=str(tmp_path / "a"))).cached
    assert made(rows, chat=Chat(template=str(tmp_path / "b"))).cached
    (tmp_path / "a").write_text(TEMPLATE.replace("assistant:", "Assistant:"))
    assert not made(rows, chat=Chat(template=str(tmp_path / "a"))).cached
    assert not made(rows, chat=Chat(template=str(tmp_path / "b"), variables={"greeting": "Hello"})).cached
    assert not made(rows, chat=Chat(template=str(tmp_path / "b"), variables={"greeting": "Hallo"})).cached
    assert made(rows, chat=Chat(template=str(tmp_path / "b"), variables={"greeting": "Hello"})).cached
    assert not made(chat=Chat(template=str(tmp_path / "b"))).cached
    assert not made(chat=Chat(template=str(tmp_path / "b"), texts=True)).cached


def test_the_content_of_a_file_counts(made, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    assert not made(Files(str(path))).cached
    (tmp_path / "moved.jsonl").write_bytes(path.read_bytes())
    assert made(Files(str(tmp_path / "moved.jsonl"))).cached
    os.utime(path, (0, 0))
    assert made(Files(str(path))).cached
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "c"}\n')
    assert not made(Files(str(path))).cached


def test_a_dataset_of_the_hub_is_found_by_its_name_and_rows(made, tmp_path):
    (tmp_path / "set").mkdir()
    for split, rows in {"train": ROWS, "test": ROWS[:2]}.items():
        (tmp_path / "set" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = [HubDataset(name=str(tmp_path / "set"), split=split) for split in ("train", "test", "train[:2]")]
    assert [made(source).cached for source in [*splits, *splits]] == [False] * 3 + [True] * 3
    (tmp_path / "set" / "test.jsonl").write_text(json.dumps(ROWS[0]))
    assert not made(splits[1]).cached


def test_a_dataset_in_memory_is_found_by_its_rows(made):
    dataset = datasets.Dataset.from_list(ROWS)
    assert not made(Rows(dataset)).cached
    assert made(Rows(datasets.Dataset.from_list(ROWS))).cached
    assert not made(Rows(dataset.select([1, 0]))).cached


def test_formats_of_the_same_columns_are_told_apart(made):
    rows = [{"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 2, 2]}]
    shapes = [
        Rankings(),
        Rankings(scores="scores"),
        Rankings(scores="scores", ties="apart"),
        Rankings(reduce="all_pairs"),
    ]
    assert [made(rows, shape).cached for shape in [*shapes, *shapes]] == [False] * 4 + [True] * 4


OWN = """
from dataclasses import dataclass
from {base} import Pairs

@dataclass(frozen=True, kw_only=True)
class {name}(Pairs):
    def read(self, row):
        return super().read({{**row, "chosen": {answer!r}}})
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A user's module with a format of the name given, its code written anew every time."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(module, answer, name="Pairs", base="dpo_lightning.data.formats"):
        (tmp_path / f"{module}.py").write_text(OWN.format(answer=answer, name=name, base=base))
        sys.modules.pop(module, None)
        importlib.invalidate_caches()
        return getattr(importlib.import_module(module), name)()

    yield write
    for module in ("own_format", "own_base"):
        sys.modules.pop(module, None)


def test_the_code_of_a_users_own_format_counts(made, own):
    assert not made(shape=own("own_format", "one")).cached
    assert made(shape=own("own_format", "one")).cached
    assert not made(shape=own("own_format", "two")).cached


def test_the_code_that_a_users_own_format_inherits_counts(made, own):
    def inheriting(answer):
        own("own_base", answer)
        return own("own_format", "same", base="own_base", name="Mine")

    assert [made(shape=inheriting(answer)).cached for answer in ("one", "one", "two")] == [False, True, False]


def test_the_code_of_a_format_within_another_counts(made, own):
    rows = [{"prompt": ["p"], "chosen": ["a"], "rejected": ["b"]}]
    shapes = [Columns(rows=own("own_format", answer)) for answer in ("one", "one")]
    assert [made(rows, shape).cached for shape in shapes] == [False, True]
    assert not made(rows, Columns(rows=own("own_format", "two"))).cached


def test_the_code_of_this_package_counts(made, tmp_path, monkeypatch):
    monkeypatch.setattr(key, "__file__", str(tmp_path / "key.py"))
    (tmp_path / "cells.py").write_text("one")
    assert [made().cached for _ in range(2)] == [False, True]
    (tmp_path / "cells.py").write_text("two")
    assert not made().cached


class Plain(Pairs):
    """Typed into a shell, once a test says so."""


def test_of_a_format_typed_into_a_shell_nothing_is_kept(made, cache, monkeypatch):
    assert not made(shape=Plain()).cached
    assert made(shape=Plain()).cached
    monkeypatch.setattr(Plain, "__module__", "__main__")
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    assert not made(shape=Plain()).cached
    assert not made(shape=Plain()).cached
    assert len(listed(cache)) == 1


@pytest.mark.parametrize("name", ["padding", "truncation"])
def test_how_a_tokenizer_was_called_before_does_not_matter(made, tokenizer, name):
    assert not made().cached
    tokenizer(["a", "abc"], **{name: True}, **({"max_length": 2} if name == "truncation" else {}))
    assert made().cached


def test_a_tokenizer_that_is_saved_with_truncation_cuts_nothing(made, tokenizer):
    plain = made()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=40)
    again = made(ROWS[:6])
    assert not again.cached
    assert list(again.kept()) == list(plain.kept())[:6]
    assert made().cached


def test_where_a_tokenizer_was_loaded_from_does_not_matter(made, makes, tmp_path):
    assert not made().cached
    assert made(tokenizer=makes["llama"].tokenizer).cached
    makes["llama"].tokenizer.save_pretrained(tmp_path / "elsewhere")
    assert made(tokenizer=AutoTokenizer.from_pretrained(tmp_path / "elsewhere", local_files_only=True)).cached


@pytest.mark.parametrize("num_proc", [1, 2, 100])
def test_the_number_of_processes_does_not_matter(made, num_proc):
    assert not made(num_proc=num_proc).cached
    assert made().cached


# What is not kept.


class Unnamed(Source):
    """Rows that nobody can name."""

    def __iter__(self):
        return iter(ROWS)

    def __str__(self):
        return "unnamed"


@pytest.mark.parametrize(
    "how",
    [{"cache": False}, {"source": Unnamed()}, {"chat": Chat(variables={"now": object()})}],
    ids=["no cache", "no name", "no plain data"],
)
def test_what_is_not_cached_lives_as_long_as_it_is_used(made, cache, encoded, how):
    tokens = made(**how)
    folder = Path(tokens.folder.name)
    assert not tokens.cached
    assert listed(cache) == []
    kept = tokens.kept().select([2, 1])
    expected = list(tokens.kept())
    del tokens
    gc.collect()
    # A process that is started anew, as a DataLoader's may be, reads the file.
    assert list(pickle.loads(pickle.dumps(kept))) == list(kept) == [expected[2], expected[1]]
    joined = Examples.joined([kept, kept])
    del kept
    gc.collect()
    assert pickle.loads(pickle.dumps(joined))[3] == expected[1]
    del joined
    gc.collect()
    assert not folder.exists()
    encoded.clear()
    assert not made(**how).cached
    assert encoded


def test_a_cache_that_is_not_wanted_is_not_read_either(made, encoded):
    made()
    encoded.clear()
    assert not made(cache=False).cached
    assert encoded


# What goes wrong.


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_start_that_fails_leaves_nothing(made, cache, monkeypatch, num_proc):
    whole = Tokenization.__call__

    def fails(self, examples):
        if any(example.prompt == "p5" for example in examples):
            raise RuntimeError("out of memory")
        return whole(self, examples)

    with monkeypatch.context() as patch:
        patch.setattr(table, "CHUNK", 2)
        patch.setattr(Tokenization, "__call__", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            made(num_proc=num_proc)
        assert listed(cache) == []
        with pytest.raises(RuntimeError, match="out of memory"):
            made(num_proc=num_proc, cache=False)
    tokens = made()
    assert (tokens.cached, len(tokens.kept())) == (False, 7)


def test_rows_that_break_leave_nothing(made, cache, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n' * 150 + "{")
    with pytest.raises(UsageError, match=r"rows\.jsonl.*151"):
        made(Files(str(tmp_path / "rows.jsonl")))
    assert listed(cache) == []


def test_a_process_that_is_killed_leaves_no_table(made, cache, monkeypatch):
    monkeypatch.setattr(table, "CHUNK", 2)

    def killed():
        whole = Tokenization.__call__

        def dies(self, examples):
            if examples[0].prompt == "p4":
                os._exit(3)
            return whole(self, examples)

        Tokenization.__call__ = dies
        made()

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == 3
    assert len(listed(cache)) == 1
    assert not made().cached
    assert made().cached


def test_two_that_write_at_once_do_not_disturb_each_other(made, cache, monkeypatch):
    write, others = table._write, []

    def slow(folder, *args):
        write(folder, *args)
        if not others:
            others.append(None)
            others.append(made())
            others.extend(path.stat().st_ino for path in listed(cache) if "." not in path.name)

    monkeypatch.setattr(table, "_write", slow)
    slower, faster = made(), others[1]
    assert (slower.cached, faster.cached) == (False, False)
    assert slower.tokens[:] == faster.tokens[:]
    # What the faster one reads is still there.
    assert [path.stat().st_ino for path in listed(cache)] == others[2:]
    assert made().cached


@pytest.mark.parametrize("lost", ["about.json", "tokens.arrow", "*"])
def test_a_table_of_which_something_was_deleted_is_made_anew(made, cache, lost):
    made()
    (folder,) = listed(cache)
    for path in folder.glob(lost):
        path.unlink()
    tokens = made()
    assert (tokens.cached, len(tokens.kept())) == (False, 7)
    assert listed(cache) == [folder]
    assert made().cached


def test_others_may_read_the_cache(made, cache):
    mask = os.umask(0o022)
    try:
        made()
    finally:
        os.umask(mask)
    (folder,) = listed(cache)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


@pytest.mark.parametrize("num_proc", [2, 3])
def test_several_processes_make_the_same_table(made, monkeypatch, num_proc):
    monkeypatch.setattr(table, "CHUNK", 2)
    rows = [*ROWS, {"prompt": "p", "chosen": "same", "rejected": "same"}, {"prompt": 3}, *ROWS]
    one, several = (made(rows, cache=False, num_proc=number) for number in (None, num_proc))
    assert [len(tokens.tokens.cache_files) for tokens in (one, several)] == [1, num_proc]
    assert several.tokens[:] == one.tokens[:]
    assert several.tokens.features == one.tokens.features
    assert several.report("train", "rows", 4).to_json() | {"origin": ""} == one.report("train", "rows", 4).to_json() | {
        "origin": ""
    }


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_mistake_in_another_process_is_a_mistake(made, cache, num_proc):
    rows = [{"prompt": DIALOGUE, "chosen": "a", "rejected": "b"}] * 4
    with pytest.raises(UsageError, match="The rows hold messages, and the tokenizer has no chat template"):
        made(rows, num_proc=num_proc)
    assert listed(cache) == []


def test_progress_is_shown(made, capsys, monkeypatch):
    datasets.enable_progress_bars()
    made(cache=False)
    assert "Tokenising 7 rows in memory: 100%" in capsys.readouterr().err
