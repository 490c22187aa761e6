"""What questions take, and caps on it that no question may pass."""

import threading
from collections.abc import Callable
from typing import NamedTuple


class Spent(NamedTuple):
    """What was asked.

    Attributes:
        requests: Requests that were answered, or may have been.
        input_tokens: Tokens of the questions.
        output_tokens: Tokens of the answers.
    """

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def plus(self, *others: "Spent") -> "Spent":
        """All together."""
        return Spent(*map(sum, zip(self, *others, strict=True)))


NOTHING = Spent()


class Purse:
    """What may be spent; many threads take from it.

    Args:
        passed: The cap that would be passed by what is given; empty where there is none.
        spent: What was spent before.

    Attributes:
        spent: What has been spent.
        passed: The cap that would have been passed by what was last asked for.
    """

    def __init__(self, passed: Callable[[Spent], str], spent: Spent) -> None:
        self.spent, self.passed = spent, ""
        self._cap_passed_by, self._taken = passed, list[Spent]()
        self._lock = threading.Lock()

    def take(self, most: Spent) -> bool:
        """Set aside what a request takes at the most, unless that might pass a cap."""
        with self._lock:
            self.passed = self._cap_passed_by(self.spent.plus(most, *self._taken))
            if not self.passed:
                self._taken.append(most)
            return not self.passed

    def settle(self, most: Spent, spent: Spent) -> None:
        """What was set aside came to no more than this."""
        with self._lock:
            self._taken.remove(most)
            self.spent = self.spent.plus(spent)
