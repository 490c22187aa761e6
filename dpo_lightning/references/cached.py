"""Reference log-probabilities that were computed once, before training, and are looked up ever after."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dpo_lightning.batch import Logps, PreferenceBatch
from dpo_lightning.errors import UsageError
from dpo_lightning.models.fingerprint import fingerprint
from dpo_lightning.models.in_memory import PolicyRecipe
from dpo_lightning.models.policy import CausalPolicy
from dpo_lightning.references.base import Circumstances, Reference, ReferenceModel, Run, Scorable

MARK = b"dpo_lightning_reference"
ROWS_A_FILE = 4_096
SCORES = pa.schema({"digest": pa.int64(), "total": pa.list_(pa.float64()), "length": pa.list_(pa.int32())})


@dataclass(frozen=True, kw_only=True)
class Cached(Reference):
    """Log-probabilities of the policy as training begins with it, scored once and kept in a folder.

    Training then needs no second model. The folder may be copied to other machines and shared by many runs: scores
    are found by the tokens of an example, the weights that scored them and their precision, and by nothing else.
    With several machines it has to lie where all see it.

    Args:
        dir: The folder.
        path: Folder or hub name of another model to score with, instead of the policy.
        revision: Branch, tag or commit of that model on the hub.
    """

    sums_alone: ClassVar[bool] = True

    dir: str = "reference_cache"
    path: str | None = None
    revision: str | None = None

    @property
    def is_initial_policy(self) -> bool:
        """True without a path."""
        return self.path is None

    def check(self, spec: PolicyRecipe) -> None:
        """A named model must exist."""
        if self.path is not None:
            spec.at(self.path, self.revision).load_config()

    def build(self, found: Circumstances) -> CachedReference:
        """What is in the folder for these weights."""
        folder = Path(self.dir).expanduser()

        def scorer() -> CausalPolicy:
            return found.initial() if self.path is None else found.load(found.spec.at(self.path, self.revision))

        if found.expected is not None and (folder / found.expected).is_dir():
            return CachedReference(folder / found.expected, scorer)
        policy = scorer()
        what = f"{fingerprint(policy)} {found.numerics} {policy.layout}"
        return CachedReference(folder / hashlib.blake2b(what.encode(), digest_size=16).hexdigest(), scorer)


class CachedReference(ReferenceModel):
    """Scores of a folder, looked up by the tokens of an example.

    Args:
        folder: The folder; its name is the fingerprint of what scored.
        scorer: The model that scores what is missing.
    """

    def __init__(self, folder: Path, scorer: Callable[[], CausalPolicy]) -> None:
        super().__init__()
        self.folder, self.fingerprint = folder, folder.name
        self._scorer = scorer
        self._known = np.empty(0, np.int64)
        # No buffers: a strategy may cast those to 16 bits.
        self._scores: tuple[Tensor, Tensor, Tensor] | None = None

    def prepare(self, examples: Scorable | None, run: Run) -> None:
        """Score what the folder lacks, each rank its share, and take up the folder.

        Raises:
            UsageError: If a file is damaged or of something else, or the data cannot be scored beforehand.
        """
        if examples is None:
            raise UsageError(
                "Cached scores the examples of a PreferenceDataModule before training, and there is none; use "
                "FrozenCopy with other data."
            )
        if len(self._known) and np.isin(examples.digests(), self._known).all():
            return
        known = self._read()["digest"].to_numpy()
        run.barrier()  # nobody writes before all have read
        self._score(examples, known, run)
        run.barrier()
        self._take_up(self._read())
        missing = ~np.isin(examples.digests(), self._known)
        if missing.any():
            raise UsageError(
                f"{self.folder}: {missing.sum():,} examples have no scores though all were scored just now. With "
                "several machines the folder has to lie where all of them see it."
            )

    def forward(self, batch: PreferenceBatch) -> Logps:
        """The scores of a batch.

        Raises:
            UsageError: If an example has none; on a GPU, where asking would make it wait, such scores are nan.
        """
        if self._scores is None or batch.digest is None:
            raise UsageError("Cached knows the examples of a PreferenceDataModule alone, and those in a Trainer.")
        device = batch.digest.device
        digests, totals, lengths = (values.to(device) for values in self._scores)
        self._scores = digests, totals, lengths
        place = torch.searchsorted(digests, batch.digest).clamp(max=len(digests) - 1)
        width = min(batch.length.shape[1], lengths.shape[1])
        length, total = lengths[place], totals[place]
        absent = batch.length.new_zeros(len(place), lengths.shape[1] - width)
        found = (digests[place] == batch.digest) & (length == torch.cat([batch.length, absent], 1)).all(1)
        if device.type == "cpu" and not found.all():
            rows = batch.row[~found].tolist()
            raise UsageError(f"{self.folder} has no scores for the tokens of rows {', '.join(map(str, rows[:5]))}.")
        return Logps(torch.where(found[:, None], total[:, :width], torch.nan), batch.length)

    def _score(self, examples: Scorable, known: np.ndarray, run: Run) -> None:
        policy, rows = None, list[dict[str, Any]]()
        for batch in examples.unscored(known, run.rank, run.world_size):
            if policy is None:
                policy = self._scorer()
                training = policy.training
                policy.eval()
            logps = run.score(policy, batch)
            assert batch.digest is not None
            columns = (batch.digest.tolist(), logps.total.tolist(), batch.length.tolist())
            rows += [dict(zip(SCORES.names, values, strict=True)) for values in zip(*columns, strict=True)]
            if len(rows) >= ROWS_A_FILE:
                self._write(rows)
                rows = []
        self._write(rows)
        if policy is not None:
            policy.train(training)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """A file that is there whole or not at all, so that a run that is killed goes on from the last one."""
        if not rows:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        name = uuid.uuid4().hex
        table = pa.Table.from_pylist(rows, SCORES.with_metadata({MARK: self.fingerprint.encode()}))
        pq.write_table(table, self.folder / f"{name}.unfinished", write_page_checksum=True)
        os.replace(self.folder / f"{name}.unfinished", self.folder / f"{name}.parquet")

    def _read(self) -> pa.Table:
        tables = [SCORES.empty_table()]
        for path in sorted(self.folder.glob("*.parquet")):
            try:
                table = pq.read_table(path, page_checksum_verification=True)
            except (pa.ArrowException, OSError) as error:
                raise UsageError(
                    f"{path} is damaged: {error}. Delete the file: what it held is scored anew."
                ) from error
            mark = (table.schema.metadata or {}).get(MARK, b"").decode()
            if mark != self.fingerprint or table.schema.remove_metadata() != SCORES:
                raise UsageError(
                    f"{path} does not hold scores of this reference ({mark or 'it names none'} in place of "
                    f"{self.fingerprint}). Take the file away."
                )
            tables.append(table.replace_schema_metadata(None))
        return pa.concat_tables(tables)

    def _take_up(self, table: pa.Table) -> None:
        digests, first = np.unique(table["digest"].to_numpy(), return_index=True)
        rows = table.take(first)
        width = max(map(len, rows["length"].to_pylist()), default=1)

        def padded(name: str, dtype: torch.dtype) -> Tensor:
            values = [row + [0] * (width - len(row)) for row in rows[name].to_pylist()]
            return torch.tensor(values, dtype=dtype).view(len(digests), width)

        self._scores = torch.from_numpy(digests), padded("total", torch.float32), padded("length", torch.int64)
        self._known = digests
