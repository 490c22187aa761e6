"""A format of rows whose responses are in no order."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_lightning.data.cells import cell, wrong_type
from dpo_lightning.data.example import PreferenceExample, UnusableRow
from dpo_lightning.data.formats import Asked
from dpo_lightning.data.sources import Row

NO_RESPONSES = "no responses"


@dataclass(frozen=True, kw_only=True)
class Samples(Asked):
    """A prompt and a list of responses in no order, as `dpo-lightning sample` writes them, to be scored by predict.

    Each response is an example of its own, so that equal ones may stand beside each other.

    Args:
        responses: Column of the list.
    """

    responses: str = "responses"

    def answers(self) -> tuple[str, ...]:
        """Responses."""
        return (self.responses,)

    def ordered(self) -> bool:
        """No."""
        return False

    def read(self, row: Row) -> list[PreferenceExample | UnusableRow]:
        """One example a response, or why there is none."""
        responses, where = cell(row, self.responses), f"column {self.responses!r}"
        if not isinstance(responses, list):
            raise wrong_type(where, "a list of responses", responses)
        if not responses:
            raise UnusableRow(NO_RESPONSES, f"{where} has none.")
        items = [self._one(row, response, number, where) for number, response in enumerate(responses, start=1)]
        problems = [item for item in items if isinstance(item, UnusableRow)]
        if len(problems) == len(items):
            raise problems[0]
        return items

    def _one(self, row: Row, response: object, number: int, where: str) -> PreferenceExample | UnusableRow:
        try:
            return self.example(row, [response], [f"{where}, response {number}"])._replace(response=number)
        except UnusableRow as reason:
            return reason
