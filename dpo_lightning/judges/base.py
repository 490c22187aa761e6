"""What says which of two responses is better."""

# Annotations are not postponed: jsonargparse reads those of a base class with the names of the subclass's file.
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dpo_lightning.scorers import Prompt


class Comparison(NamedTuple):
    """Two responses to a prompt.

    Attributes:
        prompt: What they answer, text or messages.
        first: A response.
        second: Another.
    """

    prompt: Prompt
    first: str
    second: str


class Judge(ABC):
    """Says which of two responses is better.

    A subclass is a frozen dataclass whose fields are its settings.
    """

    @abstractmethod
    def compare(self, comparisons: Sequence[Comparison], answers: Path | None = None) -> list[float | None]:
        """For each comparison 1 where the first response is better, 0 where the second is, one half for a tie.

        None where the judge came to no verdict.

        Args:
            comparisons: What is to be judged.
            answers: File that keeps every answer as it comes, from which a killed run goes on.
        """
