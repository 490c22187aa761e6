"""What gives a response a number."""

# Annotations are not postponed: jsonargparse reads those of a base class with the names of the subclass's file.
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UsageError
from dpo_lightning.recipes import identity

Prompt = str | list[dict[str, Any]]  # text, or messages


class Scorer(ABC):
    """Gives responses numbers, higher is better: a ground-truth reward, a reward model, a classifier.

    A subclass is a frozen dataclass whose fields are its settings; what is heavy is loaded at the first call.
    """

    @abstractmethod
    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """One number a response.

        Args:
            prompts: What each response answers.
            responses: Texts.
        """

    def fingerprint(self) -> str:
        """Changes when the scores may: the settings, with sizes and times of the files that they name."""
        plain = identity(self)
        return json.dumps([plain, [_files(text) for text in _texts(plain)]], default=repr)


class Unscored(UsageError):
    """A response to which a scorer gave no number.

    Args:
        place: Its place among those that were given.
        reason: What came instead.
    """

    def __init__(self, place: int, reason: str) -> None:
        super().__init__(reason)
        self.place, self.reason = place, reason


def _texts(plain: Any) -> Iterator[str]:
    if isinstance(plain, str):
        yield plain
    elif isinstance(plain, (list, dict)):
        for item in plain.values() if isinstance(plain, dict) else plain:
            yield from _texts(item)


def _files(path: str) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a file, or of the files in a folder."""
    here = Path(path)
    if not path or len(path) > 1000 or not here.exists():
        return []
    entries = sorted(here.rglob("*")) if here.is_dir() else [here]
    stats = [(str(entry), os.stat(entry)) for entry in entries if entry.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
