"""What a person sees while samples are made, and at the end."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from tqdm import tqdm  # type: ignore[import-untyped]

from dpo_lightning.journal import Row

log = logging.getLogger(__name__)
MOSTLY = 0.5  # share of cut completions from which on it is worth a word


class Progress:
    """A bar of prompts with completions and tokens/s.

    Args:
        total: Prompts, counted once a temperature.
        done: How many of them were there before.
        shown: Whether this process shows it.
    """

    def __init__(self, total: int, done: int, shown: bool) -> None:
        seldom = 0.2 if sys.stderr.isatty() else 30.0  # seconds; what is no terminal keeps every line
        self._bar = tqdm(
            total=total, initial=done, disable=not shown, desc="Sampling", unit=" prompts", mininterval=seldom,
            dynamic_ncols=True, bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} prompts "
            "[{elapsed}<{remaining}{postfix}]",
        )  # fmt: skip
        self._begun = time.perf_counter()
        self._completions = self._tokens = 0

    def add(self, rows: Iterable[Row]) -> None:
        """Count rows that are new."""
        rows = list(rows)
        self._completions += sum(len(row["tokens"]) for row in rows)
        self._tokens += sum(sum(row["tokens"]) for row in rows)
        self._bar.set_postfix_str(
            f"{self._completions:,} completions, {self.tokens_per_second():,.0f} tokens/s", refresh=False
        )
        self._bar.update(len(rows))

    def tokens_per_second(self) -> float:
        """New tokens of all ranks by the time since the beginning."""
        return self._tokens / max(time.perf_counter() - self._begun, 1e-9)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def summary(rows: Iterable[Row]) -> str:
    """How many completions rows have, how long they are, and how many came to their end."""
    tokens, finished, prompts = list[int](), list[bool](), set[int]()
    for row in rows:
        tokens += row["tokens"]
        finished += row["finished"]
        prompts.add(row["row"])
    return (
        f"{len(tokens):,} completions of {len(prompts):,} prompts, {sum(tokens) / len(tokens):.1f} tokens on average, "
        f"{sum(finished) / len(finished):.0%} finished"
    )


def warn_where_cut(rows: Iterable[Row], max_new_tokens: int) -> None:
    """Say so where most completions did not come to their end."""
    finished = [end for row in rows for end in row["finished"]]
    cut = 1 - sum(finished) / len(finished)
    if cut > MOSTLY:
        log.warning(
            f"{cut:.0%} of the completions were cut at --max_new_tokens {max_new_tokens} before their end; give more, "
            "unless beginnings are what you want."
        )
