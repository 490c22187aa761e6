"""What became of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_lightning.labelling.groups import Grouping


@dataclass
class Tally:
    """Counts of a run.

    Attributes:
        compared: Pairs that were labelled.
        ties: Those of them without a better response.
        unread: Those without a verdict.
        rows: Rows that were written.
        better: Sum of the scores of better responses; of rankings the best.
        worse: Sum of the scores of worse ones; of rankings the worst.
        num_scored: How many were summed.
        num_turned: How many of them had the lower score: the noise of drawn labels.
    """

    compared: int = 0
    ties: int = 0
    unread: int = 0
    rows: int = 0
    better: float = 0.0
    worse: float = 0.0
    num_scored: int = 0
    num_turned: int = 0

    def labelled(self, verdicts: Sequence[float | None]) -> None:
        """Count verdicts."""
        self.compared += len(verdicts)
        self.ties += sum(verdict == 0.5 for verdict in verdicts)
        self.unread += sum(verdict is None for verdict in verdicts)

    def scored(self, better: float, worse: float) -> None:
        """Count the scores of a pair."""
        self.better, self.worse = self.better + better, self.worse + worse
        self.num_scored += 1
        self.num_turned += better < worse

    def report(self, grouping: Grouping, make: str, unfinished: str) -> str:
        """What a person wants to know at the end."""
        ties = "left out" if make == "pairs" else "kept"
        cut = "left out" if unfinished == "drop" else "kept; training reads them as if they ended there"
        figures: list[tuple[str, int, str]] = [
            ("prompts", grouping.prompts, ""),
            ("responses", grouping.responses, ""),
            ("  unfinished", grouping.unfinished, cut),
            ("  without a word", grouping.empty, "left out"),
            ("  duplicates", grouping.duplicates, "left out"),
            ("prompts with fewer than two", grouping.alone, "left out"),
            *([] if make == "rankings" else [("compared pairs", self.compared, "")]),
            *([] if make == "rankings" else [("  ties", self.ties, ties)]),
            ("  without a verdict", self.unread, "left out"),
            (make, self.rows, "written"),
        ]
        lines = [
            f"  {name:28}{number:>9,}{f'   {note}' if note and number else ''}"
            for name, number, note in figures
            if number or not name.startswith("  ")
        ]
        if self.num_scored:
            names = ("best", "worst") if make == "rankings" else ("better", "worse")
            for name, total in zip(names, (self.better, self.worse), strict=True):
                lines.append(f"  {f'mean score of the {name}':28}{total / self.num_scored:>9.3f}")
        if self.num_turned:
            lines.append(f"  {'against the scores':28}{self.num_turned / self.num_scored:>9.1%}")
        return "\n".join(["Labelled", *lines])
