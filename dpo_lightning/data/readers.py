"""How the bytes of an open file become rows with the numbers by which messages name them. One function a format."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import IO, Any

from dpo_lightning.data.sources import Row
from dpo_lightning.errors import UsageError

Numbered = Iterator[tuple[int, Row]]
BLANK = re.compile(r"[ \t\n\r]*")  # what JSON allows between values; Python's `strip` takes more
DECODER = json.JSONDecoder()
# Behind the last batch of a stream; without it the stream may have been cut between two batches.
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
BATCH_ROWS = 1024


def json_lines(file: IO[bytes], name: str) -> Numbered:
    """One object a line, numbered by lines: blank ones count but hold no row."""
    return _one_a_line(_lines(file, name), name)


def json_document(file: IO[bytes], name: str) -> Numbered:
    """A list of objects or texts, an object of columns, an object with such a list under its only key, JSON Lines."""
    text = "".join(_lines(file, name)).removeprefix("\ufeff")
    start = _behind_blanks(text, 0)
    if text.startswith("[", start):
        elements = _elements(text, start, name)
        yield from ((number, {"text": row} if isinstance(row, str) else row) for number, row in elements)
        return
    value, end = _value(text, start, name)
    if (more := _behind_blanks(text, end)) < len(text):
        if "\n" in text[start:end]:
            raise UsageError(
                f"{name}, line {_line(text, more)}: there is more behind the end of the first object; write a list of "
                "objects, [{...}, {...}], or each object on one line."
            )
        yield from _one_a_line(text.split("\n"), name)
        return
    inner = next(iter(value.values())) if isinstance(value, dict) and len(value) == 1 else None
    if isinstance(inner, list) and all(isinstance(row, dict) for row in inner):
        yield from enumerate(inner, start=1)
    else:
        yield 1, value


def separated(file: IO[bytes], name: str, *, delimiter: str) -> Numbered:
    """CSV and TSV with a header; every value is text. Rows count from 1 behind the header, blank lines do not."""
    csv.field_size_limit(2**31 - 1)  # one limit for the whole process; by default a dialogue is too long
    reader = csv.reader(_text_lines(file, name), delimiter=delimiter, strict=True)
    number, line = 0, 1  # the line at which the row in hand begins: a row may have several
    try:
        columns = next((fields for fields in reader if fields), [])
        if not columns:
            raise UsageError(f"{name} is empty; its first line must name the columns, as in: prompt,chosen,rejected")
        _check_columns(columns, name)
        line = reader.line_num + 1
        for fields in reader:
            if fields:
                number += 1
                if len(fields) != len(columns):
                    raise UsageError(
                        f"{name}, row {number} (line {line}): {len(fields)} fields, but the header has {len(columns)} "
                        f"columns: {', '.join(map(repr, columns))}. Put a field that holds a delimiter or a line break "
                        "in quotes."
                    )
                yield number, dict(zip(columns, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(
            f"{name}, row {number + 1} (from line {line}): {error}. A field that holds a delimiter, a quote or a line "
            'break stands in quotes, with each of its own quotes doubled: "he said ""no""". Is the file whole?'
        ) from error


def parquet(file: IO[bytes], name: str) -> Numbered:
    """Parquet, a batch at a time."""
    import pyarrow.parquet

    return _columnar(
        lambda: pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=BATCH_ROWS), name, kind="Parquet"
    )


def arrow(file: IO[bytes], name: str) -> Numbered:
    """Arrow's format for files or that for streams, a batch at a time."""
    return _columnar(lambda: _arrow_batches(file), name, kind="Arrow")


Reader = Callable[[IO[bytes], str], Numbered]
READERS: dict[str, Reader] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_document,
    ".csv": partial(separated, delimiter=","),
    ".tsv": partial(separated, delimiter="\t"),
    ".parquet": parquet,
    ".arrow": arrow,
}
SEEKING = (".parquet", ".arrow")  # formats that are not read from front to back


def _lines(file: IO[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"{name}, line {number}: not text in UTF-8 ({error}); convert the file.") from error
        yield text


def _text_lines(file: IO[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(_lines(file, name), start=1):
        if "\0" in line:
            raise UsageError(f"{name}, line {number}: not text but a NUL byte; write the file anew, in UTF-8.")
        yield line.removeprefix("\ufeff") if number == 1 else line


def _one_a_line(lines: Iterable[str], name: str) -> Numbered:
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix("\ufeff")  # at any line: such files are joined to longer ones
        if text.strip():
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UsageError(
                    f"{name}, line {number}: not valid JSON ({error}); each line must be one object."
                ) from error
            yield number, row


def _elements(text: str, start: int, name: str) -> Iterator[tuple[int, Any]]:
    """Values of the list that begins at ``start``, one by one, so that the row which breaks has a number."""
    number, position = 0, _behind_blanks(text, start + 1)
    while number or not text.startswith("]", position):
        number += 1
        row, position = _value(text, position, f"{name}, row {number}")
        yield number, row
        position = _behind_blanks(text, position)
        if text.startswith("]", position):
            break
        if not text.startswith(",", position):
            raise UsageError(
                f"{name}, line {_line(text, position)}: not valid JSON (no comma and no end of the list behind row "
                f"{number}). Is the file whole?"
            )
        position = _behind_blanks(text, position + 1)
    if (end := _behind_blanks(text, position + 1)) < len(text):
        raise UsageError(f"{name}, line {_line(text, end)}: there is more behind the end of the list; write one list.")


def _value(text: str, start: int, where: str) -> tuple[Any, int]:
    try:
        return DECODER.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        line = _line(text, getattr(error, "pos", start))
        raise UsageError(
            f"{where}, line {line}: not valid JSON ({error}); expected a list of objects, [{{...}}, {{...}}], or one "
            "object a line."
        ) from error


def _behind_blanks(text: str, start: int) -> int:
    match = BLANK.match(text, start)
    return match.end() if match else start


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _check_columns(columns: Sequence[str], name: str) -> None:
    listed = ", ".join(map(repr, columns))
    if "" in columns:
        raise UsageError(
            f"{name}: column {columns.index('') + 1} has no name: {listed}. Name every one, or leave it out; pandas "
            "leaves out its row numbers by `to_csv(index=False)`."
        )
    if twice := next((column for column in columns if columns.count(column) > 1), None):
        raise UsageError(f"{name}: two columns are called {twice!r}: {listed}. Give each its own name.")


def _columnar(batches: Callable[[], Iterator[Any]], name: str, kind: str) -> Numbered:
    import pyarrow

    number, source = 0, None
    while True:
        try:
            source = source or batches()
            batch = next(source, None)
            if batch is None:
                return
            batch.validate(full=True)  # damaged offsets would be followed to anywhere in memory
            rows = batch.to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
            reason = str(error) or type(error).__name__  # a damaged length asks for more memory than there is
            raise UsageError(
                f"{name} cannot be read as {kind} beyond row {number}: {reason}. Is the file whole?"
            ) from error
        if rows:
            _check_columns(batch.schema.names, name)
        yield from enumerate(rows, start=number + 1)
        number += len(rows)


def _arrow_batches(file: IO[bytes]) -> Iterator[Any]:
    import pyarrow.ipc

    magic = file.read(6)
    file.seek(0)
    if magic == b"ARROW1":
        with pyarrow.ipc.open_file(file) as reader:
            yield from map(reader.get_batch, range(reader.num_record_batches))
        return
    with pyarrow.ipc.open_stream(file) as reader:
        yield from reader
    file.seek(-len(END_OF_STREAM), 2)
    if file.read() != END_OF_STREAM:
        raise pyarrow.ArrowInvalid("the stream has no end mark")
