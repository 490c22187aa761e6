"""What became of the rows of a source, so that nothing is dropped in silence."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class DataReport:
    """Counts over one source.

    Args:
        source: What it is called.
        format: How its rows were read.
    """

    source: str
    format: str = ""
    rows: int = 0
    kept: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.kept:,} of {self.rows:,} rows kept, read as {self.format or 'nothing'}"]
        lines += [f"  dropped {count:,}: {reason}" for reason, count in self.dropped.most_common()]
        lines += [f"  {count:,} {what}" for what, count in self.noted.most_common() if count]
        if self.kept:
            prompt, responses = self.prompt_tokens / self.kept, self.response_tokens / self.kept
            lines.append(f"  mean tokens an example: prompt {prompt:.0f}, responses {responses:.0f} together")
        return "\n".join(lines)
