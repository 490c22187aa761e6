"""How fast training goes."""

from __future__ import annotations

import time


class Throughput:
    """Pairs and tokens a second between log lines, validation not counted."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Count from here on."""
        self._pairs = self._tokens = 0
        self._since = time.perf_counter()
        self._paused: float | None = None

    def pause(self) -> None:
        """Stop the clock."""
        self._paused = time.perf_counter()

    def resume(self) -> None:
        """Let the clock go on."""
        if self._paused is not None:
            self._since += time.perf_counter() - self._paused
        self._paused = None

    def count(self, pairs: int, tokens: int) -> None:
        """Add a batch."""
        self._pairs += pairs
        self._tokens += tokens

    def per_second(self) -> dict[str, float]:
        """Rates since the last start, which this is the next."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        rates = {"pairs_per_second": self._pairs / seconds, "tokens_per_second": self._tokens / seconds}
        self.start()
        return rates
