"""What became of the rows of a source, so that nothing is dropped in silence."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_lightning.data.tokenize import Notes
from dpo_lightning.errors import UsageError

NUM_NAMED = 5  # rows named for each reason
BINS = 20
NOTES = {
    "cut_prompt": "prompts cut",
    "cut_responses": "responses cut, and so without end token",
    "no_end": "whole responses without end token: a model learns from them not to stop",
    "merged": "responses tokenised by themselves, since tokens merge across the boundary",
    "two_begins": "prompts with two begin tokens: their text begins with one, and the tokenizer adds one",
    "special": "examples whose text holds a special token, which it becomes",
    "run_on": "examples whose response follows the prompt without a space or a new line",
}


@dataclass
class Dropped:
    """Examples that are dropped for the same reason.

    Attributes:
        count: How many.
        rows: The first of their rows.
        more: Whether there are further rows.
        detail: What is wrong with the first of them.
    """

    count: int = 0
    rows: list[int] = field(default_factory=list)
    more: bool = False
    detail: str = ""


@dataclass
class DataReport:
    """Counts over one source.

    Args:
        split: What its rows are for: train, val or test.
        source: What it is called.
        format: How its rows were read.
        unread: Columns that were not read.
        batch_size: Examples in a batch, for the cost of padding.
    """

    split: str
    source: str
    format: str
    unread: list[str]
    batch_size: int
    rows: int = 0
    kept: int = 0
    origin: str = ""
    dropped: dict[str, Dropped] = field(default_factory=dict)
    noted: Counter[str] = field(default_factory=Counter)
    duplicates: int | None = None
    responses: Counter[int] = field(default_factory=Counter)
    lengths: dict[str, Counter[int]] = field(default_factory=dict)
    longer: Counter[str] = field(default_factory=Counter)
    stream_tokens: int = 0
    padded_tokens: int = 0

    def count(self, tokens: pa.Table) -> None:
        """Take in some examples.

        Args:
            tokens: Rows of a token table, those that were dropped included.
        """
        reasons = tokens["reason"].to_pylist()
        for place, reason in enumerate(reasons):
            if reason:
                dropped = self.dropped.setdefault(reason, Dropped(detail=tokens["detail"][place].as_py()))
                dropped.count += 1
                row = tokens["row"][place].as_py()
                if row not in dropped.rows:
                    dropped.more = len(dropped.rows) == NUM_NAMED
                    dropped.rows += [] if dropped.more else [row]
        kept = tokens.filter(pc.equal(tokens["reason"], ""))
        self.kept += len(kept)
        for name in Notes._fields:
            self.noted[name] += pc.sum(kept[name]).as_py() or 0
        if len(kept):
            prompt = pc.list_value_length(kept["prompt_ids"]).to_numpy()
            num_responses = pc.list_value_length(kept["response_ids"]).to_numpy()
            response = pc.list_value_length(pc.list_flatten(kept["response_ids"])).to_numpy()
            self._count_lengths(prompt, num_responses, response)

    def _count_lengths(self, prompt: np.ndarray, num_responses: np.ndarray, response: np.ndarray) -> None:
        first = np.cumsum(num_responses) - num_responses
        chosen = response[first]
        rejected = np.delete(response, first)
        self.responses += Counter(num_responses.tolist())
        for name, values in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
            if len(values):
                self.lengths[name] = self.lengths.get(name, Counter()) + Counter(values.tolist())
        sign = np.sign(np.repeat(chosen, num_responses - 1) - rejected)
        for name, value in (("chosen", 1), ("neither", 0), ("rejected", -1)):
            self.longer[name] += int((sign == value).sum())
        self.stream_tokens += int(prompt.sum() + response.sum())
        # As rows: every response behind its prompt, padded to the longest row of a shuffled batch.
        longest = prompt + np.maximum.reduceat(response, first)
        order = np.random.default_rng(0).permutation(len(prompt))
        batches = np.arange(0, len(order), self.batch_size)
        widths, heights = np.maximum.reduceat(longest[order], batches), np.add.reduceat(num_responses[order], batches)
        self.padded_tokens += int((widths * heights).sum())

    @property
    def num_dropped(self) -> int:
        """Examples that are not used."""
        return sum(dropped.count for dropped in self.dropped.values())

    def refuse_drops(self) -> None:
        """Take no example that cannot be used.

        Raises:
            UsageError: If there is one; names the first, with its row and the reason.
        """
        for reason, dropped in self.dropped.items():
            raise UsageError(
                f"{self.source}, row {dropped.rows[0]}: {reason}{': ' if dropped.detail else ''}{dropped.detail}\n"
                f"{self.num_dropped:,} of {self.kept + self.num_dropped:,} examples cannot be used, and "
                "`data.init_args.strict` allows none."
            )

    def table(self) -> list[tuple[str, str, str]]:
        """What is to be said, as lines of a name, a figure and a remark."""
        examples = self.kept + self.num_dropped
        lines = [
            ("read as", "", self.format),
            ("columns not read", f"{len(self.unread)}", ", ".join(self.unread)) if self.unread else None,
            ("rows read", f"{self.rows:,}", self.origin),
            ("examples in them", f"{examples:,}", "") if examples != self.rows else None,
            ("examples kept", f"{self.kept:,}", f"{self.kept / max(examples, 1):.2%}"),
        ]
        lines += [
            ("dropped", f"{drop.count:,}", f"{reason} ({_rows(drop)}){': ' if drop.detail else ''}{drop.detail}")
            for reason, drop in sorted(self.dropped.items(), key=lambda item: -item[1].count)
        ]
        lines += [("of those kept", f"{self.noted[name]:,}", what) for name, what in NOTES.items() if self.noted[name]]
        lines += [("of those kept", f"{self.duplicates:,}", "equal to an earlier one")] if self.duplicates else []
        if not self.kept:
            return [line for line in lines if line]
        if set(self.responses) - {1, 2}:
            counts = ", ".join(f"{count:,} of {number}" for number, count in sorted(self.responses.items()))
            lines.append(("responses", f"{sum(k * n for k, n in self.responses.items()):,}", counts))
        for name, lengths in self.lengths.items():
            mean, median, high, most = _summary(lengths)
            name = "response" if name == "chosen" and "rejected" not in self.lengths else name
            lines.append(
                (f"{name} tokens", f"{mean:,.0f}", f"on the mean; median {median:,}, 95 % {high:,}, most {most:,}")
            )
        if pairs := sum(self.longer.values()):
            share, equal = self.longer["chosen"] / pairs, self.longer["neither"] / pairs
            lines.append(("chosen is longer", f"{share:.1%}", f"of pairs; equally long {equal:.1%}"))
        ratio = self.padded_tokens / self.stream_tokens
        padded = f"in the stream, once through; padded rows would hold {self.padded_tokens:,} ({ratio:.2f}x)"
        lines.append(("tokens", f"{self.stream_tokens:,}", f"{padded}, {self.batch_size} examples a batch"))
        return [line for line in lines if line]

    def __str__(self) -> str:
        """A table for a terminal."""
        lines = self.table()
        name, figure = (max(len(line[column]) for line in lines) for column in (0, 1))
        body = [f"  {line[0]:{name}}  {line[1]:>{figure}}  {line[2]}".rstrip() for line in lines]
        return "\n".join([f"{self.split}: {self.source}", *body])

    def markdown(self) -> str:
        """The same table for TensorBoard."""
        cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in self.table()]
        body = [f"| {' | '.join(line)} |" for line in cells]
        return "\n".join([f"**{self.split}: {self.source}**", "", "| | | |", "|---|--:|---|", *body])

    def to_json(self) -> dict[str, Any]:
        """All counts as plain data, lengths as histograms."""
        plain = {name: value for name, value in vars(self).items() if name not in ("dropped", "lengths")}
        plain["dropped"] = {reason: vars(dropped) for reason, dropped in self.dropped.items()}
        plain["lengths"] = {name: _histogram(lengths) for name, lengths in self.lengths.items()}
        return plain


def _rows(dropped: Dropped) -> str:
    more = ", ..." if dropped.more else ""
    return f"row{'s' if len(dropped.rows) > 1 else ''} {', '.join(map(str, dropped.rows))}{more}"


def _summary(lengths: Counter[int]) -> tuple[float, int, int, int]:
    """Mean, median, 95th percentile and maximum."""
    values, counts = (np.array(column) for column in zip(*sorted(lengths.items()), strict=True))
    reached = np.cumsum(counts) / counts.sum()
    median, high = (int(values[np.searchsorted(reached, share)]) for share in (0.5, 0.95))
    return float((values * counts).sum() / counts.sum()), median, high, int(values[-1])


def _histogram(lengths: Counter[int]) -> dict[str, Any]:
    values, counts = (np.array(column) for column in zip(*sorted(lengths.items()), strict=True))
    in_bin, edges = np.histogram(
        values, bins=min(BINS, int(values[-1])), range=(0, int(values[-1]) + 1), weights=counts
    )
    mean, median, high, most = _summary(lengths)
    summary = {"mean": mean, "median": median, "percentile_95": high, "most": most}
    return summary | {"edges": edges.tolist(), "counts": in_bin.astype(int).tolist()}
