"""Rows of the hub and of memory come as they are; where they cannot, the message says why and what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from dpo_lightning.data.files import Files, as_source
from dpo_lightning.data.sources import HubDataset, Rows, Source
from dpo_lightning.errors import UsageError

ROWS = [{"prompt": "Wie geht's?", "chosen": "Schön \u2028 gut."}, {"prompt": "2", "chosen": "🙂"}]


class Three(Source):
    """The least that a source must have."""

    def __iter__(self):
        return iter([{"n": 0}, {"n": 1}, {"n": 2}])

    def __str__(self):
        return "three"


def test_a_source_counts_its_rows_streams_them_and_has_no_fingerprint():
    assert list(Three().numbered()) == list(Three().stream()) == [(1, {"n": 0}), (2, {"n": 1}), (3, {"n": 2})]
    assert Three().fingerprint() is None


def test_a_dataset_in_memory_gives_its_rows():
    rows = [{"prompt": "a", "responses": ["b", "c"]}, {"prompt": "d", "responses": ["e", "f"]}]
    source = as_source(datasets.Dataset.from_list(rows))
    assert isinstance(source, Rows)
    assert (list(source), str(source)) == (rows, "2 rows in memory")
    assert list(source.numbered()) == list(source.stream()) == [(1, rows[0]), (2, rows[1])]


def test_what_is_given_becomes_a_source():
    hub = HubDataset(name="a/b")
    assert as_source(hub) is hub
    assert as_source("x.jsonl") == Files("x.jsonl") == as_source(Path("x.jsonl"))
    assert list(as_source(ROWS).numbered()) == list(as_source(ROWS).stream()) == [(1, ROWS[0]), (2, ROWS[1])]


def test_a_stream_is_streamed_and_not_stored():
    stream = datasets.IterableDataset.from_generator(lambda: iter(ROWS))
    source = as_source(stream)
    assert list(source.stream()) == list(source.stream()) == [(1, ROWS[0]), (2, ROWS[1])]
    assert (str(source), source.fingerprint()) == ("a stream", None)
    with pytest.raises(UsageError, match=r"without an end .* Set `data\.init_args\.stream_buffer` to train .* a list"):
        source.numbered()


def test_a_stream_is_read_no_further_than_asked():
    def endless():
        number = 0
        while True:
            yield {"n": (number := number + 1)}

    rows = as_source(datasets.IterableDataset.from_generator(endless)).stream()
    assert [next(rows) for _ in range(3)] == [(1, {"n": 1}), (2, {"n": 2}), (3, {"n": 3})]


@pytest.mark.parametrize(
    ("value", "end"),
    [
        ({"train": ROWS}, "got dict of 'train'; of several splits name one."),
        (
            datasets.DatasetDict(a=datasets.Dataset.from_list(ROWS), b=datasets.Dataset.from_list(ROWS)),
            "got DatasetDict of 'a', 'b'; of several splits name one.",
        ),
        (datasets.IterableDatasetDict(a=None), "got IterableDatasetDict of 'a'; of several splits name one."),
        (iter(ROWS), "got list_iterator; of a stream make a list."),
        (7, "got int; of a stream make a list."),
        ({1, 2}, "got set; of a stream make a list."),
    ],
)
@pytest.mark.parametrize("make", [as_source, Rows])
def test_what_is_no_list_of_rows_is_refused(make, value, end):
    with pytest.raises(UsageError) as caught:
        make(value)
    assert str(caught.value) == (
        f"Rows in memory must be a list of dictionaries, a `datasets.Dataset` or an `IterableDataset`, {end}"
    )


def test_the_fingerprint_of_a_list_is_that_of_its_rows():
    prints = [Rows(ROWS), Rows(ROWS[:1]), Rows(ROWS[::-1]), Rows([*ROWS[:1], {**ROWS[1], "chosen": "x"}]), Rows([])]
    assert len({source.fingerprint() for source in prints}) == len(prints)
    assert Rows([dict(row) for row in ROWS]).fingerprint() == Rows(ROWS).fingerprint()
    assert Rows(tuple(ROWS)).fingerprint() == Rows(ROWS).fingerprint()


def test_rows_that_no_json_holds_have_no_fingerprint():
    circle: dict = {}
    circle["self"] = circle
    assert [Rows([{"a": value}]).fingerprint() for value in ({1, 2}, b"x", circle, object())] == [None] * 4


def test_the_fingerprint_of_a_dataset_is_its_own():
    dataset = datasets.Dataset.from_list(ROWS)
    assert Rows(dataset).fingerprint() == dataset._fingerprint
    assert Rows(dataset.select([0])).fingerprint() != dataset._fingerprint
    assert Rows(datasets.Dataset.from_list(ROWS)).fingerprint() == dataset._fingerprint


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A dataset of two splits in a folder, which `load_dataset` reads as it reads one of the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for split, number in {"train": 10, "test": 4}.items():
        lines = [json.dumps({"prompt": f"{split} {row}"}) + "\n" for row in range(number)]
        (tmp_path / "set" / f"{split}.jsonl").write_text("".join(lines))
    return tmp_path / "set"


def prompts(rows):
    return [(number, row["prompt"]) for number, row in rows]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("test", [(row + 1, f"test {row}") for row in range(4)]),
        ("train[8:]", [(1, "train 8"), (2, "train 9")]),
        ("test[:50%]", [(1, "test 0"), (2, "test 1")]),
    ],
)
def test_rows_of_a_split_come_in_order(split, expected, folder):
    assert prompts(HubDataset(name=str(folder), split=split).numbered()) == expected


def test_a_stream_of_the_hub_stores_nothing(folder):
    source = HubDataset(name=str(folder), split="test+train")
    rows = prompts(source.stream())
    assert not list(folder.parent.glob("cache/**/*.arrow"))
    assert rows == prompts(source.numbered())
    assert list(folder.parent.glob("cache/**/*.arrow"))


def test_a_stream_has_no_slices(folder):
    with pytest.raises(UsageError) as caught:
        next(HubDataset(name="owner/set", split="train[:500]").stream())
    assert str(caught.value) == (
        "owner/set (train[:500]): a stream can only be read from its first row to its last, which leaves no part like "
        "'train[:500]' to choose; set `split` to 'train', or leave out `data.init_args.stream_buffer`, so that the "
        "dataset is stored first."
    )


@pytest.mark.parametrize("read", [HubDataset.numbered, HubDataset.stream, HubDataset.fingerprint])
def test_an_unknown_split_is_named_with_those_that_there_are(read, folder):
    with pytest.raises(UsageError) as caught:
        next(iter(read(HubDataset(name=str(folder), split="trian"))))
    text = str(caught.value)
    assert text.startswith(f"The dataset {folder} (trian) could not be had from the hub: ")
    assert "trian" in text
    assert "['train', 'test']. Are its `split`, `config`, `data_dir` and `revision` right? Rows on this" in text


def test_a_stream_that_breaks_is_named_with_its_last_row(folder, monkeypatch):
    def breaks():
        yield {"prompt": "one"}
        raise ConnectionError("Server Disconnected")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: breaks())
    rows = HubDataset(name="owner/set").stream()
    assert next(rows) == (1, {"prompt": "one"})
    with pytest.raises(UsageError) as caught:
        next(rows)
    assert str(caught.value) == (
        "The stream of owner/set (train) broke behind row 1: Server Disconnected. Try again; to store the dataset "
        "first leave out `data.init_args.stream_buffer`."
    )


def test_a_broken_file_in_a_stream_is_named(folder):
    (folder / "test.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(UsageError, match=r"The stream of .*set \(test\) broke behind row \d: "):
        list(HubDataset(name=str(folder), split="test").stream())


def test_the_fingerprint_of_a_hub_dataset_changes_with_its_rows_alone(folder):
    def of(split):
        return HubDataset(name=str(folder), split=split).fingerprint()

    first = {split: of(split) for split in ("train", "test", "train[:5]", "train[5:]", "train+test")}
    assert len(set(first.values())) == len(first)
    # Another process, with a cache of its own.
    script = f"import datasets; print(datasets.load_dataset({str(folder)!r}, split='train[:5]')._fingerprint)"
    env = {**os.environ, "HF_DATASETS_CACHE": str(folder.parent / "other"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == first["train[:5]"]
    with open(folder / "train.jsonl", "a") as file:
        file.write('{"prompt": "one more"}\n')
    assert of("train") != first["train"]


def test_a_hub_dataset_asks_for_what_was_named(monkeypatch):
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or ROWS)
    assert list(HubDataset(name="owner/set")) == ROWS
    source = HubDataset(name="owner/set", split="test[:9]", config="en", data_dir="base", revision="v1")
    assert list(source.numbered()) == [(1, ROWS[0]), (2, ROWS[1])]
    assert list(HubDataset(name="owner/set").stream()) == [(1, ROWS[0]), (2, ROWS[1])]
    assert calls == [
        (("owner/set", None), {"split": "train", "data_dir": None, "revision": None}),
        (("owner/set", "en"), {"split": "test[:9]", "data_dir": "base", "revision": "v1"}),
        (("owner/set", None), {"split": "train", "data_dir": None, "revision": None, "streaming": True}),
    ]
    assert str(source) == "owner/set (en, base, test[:9])"


NETWORK = "Is there a network, and is its name right?"
CHOICE = "Are its `split`, `config`, `data_dir` and `revision` right?"


@pytest.mark.parametrize("read", [HubDataset.numbered, HubDataset.stream, HubDataset.fingerprint])
@pytest.mark.parametrize(
    ("failure", "remedy"),
    [
        (ConnectionError("Couldn't reach 'owner/set' on the Hub"), NETWORK),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'owner/set' doesn't exist"), NETWORK),
        (ValueError('Unknown split "trian"'), CHOICE),
        (RuntimeError("Dataset scripts are no longer supported, but found set.py"), CHOICE),
        (datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset"), CHOICE),
    ],
)
def test_a_hub_that_refuses_is_a_mistake_with_its_reason(read, failure, remedy, monkeypatch):
    def refuse(*args, **kwargs):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UsageError) as caught:
        list(read(HubDataset(name="owner/set")))
    assert str(caught.value) == (
        f"The dataset owner/set (train) could not be had from the hub: {failure}. {remedy} Rows on this machine are "
        "given by the path of their file."
    )
