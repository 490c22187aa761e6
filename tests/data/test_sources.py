"""Rows come back as they were written; a file that does not hold them is named with the place and the remedy."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

import dpo_lightning.paths
from dpo_lightning.data.sources import Files, HubDataset, Rows, as_source
from dpo_lightning.errors import UsageError

ROWS = [{"prompt": "Wie geht's?", "chosen": "Schön \u2028 gut.", "rejected": ""}, {"prompt": "2", "chosen": "🙂"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
COMPRESS = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.xz": lzma.compress}


def write(folder: Path, name: str, content: bytes) -> str:
    path = folder / name
    path.write_bytes(content)
    return str(path)


def mistake(path: str) -> str:
    with pytest.raises(UsageError) as caught:
        list(Files(path))
    return str(caught.value)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines_come_back(suffix, tmp_path):
    path = write(tmp_path, f"rows{suffix}", COMPRESS[suffix](LINES))
    assert list(Files(path)) == ROWS
    assert list(Files(path)) == ROWS  # a source can be read again


@pytest.mark.parametrize(
    ("content", "numbers"),
    [
        (b'{"a": 1}\n{"a": 2}\n', [1, 2]),
        (b'\n{"a": 1}\n\n  \n{"a": 2}', [2, 5]),  # blank lines are no rows, but they have numbers
        (b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n', [1, 2]),  # as Windows writes it
        (b"", []),
        (b"\n\n", []),
    ],
)
def test_rows_of_json_lines_have_the_numbers_of_their_lines(content, numbers, tmp_path):
    path = write(tmp_path, "rows.jsonl", content)
    assert list(Files(path).numbered()) == [(number, {"a": a}) for a, number in enumerate(numbers, start=1)]


def test_parquet_comes_back(tmp_path):
    rows = [{"prompt": "a", "responses": ["é", "c"]}, {"prompt": "b", "responses": []}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=1)
    assert list(Files(str(tmp_path / "rows.parquet")).numbered()) == [(1, rows[0]), (2, rows[1])]


def test_a_dataset_in_memory_gives_its_rows():
    rows = [{"prompt": "a", "responses": ["b", "c"]}, {"prompt": "d", "responses": ["e", "f"]}]
    source = as_source(datasets.Dataset.from_list(rows))
    assert isinstance(source, Rows)
    assert (list(source), str(source)) == (rows, "2 rows in memory")


def test_what_is_given_becomes_a_source(tmp_path):
    hub = HubDataset(name="a/b")
    assert as_source(hub) is hub
    assert as_source("x.jsonl") == Files("x.jsonl") == as_source(Path("x.jsonl"))
    assert list(as_source(ROWS).numbered()) == [(1, ROWS[0]), (2, ROWS[1])]


@pytest.mark.parametrize(
    ("value", "name"), [({"train": ROWS}, "dict"), (iter(ROWS), "list_iterator"), (7, "int"), ({1, 2}, "set")]
)
def test_what_is_no_list_of_rows_is_refused(value, name):
    with pytest.raises(
        UsageError, match=f"list of dictionaries or a `datasets.Dataset`, got {name}; of several splits"
    ):
        as_source(value)


def test_a_package_path_is_a_file_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(dpo_lightning.paths, "files", lambda package: tmp_path / package)
    (tmp_path / "dpo_lightning").mkdir()
    write(tmp_path, "dpo_lightning/rows.jsonl", LINES)
    assert list(Files("package:rows.jsonl")) == ROWS
    assert "There is no data file package:other.jsonl (looked for " in mistake("package:other.jsonl")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_broken_line_is_named(suffix, tmp_path):
    path = write(tmp_path, f"rows{suffix}", COMPRESS[suffix](b'{"a": 1}\n\n{"a": \n{"a": 2}\n'))
    text = mistake(path)
    assert text.startswith(f"{path}, line 3: not valid JSON (Expecting value: ")
    assert text.endswith("; each line must be one object.")


def test_rows_before_a_broken_line_are_read(tmp_path):
    rows = iter(Files(write(tmp_path, "rows.jsonl", b'{"a": 1}\n{')))
    assert next(rows) == {"a": 1}
    with pytest.raises(UsageError, match="line 2: not valid JSON"):
        next(rows)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_bytes_that_are_no_utf8_are_named(suffix, tmp_path):
    path = write(tmp_path, f"rows{suffix}", COMPRESS[suffix](b'{"a": 1}\n{"a": "sch\xf6n"}\n'))
    text = mistake(path)
    assert text.startswith(f"{path}, line 2: not text in UTF-8 (")
    assert "byte 0xf6" in text
    assert text.endswith("; convert the file.")


# Random digits do not compress, so that half the bytes hold about half the lines.
MANY = "".join(json.dumps({"a": str(7**number)}) + "\n" for number in range(300)).encode()


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.xz"])
def test_a_truncated_file_is_named_with_its_last_line(suffix, tmp_path):
    whole = COMPRESS[suffix](MANY)
    path = write(tmp_path, f"rows{suffix}", whole[: len(whole) // 2])
    text = mistake(path)
    number = int(text.removeprefix(f"{path} cannot be read beyond line ").partition(":")[0])
    assert 0 <= number < 300
    assert "ended before the end-of-stream marker" in text
    assert text.endswith(" Is the file whole, and compressed as its name says?")


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".jsonl.gz", LINES),  # not compressed at all
        (".jsonl.xz", gzip.compress(LINES)),
        (".jsonl.gz", gzip.compress(MANY)[:60] + bytes(200) + gzip.compress(MANY)[260:]),  # a hole in the middle
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named(suffix, content, tmp_path):
    path = write(tmp_path, f"rows{suffix}", content)
    text = mistake(path)
    assert text.startswith(f"{path} cannot be read beyond line ")
    assert text.endswith(" Is the file whole, and compressed as its name says?")


def test_bytes_that_are_no_parquet_are_named(tmp_path):
    path = write(tmp_path, "rows.parquet", LINES * 9)
    text = mistake(path)
    assert text.startswith(f"{path} cannot be read as Parquet: ")
    assert text.endswith(" Is the file whole?")


def test_a_hole_in_a_parquet_file_is_named(tmp_path):
    table = pa.table({"a": [str(7**number) for number in range(300)]})
    pyarrow.parquet.write_table(table, tmp_path / "whole.parquet", use_dictionary=False)
    content = bytearray((tmp_path / "whole.parquet").read_bytes())
    content[40:400] = bytes(360)
    path = write(tmp_path, "rows.parquet", bytes(content))
    assert mistake(path).startswith(f"{path} cannot be read as Parquet: ")


def test_a_missing_file_is_named_with_the_place_and_the_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mistake("no.jsonl") == (
        f"There is no data file no.jsonl (looked for {tmp_path}/no.jsonl). For a dataset on a hub write "
        "{class_path: HubDataset, init_args: {name: owner/dataset}}."
    )


@pytest.mark.parametrize("name", ["rows.txt", "rows.csv", "rows.json", "rows.jsonl.zip", "rows"])
def test_an_unknown_ending_is_named_with_the_known_ones(name, tmp_path):
    path = write(tmp_path, name, LINES)
    known = ".jsonl, .jsonl.gz, .jsonl.xz, .parquet"
    assert mistake(path) == f"{path} has none of the endings that tell its format: {known}."


def test_a_hub_dataset_asks_for_what_was_named(monkeypatch):
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or ROWS)
    assert list(HubDataset(name="owner/set")) == ROWS
    source = HubDataset(name="owner/set", split="test[:9]", config="en", data_dir="base", revision="v1")
    assert list(source.numbered()) == [(1, ROWS[0]), (2, ROWS[1])]
    assert calls == [
        (("owner/set", None), {"split": "train", "data_dir": None, "revision": None}),
        (("owner/set", "en"), {"split": "test[:9]", "data_dir": "base", "revision": "v1"}),
    ]
    assert str(source) == "owner/set (en, base, test[:9])"


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionError("Couldn't reach 'owner/set' on the Hub"),
        ValueError('Unknown split "trian"'),
        RuntimeError("Dataset scripts are no longer supported, but found set.py"),
        datasets.exceptions.DatasetNotFoundError("Dataset 'owner/set' doesn't exist"),
        datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset"),
    ],
)
def test_a_hub_that_refuses_is_a_mistake_with_its_reason(failure, monkeypatch):
    def refuse(*args, **kwargs):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UsageError) as caught:
        list(HubDataset(name="owner/set"))
    assert str(caught.value) == (
        f"The dataset owner/set (train) could not be had from the hub: {failure}. Is there a network, and is its name "
        "right? Rows on this machine are given by the path of their file."
    )
