"""What gives a response a number."""

# Annotations are not postponed: jsonargparse reads those of a base class with the names of the subclass's file.
import dataclasses
import hashlib
import inspect
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
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
        """Changes when the scores may: the settings, the code, and sizes and times of the files that settings name."""
        plain = identity(self)
        code = [digest_of_code(cls) for cls in type(self).__mro__ if issubclass(cls, Scorer) and cls is not Scorer]
        fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        inner = [scorer.fingerprint() for scorer in _scorers([getattr(self, field.name) for field in fields])]
        return json.dumps([plain, [_files(text) for text in _texts(plain)], code, inner], default=repr)


class Unscored(UsageError):
    """A response to which a scorer gave no number.

    Args:
        place: Its place among those that were given.
        reason: What came instead.
    """

    def __init__(self, place: int, reason: str) -> None:
        super().__init__(reason)
        self.place, self.reason = place, reason


def scores_of(scorer: Scorer, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """What a scorer gives, one number a response.

    Raises:
        UsageError: If it gives more or fewer.
    """
    found = scorer.score(prompts, responses)
    scores = [float(score) for score in found] if isinstance(found, Iterable) else []
    if len(scores) != len(responses):
        raise UsageError(
            f"{type(scorer).__name__} gave {len(scores)} numbers for {len(responses)} responses; it must give one each."
        )
    return scores


def digest_of_code(code: Any) -> str:
    """Changes with the file that a function or a class is written in; empty where there is none."""
    try:
        content = Path(inspect.getsourcefile(code) or "").read_bytes()
    except (TypeError, OSError):  # a builtin, a callable object
        return ""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _scorers(value: Any) -> Iterator[Scorer]:
    """Scorers among the settings of another."""
    if isinstance(value, Scorer):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _scorers(item)


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
