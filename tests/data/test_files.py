"""Rows come back as they were written; a file that does not hold them is named with the place and the remedy."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import lzma
import os
from pathlib import Path

import datasets
import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings

import dpo_lightning.paths
from dpo_lightning.data.files import Files
from dpo_lightning.errors import UsageError

ROWS = [{"prompt": "Wie \u2028 geht's?", "chosen": 'So, "gut".\n\nJa.'}, {"prompt": "\t2 ", "chosen": "🙂"}]


def zst(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


def json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def separated(delimiter: str):
    def write(rows: list[dict]) -> bytes:
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue().encode()

    return write


def parquet(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=1)
    return file.getvalue()


def ipc(new):
    def write(rows: list[dict]) -> bytes:
        file, table = io.BytesIO(), pa.Table.from_pylist(rows)
        with new(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
        return file.getvalue()

    return write


COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zst}
# A name before the first dot tells apart what one ending has several of.
WRITE = {
    "a.jsonl": json_lines,
    "a.ndjson": json_lines,
    "list.json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=1).encode(),
    "lines.json": json_lines,
    "under_a_key.json": lambda rows: json.dumps({"data": rows}).encode(),
    "a.csv": separated(","),
    "a.tsv": separated("\t"),
    "a.parquet": parquet,
    "file.arrow": ipc(pa.ipc.new_file),
    "stream.arrow": ipc(pa.ipc.new_stream),
}
JSON_LINES = [".jsonl" + compression for compression in COMPRESS]


def write(folder: Path, name: str, content: bytes) -> str:
    path = folder / name
    path.write_bytes(content)
    return str(path)


def compressed(folder: Path, ending: str, content: bytes) -> str:
    """A file that is compressed as its ending says."""
    outer = next(compression for compression in reversed(COMPRESS) if ending.endswith(compression))
    return write(folder, "rows" + ending, COMPRESS[outer](content))


def mistake(path: str, split: str | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        list(Files(path, split))
    return str(caught.value)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", WRITE)
def test_rows_come_back(name, compression, tmp_path):
    source = Files(write(tmp_path, name + compression, COMPRESS[compression](WRITE[name](ROWS))))
    assert list(source) == ROWS
    assert list(source.numbered()) == list(source.stream()) == [(1, ROWS[0]), (2, ROWS[1])]  # it can be read again


@pytest.mark.parametrize("name", [name for name in WRITE if not name.endswith(("csv", "tsv"))])
def test_lists_and_objects_come_back(name, tmp_path):
    rows = [
        {"n": 1, "chosen": [{"role": "user", "content": "é"}], "tags": ["a", "b"]},
        {"n": 2, "chosen": [], "tags": []},
    ]
    assert list(Files(write(tmp_path, name, WRITE[name](rows)))) == rows


def test_an_ending_may_be_in_capitals(tmp_path):
    assert list(Files(write(tmp_path, "ROWS.JSONL.GZ", gzip.compress(json_lines(ROWS))))) == ROWS


@pytest.mark.parametrize(
    ("content", "numbers"),
    [
        (b'{"a": 1}\n{"a": 2}\n', [1, 2]),
        (b'\n{"a": 1}\n\n  \n{"a": 2}', [2, 5]),  # blank lines are no rows, but they have numbers
        (b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n', [1, 2]),  # as Windows writes it
        (b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": 2}', [1, 2]),  # two of those joined
        (b"", []),
        (b"\n\n", []),
    ],
)
def test_rows_of_json_lines_have_the_numbers_of_their_lines(content, numbers, tmp_path):
    path = write(tmp_path, "rows.jsonl", content)
    assert list(Files(path).numbered()) == [(number, {"a": a}) for a, number in enumerate(numbers, start=1)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"a": 1}, {"a": 2}]', [(1, {"a": 1}), (2, {"a": 2})]),
        ('\ufeff \r\n[\n{"a":\n1}\n,\t{"a": 2}] \n', [(1, {"a": 1}), (2, {"a": 2})]),
        ("[]", []),
        ("[ ]", []),
        ('["a", "]", "\u2028"]', [(1, {"text": "a"}), (2, {"text": "]"}), (3, {"text": "\u2028"})]),
        ('{"prompt": ["a", "b"], "chosen": ["c"]}', [(1, {"prompt": ["a", "b"], "chosen": ["c"]})]),  # columns
        ('{"prompt": ["a", "b"]}', [(1, {"prompt": ["a", "b"]})]),
        ('{"a": 1}', [(1, {"a": 1})]),
        ('\n{"data": [{"a": 1}, {"a": 2}]}\n', [(1, {"a": 1}), (2, {"a": 2})]),
        ('{"data": [{"a": 1}], "version": 2}', [(1, {"data": [{"a": 1}], "version": 2})]),
        ('\n{"a": 1}\n\n{"a": "\u2028"}\n', [(2, {"a": 1}), (4, {"a": "\u2028"})]),  # JSON Lines
    ],
)
def test_what_one_json_value_means(content, expected, tmp_path):
    assert list(Files(write(tmp_path, "rows.json", content.encode())).numbered()) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("\ufeffa,b\r\n1,2\r\n", [{"a": "1", "b": "2"}]),
        ('a,b\n"x\n\ny","\ufeff"\n\n,\n', [{"a": "x\n\ny", "b": "\ufeff"}, {"a": "", "b": ""}]),
        ('\n"a","b ""c"""\n1,"2\n\ufeff"', [{"a": "1", 'b "c"': "2\n\ufeff"}]),
        ("a,b\n", []),
        ("a\n" + 300_000 * "x" + "\n", [{"a": 300_000 * "x"}]),  # more than Python's reader takes by itself
    ],
)
def test_what_csv_means(content, expected, tmp_path):
    rows = list(Files(write(tmp_path, "rows.csv", content.encode())).numbered())
    assert rows == list(enumerate(expected, start=1))


def test_a_package_path_is_a_file_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(dpo_lightning.paths, "files", lambda package: tmp_path / package)
    (tmp_path / "dpo_lightning").mkdir()
    write(tmp_path, "dpo_lightning/rows.jsonl", json_lines(ROWS))
    assert list(Files("package:rows.jsonl")) == ROWS
    assert "There is no data file package:other.jsonl (looked for " in mistake("package:other.jsonl")


@pytest.mark.parametrize("ending", JSON_LINES)
def test_a_broken_line_is_named(ending, tmp_path):
    path = compressed(tmp_path, ending, b'{"a": 1}\n\n{"a": \n{"a": 2}\n')
    text = mistake(path)
    assert text.startswith(f"{path}, line 3: not valid JSON (Expecting value: ")
    assert text.endswith("; each line must be one object.")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", ", line 2: not text in UTF-8"),
        ("a.csv", ", line 3: not text in UTF-8"),
        ("file.arrow", " cannot be read as Arrow beyond row 1: In column 0: Invalid: Invalid UTF8"),
        ("stream.arrow", " cannot be read as Arrow beyond row 1: In column 0: Invalid: Invalid UTF8"),
    ],
)
def test_rows_before_the_break_are_read(name, text, tmp_path):
    content = WRITE[name]([{"n": "one"}, {"n": "two"}])
    path = write(tmp_path, name, content.replace(b"two", b"t\xffo"))
    rows = Files(path).numbered()
    assert next(rows) == (1, {"n": "one"})
    with pytest.raises(UsageError) as caught:
        next(rows)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[" * 100_000, "maximum recursion depth exceeded"),
        (b'{"a": ' + b"1" * 5000 + b"}", "Exceeds the limit (4300 digits) for integer string conversion"),
        (b'{"a": 1} {"a": 2}', "Extra data: line 1 column 10 (char 9)"),
        (b'{"a": "\t"}', "Invalid control character at"),
        (b'{"a": "x', "Invalid control character at"),
        (b"nil", "Expecting value"),
    ],
)
def test_every_way_to_break_a_line_is_named(line, reason, tmp_path):
    path = write(tmp_path, "rows.jsonl", b'{"a": 1}\n' + line + b"\n")
    assert mistake(path).startswith(f"{path}, line 2: not valid JSON ({reason}")


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('[{"a": 1},\n{"a": 2},\n{"a": }]', "row 3, line 3: not valid JSON (Expecting value: line 3 column 7"),
        ('[{"a": 1},\n{"a":\n2,}]', "row 2, line 3: not valid JSON ("),
        ('[{"a": 1},\n]', "row 2, line 2: not valid JSON (Expecting value"),
        ('[{"a": 1},\n', "row 2, line 2: not valid JSON (Expecting value"),
        ("[", "row 1, line 1: not valid JSON (Expecting value"),
        ('[{"a": 1}\n{"a": 2}]', "line 2: not valid JSON (no comma and no end of the list behind row 1). Is the file"),
        ('[{"a": 1},\n{"a": 2}', "line 2: not valid JSON (no comma and no end of the list behind row 2). Is the file"),
        ('[{"a": 1}]\n\n{"a": 2}', "line 3: there is more behind the end of the list; write one list."),
        ('[{"a": 1},\n' + "[" * 100_000, "row 2, line 2: not valid JSON (maximum recursion depth exceeded"),
        ('[{"a": 1},\n' + "1" * 5000, "row 2, line 2: not valid JSON (Exceeds the limit (4300 digits)"),
        ("", "line 1: not valid JSON (Expecting value"),
        ('{"a": 1', "line 1: not valid JSON ("),
        ('{\n"a": 1\n}\n{\n"a": 2}', "line 4: there is more behind the end of the first object; write a list of"),
        ('{"a": 1}\n{"a": }', "line 2: not valid JSON (Expecting value"),  # JSON Lines
        ('{"a": "\n"}', "line 1: not valid JSON (Invalid control character"),
    ],
)
def test_a_break_in_one_json_value_is_named_with_row_and_line(content, place, tmp_path):
    path = write(tmp_path, "rows.json", content.encode())
    assert mistake(path).startswith(f"{path}, {place}")


def test_objects_of_a_list_before_its_break_are_read(tmp_path):
    rows = Files(write(tmp_path, "rows.json", b'[{"a": 1}, {"a": 2}, {')).numbered()
    assert [next(rows), next(rows)] == [(1, {"a": 1}), (2, {"a": 2})]
    with pytest.raises(UsageError, match="row 3, line 1: not valid JSON"):
        next(rows)


@pytest.mark.parametrize("ending", [*JSON_LINES, ".json", ".csv", ".tsv.xz"])
def test_bytes_that_are_no_utf8_are_named(ending, tmp_path):
    path = compressed(tmp_path, ending, b'{"a": 1}\n{"a": "sch\xf6n"}\n')
    text = mistake(path)
    assert text.startswith(f"{path}, line 2: not text in UTF-8 (")
    assert "byte 0xf6" in text
    assert text.endswith("; convert the file.")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", " is empty; its first line must name the columns, as in: prompt,chosen,rejected"),
        ("\n\n", " is empty; its first line must name the columns, as in: prompt,chosen,rejected"),
        (
            ",a,b\n0,1,2\n",
            ": column 1 has no name: '', 'a', 'b'. Name every one, or leave it out; pandas leaves out its row numbers "
            "by `to_csv(index=False)`.",
        ),
        ("a,b,a\n", ": two columns are called 'a': 'a', 'b', 'a'. Give each its own name."),
        (
            'a,b\n"1\n\n1",2\n\n1,2,3\n',
            ", row 2 (line 6): 3 fields, but the header has 2 columns: 'a', 'b'. Put a field that holds a delimiter or "
            "a line break in quotes.",
        ),
        ("a,b\n1\n", ", row 1 (line 2): 1 fields, but the header has 2 columns: 'a', 'b'. Put a field that holds"),
        ('a,b\n1,2\n\n1,"2\n3\n4,5\n', ", row 2 (from line 4): unexpected end of data. A field that holds a delimiter"),
        ('a,b\n1,"2" 3\n', ", row 1 (from line 2): ',' expected after '\"'. A field that holds a delimiter, a quote "),
        ('a,"b\n1,2\n', ", row 1 (from line 1): unexpected end of data. "),
        ('a,"b\n\nb"\n1\n', ", row 1 (line 4): 1 fields, but the header has 2 columns: 'a', 'b\\n\\nb'. Put a field"),
        ("a,b\r1,2\r", ", row 1 (from line 1): new-line character seen in unquoted field"),
        ("a,b\n1,2\n1,\0\n", ", line 3: not text but a NUL byte; write the file anew, in UTF-8."),
    ],
)
def test_a_break_in_csv_is_named_with_row_and_columns(content, text, tmp_path):
    path = write(tmp_path, "rows.csv", content.encode())
    assert mistake(path).startswith(path + text)


def test_what_a_spreadsheet_saves_as_unicode_text_is_named(tmp_path):
    path = write(tmp_path, "rows.tsv", "a\tb\n1\t2\n".encode("utf-16"))
    assert mistake(path).startswith(f"{path}, line 1: not text in UTF-8 ('utf-8' codec can't decode byte 0xff")


# Random digits do not compress, so that half the bytes hold about half the lines.
MANY = [{"a": str(7**number)} for number in range(300)]
LINES = json_lines(MANY)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "list.json", "a.parquet", "stream.arrow"])
@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_a_truncated_file_is_named_with_its_last_row(name, compression, tmp_path):
    whole = COMPRESS[compression](WRITE[name](MANY))
    for length in (len(whole) // 2, len(whole) - 1):
        path = write(tmp_path, name + compression, whole[:length])
        text = mistake(path)
        number = int(text.removeprefix(f"{path} cannot be read beyond row ").partition(":")[0])
        assert 0 <= number <= 300
        reason = "Truncated compressed stream" if compression == ".zst" else "ended before the end-of-stream marker"
        assert reason in text
        assert text.endswith(" Is the file whole, and compressed as its name says?")


@pytest.mark.parametrize(
    ("ending", "content"),
    [
        (".jsonl.gz", LINES),  # not compressed at all
        (".jsonl.xz", gzip.compress(LINES)),
        (".csv.zst", lzma.compress(LINES)),
        (".parquet.gz", parquet(ROWS)),
        (".json.gz", gzip.compress(LINES)[:60] + bytes(200) + gzip.compress(LINES)[260:]),  # a hole in the middle
        (".jsonl.zst", zst(LINES) + b"more"),
        (".arrow.gz", gzip.compress(LINES) + b"more"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named(ending, content, tmp_path):
    path = write(tmp_path, f"rows{ending}", content)
    text = mistake(path)
    assert text.startswith(f"{path} cannot be read beyond row ")
    assert text.endswith(" Is the file whole, and compressed as its name says?")


@pytest.mark.parametrize(
    ("ending", "kind"), [(".parquet", "Parquet"), (".parquet.zst", "Parquet"), (".arrow", "Arrow")]
)
@pytest.mark.parametrize("content", [LINES * 9, b"", b"ARROW1", b"PAR1"])
def test_bytes_that_are_no_columns_are_named(ending, kind, content, tmp_path):
    path = compressed(tmp_path, ending, content)
    text = mistake(path)
    assert text.startswith(f"{path} cannot be read as {kind} beyond row 0: ")
    assert text.endswith(" Is the file whole?")


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
def test_a_truncated_file_of_columns_is_named(name, tmp_path):
    whole = WRITE[name](MANY)
    for length in (len(whole) // 2, len(whole) - 1):
        path = write(tmp_path, name, whole[:length])
        kind = "Parquet" if "parquet" in name else "Arrow"
        assert mistake(path).startswith(f"{path} cannot be read as {kind} beyond row ")


def test_a_length_beyond_all_memory_is_named(tmp_path):
    content = ipc(pa.ipc.new_stream)([{"a": "x" * 77}])
    body = (8 + 80).to_bytes(8, "little")  # offsets and text, padded
    assert content.count(body) == 1
    path = write(tmp_path, "rows.arrow", content.replace(body, (2**55).to_bytes(8, "little")))
    assert mistake(path) == f"{path} cannot be read as Arrow beyond row 0: MemoryError. Is the file whole?"


def test_a_stream_that_ends_between_two_batches_is_named(tmp_path):
    whole = WRITE["stream.arrow"](ROWS)
    path = write(tmp_path, "rows.arrow", whole[:-8])  # Arrow itself takes it for whole
    assert (
        mistake(path) == f"{path} cannot be read as Arrow beyond row 2: the stream has no end mark. Is the file whole?"
    )


def test_a_hole_in_a_parquet_file_is_named(tmp_path):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(MANY), file, use_dictionary=False)
    content = bytearray(file.getvalue())
    content[40:400] = bytes(360)
    path = write(tmp_path, "rows.parquet", bytes(content))
    assert mistake(path).startswith(f"{path} cannot be read as Parquet beyond row 0: ")


def test_offsets_that_lead_out_of_an_arrow_file_are_named(tmp_path):
    content = ipc(pa.ipc.new_stream)([{"a": "x" * 77}])
    place = content.rindex((77).to_bytes(4, "little"))  # the last offset, before the text itself
    path = write(tmp_path, "rows.arrow", content[:place] + (2**31 - 1).to_bytes(4, "little") + content[place + 4 :])
    assert mistake(path).startswith(f"{path} cannot be read as Arrow beyond row 0: ")


def test_columns_of_one_name_are_named(tmp_path):
    table = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    path = str(tmp_path / "rows.parquet")
    assert mistake(path) == f"{path}: two columns are called 'a': 'a', 'a'. Give each its own name."


def test_a_time_that_python_does_not_know_is_named(tmp_path):
    table = pa.table({"a": pa.array([10**18], pa.timestamp("ms"))})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    path = str(tmp_path / "rows.parquet")
    assert mistake(path).startswith(f"{path} cannot be read as Parquet beyond row 0: ")


@pytest.mark.parametrize("read", [Files.numbered, Files.stream, Files.fingerprint])
def test_a_missing_file_is_named_with_the_place_and_the_remedy(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        read(Files("no.jsonl"))
    assert str(caught.value) == (
        f"There is no data file no.jsonl (looked for {tmp_path}/no.jsonl). For a dataset on a hub write "
        "{class_path: HubDataset, init_args: {name: owner/dataset}}."
    )


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "rows.jsonl", json_lines(ROWS))
    assert list(Files("~/rows.jsonl")) == ROWS


@pytest.mark.parametrize("name", ["~nobody_of_this_name/rows.jsonl", "x" * 5000, "a\0b.jsonl", ""])
def test_names_that_no_file_can_have_are_missing_files(name):
    assert "There is no data file " in mistake(name)


@pytest.mark.parametrize("name", ["rows.txt", "rows.jsonl.zip", "rows", "rows.gz", "jsonl"])
def test_an_unknown_ending_is_named_with_the_known_ones(name, tmp_path):
    path = write(tmp_path, name, LINES)
    text = (
        f"{path} has none of the endings that tell its format: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, "
        "each also with .gz, .xz, .zst behind it."
    )
    assert mistake(path) == text
    with pytest.raises(UsageError) as caught:
        Files(path).fingerprint()
    assert str(caught.value) == text


def test_a_file_has_no_split(tmp_path):
    path = write(tmp_path, "rows.jsonl", LINES)
    assert mistake(path, "train") == f"{path} is one file and has no splits; leave out `split`, here 'train'."


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="no file at hand that opens but cannot be read")
def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "rows.jsonl").symlink_to("/proc/self/mem")
    path = str(tmp_path / "rows.jsonl")
    assert mistake(path).startswith(f"{path} cannot be read beyond row 0: [Errno 5] Input/output error. Is the file")
    with pytest.raises(UsageError, match=r"rows\.jsonl cannot be read: \[Errno 5\] Input/output error\. Is the file"):
        Files(path).fingerprint()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a dataset, and one with a dataset of two splits."""
    folder, dataset = tmp_path_factory.mktemp("saved"), datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(folder / "one")
    datasets.DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(folder / "two")
    return folder


def test_a_saved_dataset_comes_back(saved):
    source = Files(str(saved / "one"))
    assert list(source.numbered()) == list(source.stream()) == [(1, ROWS[0]), (2, ROWS[1])]
    assert (list(Files(str(saved / "two"), "train")), list(Files(str(saved / "two"), "test"))) == (ROWS, ROWS[1:])
    assert str(Files("two", "test")) == "two (test)"


def test_a_saved_format_is_undone(tmp_path):
    dataset = datasets.Dataset.from_list([{"a": 1, "b": "x"}])
    dataset.with_format("numpy", columns=["a"]).save_to_disk(tmp_path / "set")
    (row,) = Files(str(tmp_path / "set"))
    assert row == {"a": 1, "b": "x"}
    assert type(row["a"]) is int


def test_a_split_that_is_missing_is_named_with_those_that_there_are(saved):
    one, two = str(saved / "one"), str(saved / "two")
    assert mistake(two) == f"{two} has several splits; name one of them by `split`: train, test."
    assert mistake(two, "trian") == f"{two} has no split 'trian'; `split` must be one of train, test."
    assert mistake(one, "train") == f"{one} has no splits; leave out `split`, here 'train'."


def test_a_folder_that_is_no_dataset_is_named_with_its_files(tmp_path):
    start = f"{tmp_path} is a folder, but not one that `Dataset.save_to_disk` wrote; "
    assert mistake(str(tmp_path)) == start + "it holds no data files either."
    for name in ("b.jsonl.gz", "a.csv", "notes.txt"):
        write(tmp_path, name, b"")
    assert mistake(str(tmp_path)) == start + "name one of its files: a.csv, b.jsonl.gz."
    for number in range(10, 20):
        write(tmp_path, f"{number}.parquet", b"")
    listed = ", ".join(f"{number}.parquet" for number in range(10, 20))
    assert mistake(str(tmp_path)) == f"{start}name one of its files: {listed} and 2 more."


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("state.json", None, "FileNotFoundError: "),
        ("state.json", b"{", "JSONDecodeError: "),
        ("state.json", b"{}", "KeyError: '_data_files'"),
        ("state.json", b"[]", "TypeError: "),
        ("dataset_info.json", b"[]", "AttributeError: "),
        ("data-00000-of-00001.arrow", None, "FileNotFoundError: "),
        ("data-00000-of-00001.arrow", b"ARROW", "ArrowInvalid: "),
    ],
)
def test_a_broken_saved_dataset_is_named(name, content, words, tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        write(tmp_path, name, content)
    text = mistake(str(tmp_path))
    assert text.startswith(f"{tmp_path} cannot be read as a saved dataset ({words}")
    assert text.endswith("). Write the folder anew by `save_to_disk`.")


def test_bad_text_in_a_saved_dataset_is_named(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path)
    data = tmp_path / "data-00000-of-00001.arrow"
    data.write_bytes(data.read_bytes().replace("🙂".encode(), b"\xff\xff\xff\xff"))
    assert mistake(str(tmp_path)).startswith(f"{tmp_path} cannot be read beyond row 0: ")


def test_the_fingerprint_is_that_of_the_content_and_the_format(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    first = Files(write(tmp_path, "a.jsonl", LINES)).fingerprint()
    assert Files(write(tmp_path, "elsewhere/b.jsonl", LINES)).fingerprint() == first
    assert Files(write(tmp_path, "c.jsonl", LINES + b"\n")).fingerprint() != first
    assert Files(write(tmp_path, "a.json", LINES)).fingerprint() != first


def test_the_fingerprint_of_a_file_follows_a_change_that_keeps_time_and_size(tmp_path):
    path = write(tmp_path, "a.jsonl", b'{"a": 1}')
    times, first = os.stat(path), Files(path).fingerprint()
    write(tmp_path, "a.jsonl", b'{"a": 2}')
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert Files(path).fingerprint() != first


def test_the_fingerprint_of_a_saved_dataset_is_its_own(saved, tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    assert Files(str(saved / "one")).fingerprint() == datasets.load_from_disk(saved / "one")._fingerprint
    train, test = (Files(str(saved / "two"), split).fingerprint() for split in ("train", "test"))
    assert train == f"{datasets.load_from_disk(saved / 'two')['train']._fingerprint}-train"
    assert train != test
    dataset.map(lambda row: {"prompt": row["prompt"] + "!"}).save_to_disk(tmp_path / "other")
    assert Files(str(tmp_path / "other")).fingerprint() != Files(str(saved / "one")).fingerprint()


FUZZ = settings(
    max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
NAMES = [name + compression for name in WRITE for compression in COMPRESS]
WHOLE = {name + compression: COMPRESS[compression](WRITE[name](ROWS * 5)) for name in WRITE for compression in COMPRESS}


def read_or_refuse(folder: Path, name: str, content: bytes) -> None:
    path = write(folder, name, content)
    with contextlib.suppress(UsageError):
        for number, _ in Files(path).numbered():
            assert number > 0


@FUZZ
@given(name=st.sampled_from(NAMES), content=st.binary(max_size=200))
def test_random_bytes_are_rows_or_a_mistake(tmp_path_factory, name, content):
    read_or_refuse(tmp_path_factory.getbasetemp(), name, content)
    outer = next(compression for compression in reversed(COMPRESS) if name.endswith(compression))
    read_or_refuse(tmp_path_factory.getbasetemp(), name, COMPRESS[outer](content))


@FUZZ
@given(name=st.sampled_from(NAMES), data=st.data())
def test_damaged_files_are_rows_or_a_mistake(tmp_path_factory, name, data):
    content = bytearray(WHOLE[name])
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    end = data.draw(st.none() | st.integers(0, len(content)))
    read_or_refuse(tmp_path_factory.getbasetemp(), name, bytes(content[:end]))
