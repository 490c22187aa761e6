"""What gives a response a number."""

# Annotations are not postponed: jsonargparse reads those of a base class with the names of the subclass's file.
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

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
