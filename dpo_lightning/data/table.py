"""Tokens of a source on disk: made once by all processes together, found again as long as nothing changes them."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, overload

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from dpo_lightning.data.example import PreferenceExample, TokenizedExample, UnusableRow
from dpo_lightning.data.formats import Format
from dpo_lightning.data.key import token_key
from dpo_lightning.data.reading import Reading, begin
from dpo_lightning.data.report import DataReport
from dpo_lightning.data.sources import Source
from dpo_lightning.data.tokenize import Notes, Tokenization

CHUNK = 1_000
WRITTEN = pa.schema({"row": pa.int64(), "reason": pa.string(), "detail": pa.string(), "example": pa.string()})
IDS = List(Value("int32"))
TOKENS = Features(
    {
        **{"row": Value("int64"), "reason": Value("string"), "detail": Value("string")},
        **{"prompt_ids": IDS, "response_ids": List(IDS), "scored": List(List(Value("bool")))},
        **{name: Value("int32") for name in Notes._fields},
        **{"digest": Value("int64"), "prompt_digest": Value("int64"), "response": Value("int32")},
    }
)


@dataclass
class TokenTable:
    """Tokens of a source, and the rows that have none with the reason why.

    Attributes:
        tokens: One row an example, dropped ones included, with the columns of ``TOKENS``.
        format: How the rows were read, in words.
        unread: Columns that were not read.
        rows: Number of rows of the source.
        ordered: Whether they can be learnt from; otherwise their responses can be scored alone.
        cached: Whether the tokens were there already.
        seconds: What making or finding them took.
        folder: Where the tokens lie, if they are to be gone with what uses them.
    """

    tokens: Dataset
    format: str
    unread: list[str]
    rows: int
    ordered: bool
    cached: bool
    seconds: float
    folder: tempfile.TemporaryDirectory | None = None

    def kept(self) -> Examples:
        """The examples that are used."""
        reasons = self.tokens.select_columns("reason").with_format("arrow")[:]["reason"]
        return Examples(self.tokens.select(np.flatnonzero(pc.equal(reasons, "").to_numpy())), [self.folder])

    def report(self, split: str, source: str, batch_size: int) -> DataReport:
        """What became of the rows.

        Args:
            split: What they are for.
            source: What messages call their source.
            batch_size: Examples in a batch, for the cost of padding.
        """
        origin = "tokens found in the cache" if self.cached else f"tokenised in {self.seconds:.1f} s"
        report = DataReport(split, source, self.format, self.unread, batch_size, rows=self.rows, origin=origin)
        report.count(self.tokens.with_format("arrow")[:])
        digests = self.kept().column("digest")
        report.duplicates = len(digests) - len(np.unique(digests))
        return report


class Examples(Sequence[TokenizedExample]):
    """Tokenised examples that stay on disk until they are asked for.

    Args:
        tokens: Rows with the columns of ``TOKENS``.
        folders: What is to stay as long as they are in use, also for processes that read them anew.
    """

    def __init__(self, tokens: Dataset, folders: Sequence[tempfile.TemporaryDirectory | None] = ()) -> None:
        self.tokens, self._folders = tokens, folders
        self._ids = tokens.select_columns(list(TokenizedExample._fields))

    @staticmethod
    def joined(parts: Sequence[Examples]) -> Examples:
        """Several behind each other."""
        tokens = datasets.concatenate_datasets([part.tokens for part in parts])
        return Examples(tokens, [folder for part in parts for folder in part._folders])

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.tokens)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TokenizedExample]: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | Sequence[TokenizedExample]:
        """An example, or several."""
        if isinstance(index, slice):
            return self.__getitems__(list(range(*index.indices(len(self)))))
        return TokenizedExample(**self._ids[index])

    def __getitems__(self, indices: list[int]) -> list[TokenizedExample]:
        """Several examples, as a DataLoader asks for a batch."""
        columns = self._ids[indices]
        return [TokenizedExample(*values) for values in zip(*map(columns.get, TokenizedExample._fields), strict=True)]

    def column(self, name: str) -> np.ndarray:
        """A column of numbers."""
        return self.tokens.select_columns(name).with_format("arrow")[:][name].to_numpy()

    def num_tokens(self) -> np.ndarray:
        """Tokens of each example in the stream."""
        tokens = self._ids.select_columns(["prompt_ids", "response_ids"]).with_format("arrow")[:]
        responses, owner = pc.list_flatten(tokens["response_ids"]), pc.list_parent_indices(tokens["response_ids"])
        lengths = pc.list_value_length(responses).to_numpy()
        return pc.list_value_length(tokens["prompt_ids"]).to_numpy() + np.bincount(owner.to_numpy(), lengths)

    def num_scored(self) -> np.ndarray:
        """Scored tokens of each example, over all its responses."""
        column = self._ids.select_columns(["scored", "response_ids"]).with_format("arrow")[:]
        responses, owner = pc.list_flatten(column["response_ids"]), pc.list_parent_indices(column["response_ids"])
        counts = np.bincount(owner.to_numpy(), pc.list_value_length(responses).to_numpy(), len(self)).astype(np.int64)
        for place in np.flatnonzero(pc.is_valid(column["scored"]).to_numpy()):
            counts[place] = sum(map(sum, column["scored"][int(place)].as_py()))
        return counts

    def prompts(self) -> np.ndarray:
        """What tells the prompt of each example from others."""
        return self.column("prompt_digest")

    def select(self, indices: Sequence[int]) -> Examples:
        """Some of the examples."""
        return Examples(self.tokens.select(indices), self._folders)


def tokenize(
    source: Source, shape: Format | None, tokenization: Tokenization, *, cache: bool = True, num_proc: int | None = None
) -> TokenTable:
    """Tokens of a source, from the cache if they are there.

    Args:
        source: Where its rows come from.
        shape: What their columns mean; found from the first rows where None.
        tokenization: How they become tokens.
        cache: Whether to look for tokens that were made before, and to keep those that are made.
        num_proc: Processes that tokenise.

    Raises:
        UsageError: If the source cannot be read or its shape cannot be told.
    """
    start = time.perf_counter()
    key = token_key(source, shape, tokenization) if cache else None
    if key is None:
        temporary = tempfile.TemporaryDirectory(prefix="dpo_lightning_")
        _write(Path(temporary.name), source, shape, tokenization, num_proc)
        return replace(_load(Path(temporary.name), False, start), folder=temporary)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "dpo_lightning" / key
    cached = _is_whole(folder)
    if not cached:
        unfinished = folder.with_name(f"{key}.{secrets.token_hex(4)}")
        unfinished.mkdir(parents=True)
        try:
            _write(unfinished, source, shape, tokenization, num_proc)
            _move(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return _load(folder, cached, start)


def tokenize_batch(batch: Mapping[str, list[Any]], tokenization: Tokenization) -> dict[str, list[Any]]:
    """Columns ``TOKENS`` for columns ``WRITTEN``: those that hold an example get tokens or a reason."""
    examples = [_decoded(text, row) for text, row in zip(batch["example"], batch["row"], strict=True) if text]
    results, begin_token = tokenization(examples), tokenization.tokenizer.bos_token_id
    rows = []
    for row, reason, detail, text in zip(*(batch[name] for name in WRITTEN.names), strict=True):
        result = next(results) if text else UnusableRow(reason, detail)
        rows.append(record(row, result, begin_token))
    return {name: [row[name] for row in rows] for name in TOKENS}


def records_table(records: list[dict[str, Any]]) -> pa.Table:
    """Records as the rows of a token table."""
    return pa.Table.from_pylist(records, TOKENS.arrow_schema)


def record(
    row: int, result: tuple[TokenizedExample, Notes] | UnusableRow, begin_token: int | None = None
) -> dict[str, Any]:
    """A row of a token table: an example and what happened to it, or why there is none."""
    blank: dict[str, Any] = dict.fromkeys(TOKENS) | {"row": row, "reason": "", "detail": ""}
    if isinstance(result, UnusableRow):
        return blank | {"reason": result.reason, "detail": result.detail}
    example, notes = result
    prompt = array("i", example.prompt_ids).tobytes()
    whole = hashlib.blake2b(prompt, digest_size=8)
    for place, response in enumerate(example.response_ids):
        scored = b"" if example.scored is None else bytes(example.scored[place])
        whole.update(array("i", [len(response), len(scored), *response]).tobytes() + scored)
    digests = {"digest": whole.digest(), "prompt_digest": hashlib.blake2b(prompt, digest_size=8).digest()}
    if len(example.prompt_ids) == 1 and begin_token in (None, *example.prompt_ids):  # no prompt that examples share
        digests["prompt_digest"] = digests["digest"]
    numbers = {name: int.from_bytes(value, "little", signed=True) for name, value in digests.items()}
    return blank | example._asdict() | {"row": row} | notes._asdict() | numbers


def _write(
    folder: Path, source: Source, shape: Format | None, tokenization: Tokenization, num_proc: int | None
) -> None:
    reading = begin(source.numbered(), shape, str(source))
    numbers: set[int] = set()
    with pa.OSFile(str(folder / "examples.arrow"), "wb") as file, pa.ipc.new_stream(file, WRITTEN) as writer:
        records = _records(reading, numbers)
        while chunk := list(islice(records, CHUNK)):
            writer.write_batch(pa.RecordBatch.from_pylist(chunk, WRITTEN))
    Dataset.from_file(str(folder / "examples.arrow")).map(
        tokenize_batch,
        batched=True,
        batch_size=CHUNK,
        fn_kwargs={"tokenization": tokenization},
        remove_columns=WRITTEN.names,
        features=TOKENS,
        num_proc=num_proc,
        cache_file_name=str(folder / "tokens.arrow"),
        new_fingerprint=folder.name.replace(".", "_"),
        desc=f"Tokenising {source}",
    )
    (folder / "examples.arrow").unlink()
    about = {
        **{"format": str(reading.format), "ordered": reading.format.ordered()},
        **{"unread": reading.unread, "rows": len(numbers)},
    }
    (folder / "about.json").write_text(json.dumps(about))


def _records(reading: Reading, numbers: set[int]) -> Iterator[dict[str, Any]]:
    for number, items in reading.examples():
        numbers.add(number)
        for item in items:
            if isinstance(item, UnusableRow):
                yield {"row": number, "reason": item.reason, "detail": item.detail, "example": ""}
            else:
                yield {"row": number, "reason": "", "detail": "", "example": _encoded(item)}


def _encoded(example: PreferenceExample) -> str:
    return json.dumps([example.prompt, example.responses, example.tools, example.response], default=str)


def _decoded(text: str, row: int) -> PreferenceExample:
    prompt, responses, tools, response = json.loads(text)
    return PreferenceExample(prompt, tuple(responses), row, tools, response)


def _is_whole(folder: Path) -> bool:
    """Whether tokens can be read; who cleans a cache by the age of its files may leave the folder."""
    return (folder / "about.json").is_file() and any(folder.glob("tokens*.arrow"))


def _move(unfinished: Path, folder: Path) -> None:
    try:
        os.replace(unfinished, folder)
    except OSError:
        if not _is_whole(folder):  # otherwise another process was faster
            shutil.rmtree(folder)
            os.replace(unfinished, folder)


def _load(folder: Path, cached: bool, start: float) -> TokenTable:
    files = sorted(folder.glob("tokens*.arrow"))
    tokens = datasets.concatenate_datasets([Dataset.from_file(str(file)) for file in files])
    about = json.loads((folder / "about.json").read_text())
    return TokenTable(tokens, **about, cached=cached, seconds=time.perf_counter() - start)
